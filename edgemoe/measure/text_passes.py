"""Sequences that read on in given texts, in passes of any shape: what is timed where passes are measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch

from edgemoe.cache import CacheCounters
from edgemoe.demo.tasks import TASKS
from edgemoe.draft.ngram_drafter import NgramCalibration, NgramDrafter
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.sequential_runner import PassInput
from edgemoe.quiet import quiet_transformers

PROMPT = 48
"""Tokens of a text that are run as a prompt is: behind a shorter one passes would be shorter than in earnest."""
TOGETHER = 16
"""Prompts in one pass."""
MIN_PROBABILITY = 0.02
"""Path probability below which n-grams draft nothing, as in earnest."""
SEED = 5
"""Of the items that texts are made of, where none is given."""


class PassReading(NamedTuple):
    """One pass with what went on around it: seconds, and experts of all layers."""

    seconds: float
    experts: int
    misses: int
    draft_seconds: float
    reject_seconds: float


@dataclass
class _Reader:
    """One text, and how far it was read."""

    text: Sequence[int]
    cache: SequenceCache | None = None
    drafter: NgramDrafter | None = None


class TextPasses:
    """Texts read by one model side by side. Each begins again where it ends. One thread at a time."""

    def __init__(self, runner: ModelRunner, counters: CacheCounters, texts: Sequence[Sequence[int]]) -> None:
        """Every text has more than `PROMPT` tokens and those of the longest pass."""
        self._runner = runner
        self._counters = counters
        self._readers = [_Reader(text) for text in texts]

    def run(self, first: int, batch: int, tokens: int, right: Sequence[int] | None = None) -> PassReading:
        """Runs `tokens` tokens of `batch` texts from number `first` on, round and round, and reads on in them.

        More than one token is a verification of a chain, with n-grams looked up before. Its drafted tokens are right,
        or for each text so many of them as `right` says: then comes another token, and what is wrong is taken back.
        """
        count = len(self._readers)
        readers = [self._readers[(first + number) % count] for number in range(batch)]
        self._prompt([each for each in readers if each.cache is None or each.cache.tokens + tokens >= len(each.text)])
        before = self._counters.copy()
        started = time.perf_counter()
        if tokens > 1:
            for reader in readers:
                _draft(reader, tokens - 1)
        drafted = time.perf_counter()
        bases = [_cache_of(reader).tokens for reader in readers]
        kept = [tokens] * batch if right is None else [each + 1 for each in right]
        logits = self._runner.run([_work(reader, tokens, count) for reader, count in zip(readers, kept, strict=True)])
        ran = time.perf_counter()
        for reader, base, each, count in zip(readers, bases, logits, kept, strict=True):
            each.argmax(-1).tolist()
            if tokens > 1:
                _cache_of(reader).rollback(base, range(count))
        after, ended = self._counters, time.perf_counter()
        misses = after.misses - before.misses
        hits = after.hits - before.hits
        return PassReading(ran - drafted, hits + misses, misses, drafted - started if tokens > 1 else 0.0, ended - ran)

    def _prompt(self, readers: Sequence[_Reader]) -> None:
        for start in range(0, len(readers), TOGETHER):
            group = readers[start : start + TOGETHER]
            for reader in group:
                reader.cache = self._runner.start(len(reader.text))
                reader.drafter = NgramDrafter(NgramCalibration())
                reader.drafter.read(reader.text[:PROMPT])
            self._runner.run([PassInput(_cache_of(reader), reader.text[:PROMPT]) for reader in group])


def _cache_of(reader: _Reader) -> SequenceCache:
    assert reader.cache is not None, "its prompt was not run"
    return reader.cache


def _draft(reader: _Reader, nodes: int) -> None:
    """A look-up as before a verification: what is new is learnt, then a chain grows."""
    drafter, here = reader.drafter, _cache_of(reader).tokens
    assert drafter is not None
    drafter.extend(reader.text[len(drafter) : here + 1])
    drafter.grow(DraftTree(reader.text[here]), nodes, nodes, MIN_PROBABILITY, branching=False)


def _work(reader: _Reader, tokens: int, right: int) -> PassInput:
    """The next `right` tokens of the text, and then such as do not belong there, its first ones, up to `tokens`."""
    cache, text = _cache_of(reader), reader.text
    own = [*text[cache.tokens : cache.tokens + right], *text[: tokens - right]]
    if tokens == 1:
        return PassInput(cache, own)
    cache.mark()
    return PassInput(cache, own, every=True, verifies=True)


def task_texts(tokenizer: Any, count: int, length: int, vocabulary: int, seed: int = SEED) -> list[list[int]]:
    """`count` different texts of `length` token ids: conversations about the shipped model's tasks.

    Without a tokenizer they are random ids, and the routing that they cause is that of noise.
    """
    if tokenizer is None:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(vocabulary, (count, length), generator=draw).tolist()
    return [_conversation(tokenizer, seed + number, length) for number in range(count)]


def _conversation(tokenizer: Any, number: int, length: int) -> list[int]:
    """Items of all tasks in turns, beginning with another task for each number."""
    turns = [TASKS[(number + turn) % len(TASKS)].items(number, held_out=True) for turn in range(len(TASKS))]
    items: Iterator[Any] = chain.from_iterable(zip(*turns, strict=True))
    tokens: list[int] = []
    with quiet_transformers():
        while len(tokens) < length:
            item = next(items)
            if tokenizer.chat_template:
                said = [{"role": "user", "content": item.user}, {"role": "assistant", "content": item.reply}]
                tokens += tokenizer.apply_chat_template(said, return_dict=True)["input_ids"]
            else:
                tokens += tokenizer.encode(f"{item.user}\n{item.reply}\n")
    return tokens[:length]
