"""A k-nearest-neighbour memory of routing: finds past passes that routed like the current one, and what followed them.

Text repeats itself, and routing follows the text. The experts of the last few layers identify a position in the text
without its tokens. So the memory stores the experts that each layer used in the last passes, compares those passes with
the current one, and recalls how soon each expert was used after the most similar ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.cache.compiled import compiled

CAPACITY = 1024
"""Passes stored. Twice as many add little; half as many lose some phrases of a mixed text."""
NEIGHBOURS = 16
"""Passes recalled at a time. Values from 4 to 64 hardly differ, since neighbours are weighted by similarity."""
LAYER_DECAY = 0.7
"""Decay of the similarity per layer: the last three layers or so determine it."""
SHARPNESS = 6
"""Exponent of the similarity in a neighbour's weight: half the similarity has 1/64 of the weight."""
HORIZON = 31
"""Distance in passes beyond which a next use is ignored. The discount there is almost 0."""


class RoutingHistory:
    """The memory of a model whose layer `layer` has `experts[layer]` experts.

    A pass goes through the layers in order and may skip some. The memory takes about 2 KiB per expert. All work is done
    in the calling thread.
    """

    def __init__(self, experts: Sequence[int], capacity: int = CAPACITY) -> None:
        layers, widest = len(experts), max(experts)
        self._used = np.zeros((layers, widest, capacity), np.uint8)
        self._next_use = np.zeros((layers, widest, capacity), np.uint8)
        """Passes until the expert's next use; 0 where it is unknown or beyond the horizon."""
        self._scales = np.zeros((layers, capacity), np.float32)
        """1 / sqrt(number of experts used)."""
        self._similarity = np.zeros(capacity, np.float32)
        self._last_use = np.full((layers, widest), -1, np.int64)
        self._last_pass = np.full(layers, -1, np.int64)
        self._discounts = np.zeros(HORIZON + 1, np.float32)
        self._pass = -1

    def begin_pass(self, discount: float) -> None:
        """Begins a pass. Until the next one, a use n passes ahead counts `discount ** (n - 1)`."""
        self._pass += 1
        self._discounts[1:] = discount ** np.arange(HORIZON)
        # The successor of a pass that resembles the previous pass resembles this one.
        oldest = self._similarity[-1]
        self._similarity[1:] = self._similarity[:-1]
        self._similarity[0] = oldest

    def observe(self, layer: int, numbers: NDArray[np.int64], recalled: NDArray[np.float32]) -> float:
        """Stores that the current pass uses experts `numbers`, int64 [n], of `layer`, and recalls what may follow.

        Overwrites `recalled`, float32 [maximum number of experts per layer], with the sum over the neighbours of their
        weight times each expert's discounted next use. Returns the sum of the weights.
        """
        current = self._pass
        _store(current, numbers, layer, self._used, self._next_use, self._scales, self._last_use, self._last_pass)
        _update_similarity(current, numbers, self._used[layer], self._scales[layer], self._similarity)
        known = min(current + 1, len(self._similarity))
        return float(_recall(known, self._next_use[layer], self._similarity, self._discounts, recalled))


_options: dict[str, Any] = {"boundscheck": False, "error_model": "numpy"}


@compiled(**_options)
def _store(current, numbers, layer, used, next_use, scales, last_use, last_pass):  # type: ignore[no-untyped-def]
    """Stores the experts of pass `current`, and updates the next uses of the passes before it."""
    experts, capacity = used.shape[1:]
    # Passes that skipped the layer must not keep the entries of older passes in the ring.
    for other in range(max(last_pass[layer] + 1, current - capacity + 1), current + 1):
        for number in range(experts):
            used[layer, number, other % capacity] = 0
            next_use[layer, number, other % capacity] = 0
    last_pass[layer] = current
    scales[layer, current % capacity] = np.float32(1) / np.sqrt(np.float32(max(1, len(numbers))))
    for number in numbers:
        used[layer, number, current % capacity] = 1
        # For passes before the expert's last use, that one is the next use.
        for other in range(max(last_use[layer, number], current - min(HORIZON, capacity - 1), 0), current):
            next_use[layer, number, other % capacity] = current - other
        last_use[layer, number] = current


@compiled(**_options)
def _update_similarity(current, numbers, used, scales, similarity):  # type: ignore[no-untyped-def]
    """Updates `similarity`, [capacity]: the cosine between each pass's experts and `numbers`, decayed over layers."""
    capacity = similarity.shape[0]
    here = current % capacity
    common = np.zeros(capacity, np.uint16)
    for number in numbers:
        common += used[number]
    scale = scales[here] * np.float32(1 - LAYER_DECAY)
    for other in range(capacity):
        cosine = np.float32(common[other]) * scales[other] * scale
        similarity[other] = np.float32(LAYER_DECAY) * similarity[other] + cosine
    similarity[here] = 0


@compiled(**_options)
def _recall(known, next_use, similarity, discounts, recalled):  # type: ignore[no-untyped-def]
    """Overwrites `recalled` with the weighted discounts of the nearest of `known` passes; returns the total weight."""
    count = min(NEIGHBOURS, known)
    nearest = np.empty(count, np.int64)
    for other in range(known):
        # Insertion into the sorted list of the nearest; few passes get into it.
        at = min(other, count)
        if at == count and similarity[other] <= similarity[nearest[count - 1]]:
            continue
        at = min(at, count - 1)
        while at > 0 and similarity[nearest[at - 1]] < similarity[other]:
            nearest[at] = nearest[at - 1]
            at -= 1
        nearest[at] = other
    recalled[:] = 0
    total = np.float32(0)
    for other in nearest:
        weight = similarity[other] ** SHARPNESS
        total += weight
        for number in range(recalled.shape[0]):
            recalled[number] += weight * discounts[next_use[number, other]]
    return total
