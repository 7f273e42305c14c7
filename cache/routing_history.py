"""Moments of routing and what followed them: which experts come next, told by the times it looked like now.

Routing follows the text, and text repeats itself: phrases, forms, a topic's words. The experts that the last few
layers asked for say where in the text a pass is without anybody knowing its tokens. So the memory keeps what each
layer asked for at each of the last moments, compares all of them with now, and recalls how soon each expert was
wanted after those that resemble it most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

KEPT = 1024
"""Moments remembered; twice as many add little, half as many lose some of a mixed file's phrases."""
NEAREST = 16
"""Moments recalled at a time. From 4 to 64 it hardly matters: their likeness weighs them."""
FADE = 0.7
"""What is left of a layer's likeness one layer later. A moment is told by the last three or so layers."""
SHARPNESS = 6
"""Power of the likeness that weighs a moment: one half as like counts a sixty-fourth."""
REACH = 31
"""Moments after which a next use counts as none; its discount is next to nothing then."""


class RoutingHistory:
    """The memory of a model with `experts[layer]` experts. A moment is one pass through the layers, in order.

    About 2 KiB an expert. The kernels run in the calling thread.
    """

    def __init__(self, experts: Sequence[int], kept: int = KEPT) -> None:
        layers, most = len(experts), max(experts)
        self._had = np.zeros((layers, most, kept), np.uint8)
        self._until = np.zeros((layers, most, kept), np.uint8)
        """Moments from each until the expert's next use; 0 where that is not known or beyond reach."""
        self._sizes = np.zeros((layers, kept), np.float32)
        """1 / sqrt(experts asked for)."""
        self._alike = np.zeros(kept, np.float32)
        self._last_use = np.full((layers, most), -1, np.int64)
        self._last_pass = np.full(layers, -1, np.int64)
        self._worth = np.zeros(REACH + 1, np.float32)
        self._now = -1

    def begin(self, discount: float) -> None:
        """The next moment begins. In it an expert wanted n moments later counts `discount ** (n - 1)`."""
        self._now += 1
        self._worth[1:] = discount ** np.arange(REACH)
        # What was like the last moment makes its successor like this one.
        oldest = self._alike[-1]
        self._alike[1:] = self._alike[:-1]
        self._alike[0] = oldest

    def follow(self, layer: int, wanted: NDArray[np.int64], soon: NDArray[np.float32]) -> float:
        """In this moment a pass asks for `wanted`, int64 [experts], of `layer`. Returns how much it reminds of.

        `soon`, float32 [most experts of any layer], is overwritten with the sum over the moments recalled of their
        weight times how soon they were followed by each expert; the sum of the weights is returned.
        """
        now = self._now
        _note(now, wanted, layer, self._had, self._until, self._sizes, self._last_use, self._last_pass)
        _compare(now, wanted, self._had[layer], self._sizes[layer], self._alike)
        return float(_recall(min(now + 1, len(self._alike)), self._until[layer], self._alike, self._worth, soon))


_options: dict[str, Any] = {"cache": True, "boundscheck": False, "error_model": "numpy"}


@njit(**_options)
def _note(now, wanted, layer, had, until, sizes, last_use, last_pass):  # type: ignore[no-untyped-def]
    """Writes a pass down as moment `now`, and into the moments before it how long they had to wait for it."""
    experts, kept = had.shape[1:]
    # A layer that some passes leave out must not keep what was in the places of those moments before.
    for moment in range(max(last_pass[layer] + 1, now - kept + 1), now + 1):
        for expert in range(experts):
            had[layer, expert, moment % kept] = 0
            until[layer, expert, moment % kept] = 0
    last_pass[layer] = now
    sizes[layer, now % kept] = np.float32(1) / np.sqrt(np.float32(max(1, len(wanted))))
    for expert in wanted:
        had[layer, expert, now % kept] = 1
        # Those before its last use wait for that one.
        for moment in range(max(last_use[layer, expert], now - min(REACH, kept - 1), 0), now):
            until[layer, expert, moment % kept] = now - moment
        last_use[layer, expert] = now


@njit(**_options)
def _compare(now, wanted, had, sizes, alike):  # type: ignore[no-untyped-def]
    """Updates `alike`: the cosine of what was asked for now and at each moment, faded over the layers."""
    kept = alike.shape[0]
    here = now % kept
    same = np.zeros(kept, np.uint16)
    for expert in wanted:
        same += had[expert]
    size = sizes[here] * np.float32(1 - FADE)
    for moment in range(kept):
        alike[moment] = np.float32(FADE) * alike[moment] + np.float32(same[moment]) * sizes[moment] * size
    alike[here] = 0


@njit(**_options)
def _recall(known, until, alike, worth, soon):  # type: ignore[no-untyped-def]
    """Overwrites `soon` with the weighted worths of the nearest of `known` moments; returns the sum of the weights."""
    count = min(NEAREST, known)
    nearest = np.empty(count, np.int64)
    for moment in range(known):
        # An insertion into the few that lead, which hardly any moment gets into.
        at = min(moment, count)
        if at == count and alike[moment] <= alike[nearest[count - 1]]:
            continue
        at = min(at, count - 1)
        while at > 0 and alike[nearest[at - 1]] < alike[moment]:
            nearest[at] = nearest[at - 1]
            at -= 1
        nearest[at] = moment
    soon[:] = 0
    total = np.float32(0)
    for moment in nearest:
        weight = alike[moment] ** SHARPNESS
        total += weight
        for expert in range(soon.shape[0]):
            soon[expert] += weight * worth[until[expert, moment]]
    return total
