"""What models are measured on: pieces of text whose beginning is the prompt and whose rest they predict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

from edgemoe.demo.tasks import HELD_OUT_SEED, TASKS

LENGTH = 512
"""Tokens of a passage at most, and of the context: a longer text is cut into several."""
PROMPT = 64
"""Those of them that are its prompt: the tokens before what is measured, so that nothing is predicted from nothing."""


class EvalText(NamedTuple):
    """Token ids, of which the first `prompt` are run as a prompt is; at least two follow."""

    tokens: Sequence[int]
    prompt: int

    @property
    def predicted(self) -> int:
        """Tokens that are predicted. The first after the prompt is not: prompts are computed exactly in any case."""
        return len(self.tokens) - self.prompt - 1


def built_in_texts() -> list[str]:
    """Prose, dialogue, code and numbers in English, about 2 KB each, in the order of their files' names."""
    folder = Path(__file__).parent / "texts"
    return [file.read_text("utf-8") for file in sorted(folder.glob("*.txt"))]


def cut(texts: Iterable[Sequence[int]], context: int, first: int | None = None) -> list[EvalText]:
    """Passages of at most `LENGTH` tokens and of the `context`, the texts in turn.

    Each begins with the last tokens of the one before, as its prompt. `first` is the token that a model wants in front
    of every text (its `bos_token_id`): where a text has it, all of its passages do. Texts of fewer than three
    tokens give none.
    """
    pieces = [list(_pieces(list(text), min(LENGTH, context), first)) for text in texts]
    return [eval_text for turn in zip_longest(*pieces) for eval_text in turn if eval_text is not None]


def _pieces(tokens: list[int], length: int, first: int | None) -> Iterator[EvalText]:
    front = tokens[:1] if first is not None and tokens[:1] == [first] else []
    body = tokens[len(front) :]
    length -= len(front)
    if length < 3:
        return
    prompt = min(PROMPT, max(length // 4, 1), max(len(body) // 4, 1))
    for start in range(0, len(body) - prompt - 1, length - prompt):
        yield EvalText([*front, *body[start : start + length]], len(front) + prompt)


def limited(eval_texts: Iterable[EvalText], most: int) -> list[EvalText]:
    """The first passages up to `most` predicted tokens, the last one cut to that."""
    kept: list[EvalText] = []
    for eval_text in eval_texts:
        room = most - sum(each.predicted for each in kept)
        if room < 1:
            break
        kept.append(EvalText(eval_text.tokens[: eval_text.prompt + 1 + room], eval_text.prompt))
    return kept


def conversations(
    prompt: Callable[[str], Sequence[int]], reply: Callable[[str], Sequence[int]], most: int
) -> list[EvalText]:
    """Held-out questions of the shipped model's tasks with their right replies, the tasks in turn.

    `prompt` gives the ids of a question up to where the reply begins, `reply` those of a reply with its end. Up to
    `most` predicted tokens.
    """
    items = [task.items(HELD_OUT_SEED, held_out=True) for task in TASKS]

    def written() -> Iterator[EvalText]:
        seen = set()
        for source in cycle(items):
            # Some tasks have few different questions.
            item = next((item for item in islice(source, len(TASKS)) if item.user not in seen), None)
            if item is not None:
                seen.add(item.user)
                asked = prompt(item.user)
                yield EvalText([*asked, *reply(item.reply)], len(asked))

    return limited((eval_text for eval_text in written() if eval_text.predicted > 0), most)
