"""How often what was foretold came true, learnt while running."""

from __future__ import annotations


class HitRates:
    """A rate for each bin of foretellings, from outcomes of which old ones fade.

    A rate starts at the bin's `prior`, which counts as `weight` outcomes; of the others the last `memory` or so count.
    """

    def __init__(self, priors: list[float], weight: float = 4.0, memory: float = 256.0) -> None:
        self._priors = priors
        self._weight = weight
        self._fade = 1 - 1 / memory
        self._right = [0.0] * len(priors)
        self._all = [0.0] * len(priors)

    def __len__(self) -> int:
        return len(self._priors)

    def rate(self, number: int) -> float:
        """The share of bin `number`'s foretellings that come true."""
        right = self._right[number] + self._weight * self._priors[number]
        return right / (self._all[number] + self._weight)

    def saw(self, number: int, came_true: bool) -> None:
        """One more outcome of bin `number`."""
        self._right[number] = self._right[number] * self._fade + came_true
        self._all[number] = self._all[number] * self._fade + 1
