"""The texts of an evaluation, each a prompt and the tokens after it, which the model predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

from edgemoe.demo.tasks import HELD_OUT_SEED, TASKS

MAX_LENGTH = 512
"""Maximum number of tokens of an eval text; a longer text is split into several."""
PROMPT = 64
"""Tokens of the prompt of a full-length eval text, so that every prediction has a context."""


class EvalText(NamedTuple):
    """Token ids, of which the first `prompt` are the prompt; at least two follow."""

    tokens: Sequence[int]
    prompt: int

    @property
    def predicted(self) -> int:
        """Tokens that are predicted: all after the prompt but the first, since prompts are always computed exactly."""
        return len(self.tokens) - self.prompt - 1


def built_in_texts() -> list[str]:
    """The built-in texts: English prose, dialogue, code and numbers, about 2 KB each, sorted by file name."""
    folder = Path(__file__).parent / "texts"
    return [file.read_text("utf-8") for file in sorted(folder.glob("*.txt"))]


def split_texts(texts: Iterable[Sequence[int]], context: int, bos: int | None = None) -> list[EvalText]:
    """Splits tokenized texts into eval texts of at most `MAX_LENGTH` and `context` tokens, with the texts in turn.

    The prompt of each is the last tokens of the one before. `bos` is the id of the beginning-of-sequence token, or
    None: where a text begins with it, so does each of its parts. Texts of fewer than three tokens are dropped.
    """
    pieces = [list(_pieces(list(text), min(MAX_LENGTH, context), bos)) for text in texts]
    return [eval_text for turn in zip_longest(*pieces) for eval_text in turn if eval_text is not None]


def _pieces(tokens: list[int], length: int, bos: int | None) -> Iterator[EvalText]:
    front = tokens[:1] if bos is not None and tokens[:1] == [bos] else []
    body = tokens[len(front) :]
    length -= len(front)
    if length < 3:
        return
    prompt = min(PROMPT, max(length // 4, 1), max(len(body) // 4, 1))
    for start in range(0, len(body) - prompt - 1, length - prompt):
        yield EvalText([*front, *body[start : start + length]], len(front) + prompt)


def limited(eval_texts: Iterable[EvalText], max_predicted: int) -> list[EvalText]:
    """The first eval texts with `max_predicted` predicted tokens in all; the last one is shortened to fit."""
    kept: list[EvalText] = []
    for eval_text in eval_texts:
        room = max_predicted - sum(each.predicted for each in kept)
        if room < 1:
            break
        kept.append(EvalText(eval_text.tokens[: eval_text.prompt + 1 + room], eval_text.prompt))
    return kept


def conversations(
    prompt: Callable[[str], Sequence[int]], reply: Callable[[str], Sequence[int]], max_predicted: int
) -> list[EvalText]:
    """Held-out questions of the shipped model's tasks with their right replies, the tasks in turn.

    `prompt` returns the token ids of a question up to where the reply begins, `reply` those of a reply with its end.
    There are at most `max_predicted` predicted tokens in all.
    """
    items = [task.items(HELD_OUT_SEED, held_out=True) for task in TASKS]

    def written() -> Iterator[EvalText]:
        seen = set()
        for source in cycle(items):
            # Some tasks have few distinct questions.
            item = next((item for item in islice(source, len(TASKS)) if item.user not in seen), None)
            if item is not None:
                seen.add(item.user)
                asked = prompt(item.user)
                yield EvalText([*asked, *reply(item.reply)], len(asked))

    return limited((eval_text for eval_text in written() if eval_text.predicted > 0), max_predicted)
