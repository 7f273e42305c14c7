"""How often what was foretold came true, learnt while running."""

from __future__ import annotations


class CalibratedRate:
    """Hits out of tries, of which the latest count most."""

    __slots__ = ("_keep", "hits", "tries")

    def __init__(self, keep: float) -> None:
        """With each try those before it count for the share `keep` of what they did."""
        self._keep = keep
        self.hits = self.tries = 0.0

    def observe(self, hit: bool) -> None:
        """Counts one try."""
        self.hits = self.hits * self._keep + hit
        self.tries = self.tries * self._keep + 1

    def blended(self, prior: float, weight: float) -> float:
        """The mean of the Beta distribution that `prior`, worth `weight` tries, becomes by these."""
        return (self.hits + weight * prior) / (self.tries + weight)


class CalibratedRates:
    """A rate for each bin of foretellings, from outcomes of which old ones fade.

    A rate starts at the bin's `prior`, which counts as `weight` outcomes; of the others the last `memory` or so count.
    """

    def __init__(self, priors: list[float], weight: float = 4.0, memory: float = 256.0) -> None:
        self._priors = priors
        self._weight = weight
        self._seen = [CalibratedRate(1 - 1 / memory) for _ in priors]

    def __len__(self) -> int:
        return len(self._priors)

    def rate(self, number: int) -> float:
        """The share of bin `number`'s foretellings that come true."""
        return self._seen[number].blended(self._priors[number], self._weight)

    def saw(self, number: int, came_true: bool) -> None:
        """One more outcome of bin `number`."""
        self._seen[number].observe(came_true)
