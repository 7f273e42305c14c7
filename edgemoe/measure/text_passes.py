"""Timed passes of any shape over given texts."""

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
from edgemoe.draft.proposer import MIN_PROBABILITY
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.pass_logits import LogitsRows
from edgemoe.model.sequential_runner import PassInput
from edgemoe.quiet import quiet_transformers

PROMPT = 48
"""Tokens of a text that are run as its prompt: a shorter context would make attention cheaper than in a real run."""
PROMPT_BATCH = 16
"""Prompts per pass."""
SEED = 5
"""Default seed of the texts."""


class PassReading(NamedTuple):
    """The times and counts of one pass. Experts and misses are those of all layers."""

    seconds: float
    experts: int
    misses: int
    draft_seconds: float
    reject_seconds: float


@dataclass
class _Reader:
    """One text, and the KV cache and the drafter of what was read of it."""

    text: Sequence[int]
    cache: SequenceCache | None = None
    drafter: NgramDrafter | None = None


class TextPasses:
    """Passes of one model over several texts; a text that ends begins again. Not thread-safe."""

    def __init__(self, runner: ModelRunner, counters: CacheCounters, texts: Sequence[Sequence[int]]) -> None:
        """Each of `texts`, token ids, must be longer than `PROMPT` and the longest pass together."""
        self._runner = runner
        self._counters = counters
        self._readers = [_Reader(text) for text in texts]

    def run(self, first: int, batch: int, tokens: int, right: Sequence[int] | None = None) -> PassReading:
        """Runs the next `tokens` tokens of each of `batch` texts, from text number `first` on, cyclically.

        More than one token is the verification of a chain, after a look-up by the n-gram drafter. All drafted tokens
        are those of the text, and so right. With `right`, only that many are right in each text: the others are
        replaced by wrong tokens, which are rolled back.
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
        work = [_work(reader, tokens, count) for reader, count in zip(readers, kept, strict=True)]
        logits = self._runner.run_sampled(work)
        ran = time.perf_counter()
        for reader, base, each, count in zip(readers, bases, logits, kept, strict=True):
            _sample(each)
            if tokens > 1:
                _cache_of(reader).rollback(base, range(count))
        after, ended = self._counters, time.perf_counter()
        misses = after.misses - before.misses
        hits = after.hits - before.hits
        return PassReading(ran - drafted, hits + misses, misses, drafted - started if tokens > 1 else 0.0, ended - ran)

    def _prompt(self, readers: Sequence[_Reader]) -> None:
        for start in range(0, len(readers), PROMPT_BATCH):
            group = readers[start : start + PROMPT_BATCH]
            for reader in group:
                reader.cache = self._runner.start(len(reader.text))
                reader.drafter = NgramDrafter(NgramCalibration())
                reader.drafter.read(reader.text[:PROMPT])
            self._runner.run([PassInput(_cache_of(reader), reader.text[:PROMPT]) for reader in group])


def _cache_of(reader: _Reader) -> SequenceCache:
    assert reader.cache is not None, "its prompt was not run"
    return reader.cache


def _sample(rows: LogitsRows) -> list[int]:
    """The likeliest token after each row: what a greedy request would get."""
    return rows.argmax(-1).tolist() if isinstance(rows, torch.Tensor) else [row.argmax for row in rows]


def _draft(reader: _Reader, nodes: int) -> None:
    """Drafts as before a verification: the drafter learns the new tokens, then grows a chain of `nodes` tokens."""
    drafter, here = reader.drafter, _cache_of(reader).tokens
    assert drafter is not None
    drafter.extend(reader.text[len(drafter) : here + 1])
    drafter.grow(DraftTree(reader.text[here]), nodes, nodes, MIN_PROBABILITY, branching=False)


def _work(reader: _Reader, tokens: int, right: int) -> PassInput:
    """A pass over `tokens` tokens: the next `right` of the text, then wrong ones, taken from the text's start."""
    cache, text = _cache_of(reader), reader.text
    own = [*text[cache.tokens : cache.tokens + right], *text[: tokens - right]]
    if tokens == 1:
        return PassInput(cache, own)
    cache.mark()
    return PassInput(cache, own, every=True, verifies=True)


def task_texts(tokenizer: Any, count: int, length: int, vocabulary: int, seed: int = SEED) -> list[list[int]]:
    """`count` distinct texts of `length` token ids: conversations about the shipped model's tasks.

    Without a tokenizer they are random ids below `vocabulary`, whose routing is that of noise.
    """
    if tokenizer is None:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(vocabulary, (count, length), generator=draw).tolist()
    return [_conversation(tokenizer, seed + number, length) for number in range(count)]


def _conversation(tokenizer: Any, number: int, length: int) -> list[int]:
    """Token ids of held-out items of all tasks in turn, from task number `number` on."""
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
