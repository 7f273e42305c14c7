"""Logits on their way through a request's processors: top-k keeps few, and the rest is done on these alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

BY_VALUE = (TopPLogitsWarper, MinPLogitsWarper)
"""Processors to which only the values matter that are not minus infinity, and their order."""
BLOCK = 128
"""Logits whose largest one is looked at first."""


class Kept(NamedTuple):
    """Logits that may be sampled: `scores`, float32 [tokens], of the tokens `ids`, ascending, or of all tokens."""

    scores: torch.Tensor
    ids: torch.Tensor | None = None

    @property
    def best(self) -> int:
        """The token of the largest score."""
        place = int(self.scores.argmax())
        return place if self.ids is None else int(self.ids[place])

    def spread(self, vocabulary: int) -> torch.Tensor:
        """The scores of all tokens, float32 [vocabulary]: minus infinity where there are none."""
        if self.ids is None:
            return self.scores
        return torch.full((vocabulary,), -torch.inf).index_copy_(0, self.ids, self.scores)


class LogitsSteps:
    """A request's processors. The result is theirs, without most of the work where one of them is top-k.

    Of tokens that are equally likely at the border of top-p, others may be kept: PyTorch's sort has no order for them.
    """

    def __init__(self, processors: LogitsProcessorList) -> None:
        self._all = processors
        self._first, self._top_k, self._last = LogitsProcessorList(), 0, LogitsProcessorList()
        for place, each in enumerate(processors):
            behind = processors[place + 1 :]
            if type(each) is TopKLogitsWarper and all(type(other) in BY_VALUE for other in behind):
                self._first = LogitsProcessorList(processors[:place])
                self._top_k, self._last = each.top_k, LogitsProcessorList(behind)

    def run(self, tokens: Sequence[int], logits: torch.Tensor) -> Kept:
        """What becomes of `logits`, float32 [vocabulary] on the CPU, after `tokens`. The logits are not changed."""
        if not self._all:
            return Kept(logits)
        ids = torch.tensor([tokens])
        if self._top_k:
            scores = _processed(self._first, ids, logits)
            kept = top_k(scores, self._top_k)
            # Nothing is left where a logit is not a number.
            if len(kept):
                return Kept(_processed(self._last, ids, scores[kept]), kept)
        return Kept(_processed(self._all, ids, logits))


def top_k(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The places of the `count` largest of `scores`, ascending, and of those that equal the last one.

    They lie in the blocks of the `count` largest maxima: nothing else is looked at twice. Empty where there is a NaN.
    """
    count = min(count, len(scores))
    blocks = scores[: len(scores) - len(scores) % BLOCK].view(-1, BLOCK)
    if len(blocks) <= count:
        return (scores >= scores.topk(count).values[-1]).nonzero()[:, 0]
    maxima = blocks.amax(-1)
    if maxima.isnan().any() or scores[blocks.numel() :].isnan().any():
        return torch.empty(0, dtype=torch.long)
    numbers = (maxima >= maxima.topk(count).values[-1]).nonzero()[:, 0]
    rest = torch.arange(blocks.numel(), len(scores))
    places = torch.cat([(numbers[:, None] * BLOCK + torch.arange(BLOCK)).flatten(), rest])
    found = scores[places]
    return places[found >= found.topk(count).values[-1]]


def _processed(processors: LogitsProcessorList, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return processors(ids, scores[None])[0] if processors else scores  # type: ignore[arg-type]
