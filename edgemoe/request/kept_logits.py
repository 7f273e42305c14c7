"""Logits on their way through a request's processors: top-k keeps few, and the rest is done on these alone."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edgemoe.model.pass_logits import DeviceRow, LogitsRow, on_host
from edgemoe.request.sparse_processors import in_place

BY_VALUE = (TopPLogitsWarper, MinPLogitsWarper)
"""Processors to which only the values matter that are not minus infinity, and their order."""
BLOCK = 128
"""Logits whose largest one is looked at first."""


class Kept(NamedTuple):
    """Logits that may be sampled: `scores`, float32 [tokens], of the tokens `ids`, ascending, or of all tokens."""

    scores: torch.Tensor
    ids: torch.Tensor | None = None

    def token(self, place: int) -> int:
        """The token that the score number `place` belongs to."""
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

    def __init__(self, processors: LogitsProcessorList, *, greedy: bool = False) -> None:
        """With `greedy` only the largest of what is kept matters, and the first of equal ones."""
        self._all = processors
        self._top_k = 0
        self._first, self._last = LogitsProcessorList(), LogitsProcessorList()
        for place, each in enumerate(processors):
            behind = processors[place + 1 :]
            if type(each) is TopKLogitsWarper and all(type(other) in BY_VALUE for other in behind):
                # The order stays the same when all are divided by the temperature.
                first = place - (place > 0 and type(processors[place - 1]) is TemperatureLogitsWarper)
                self._first = LogitsProcessorList(processors[:first])
                self._top_k, self._last = each.top_k, LogitsProcessorList([*processors[first:place], *behind])
        self._in_place = [in_place(each) for each in self._first]
        self._best = 1 if greedy and not processors else 0 if self._first else self._top_k
        """The number of largest logits that are enough; 0 where all are needed."""

    def run(self, tokens: Sequence[int], logits: LogitsRow, allowed: torch.Tensor | None = None) -> Kept:
        """What becomes of `logits` after `tokens`. The logits are not changed.

        Where the largest are enough, no others are read from a device. With `allowed`, bool [vocabulary], the logits
        of all other tokens are minus infinity, before the processors and after them; where these would leave nothing,
        they do nothing.
        """
        if allowed is not None:
            masked = on_host(logits).masked_fill(~allowed, -torch.inf)
            found = self.run(tokens, masked)
            # Some give an end token a score of their own.
            own = found.scores.masked_fill(~(allowed if found.ids is None else allowed[found.ids]), -torch.inf)
            return Kept(own, found.ids) if bool((own > -torch.inf).any()) else Kept(masked)
        if not self._all and isinstance(logits, torch.Tensor):
            return Kept(logits)
        text = torch.frombuffer(array("q", tokens), dtype=torch.int64) if tokens else torch.empty(0, dtype=torch.int64)
        largest = logits.largest(self._best) if self._best and isinstance(logits, DeviceRow) else None
        if largest is not None:
            return self._kept(text, *largest)
        whole = on_host(logits)
        if self._top_k:
            scores = self._changed(text, whole)
            kept = top_k(scores, self._top_k)
            # Nothing is left where a logit is not a number.
            if len(kept):
                return self._kept(text, scores[kept], kept)
        return Kept(_processed(self._all, text, whole))

    def _kept(self, text: torch.Tensor, few: torch.Tensor, ids: torch.Tensor) -> Kept:
        """What the processors from top-k on leave of `few`, float32 [kept], those of `ids` that top-k keeps."""
        few = few[None]
        # One by one: transformers' list looks at the signature of each in every call.
        for each in self._last:
            few = each(text[None], few)
        return Kept(few[0], ids)

    def _changed(self, text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """`logits` after the processors before top-k and the temperature."""
        if not self._first or not all(self._in_place):
            return _processed(self._first, text, logits)
        scores = logits.clone()
        for change in self._in_place:
            assert change is not None
            change(text, scores)
        return scores


def top_k(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The places of the `count` largest of `scores`, ascending, and of those that equal the last one.

    They lie in the blocks of the `count` largest maxima: nothing else is looked at twice. Empty where there is a NaN.
    """
    count, values = min(count, len(scores)), scores.numpy()
    blocks = len(values) // BLOCK
    if blocks <= count:
        return (scores >= scores.topk(count).values[-1]).nonzero()[:, 0]
    maxima = scores[: blocks * BLOCK].view(-1, BLOCK).amax(-1).numpy()
    # A NaN is the largest of all, for numpy, and equal to none.
    numbers = np.flatnonzero(maxima >= np.partition(maxima, -count)[-count])
    places = np.concatenate(
        [(numbers[:, None] * BLOCK + np.arange(BLOCK)).ravel(), np.arange(blocks * BLOCK, len(values))]
    )
    found = values[places]
    if np.isnan(maxima).any() or np.isnan(found).any():
        return torch.empty(0, dtype=torch.long)
    return torch.from_numpy(places[found >= np.partition(found, -count)[-count]])


def _processed(processors: LogitsProcessorList, text: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return processors(text[None], scores[None])[0] if processors else scores  # type: ignore[arg-type]
