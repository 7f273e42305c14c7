"""Hit rates of predictions, measured while running."""

from __future__ import annotations


class CalibratedRate:
    """A hit rate over tries, of which recent ones weigh more."""

    __slots__ = ("_keep", "hits", "tries")

    def __init__(self, keep: float) -> None:
        """`keep`, 0 to 1, is what each try leaves of the weight of earlier ones."""
        self._keep = keep
        self.hits = self.tries = 0.0

    def observe(self, hit: bool) -> None:
        """Adds one try."""
        self.hits = self.hits * self._keep + hit
        self.tries = self.tries * self._keep + 1

    def blended(self, prior: float, weight: float) -> float:
        """The posterior mean under a Beta prior with mean `prior` that counts as `weight` tries."""
        return (self.hits + weight * prior) / (self.tries + weight)


class CalibratedRates:
    """A hit rate for each bin of predictions.

    Bin i starts at `priors[i]`, which counts as `weight` tries. Of the tries, about the last `memory` count.
    """

    def __init__(self, priors: list[float], weight: float = 4.0, memory: float = 256.0) -> None:
        self._priors = priors
        self._weight = weight
        self._rates = [CalibratedRate(1 - 1 / memory) for _ in priors]

    def __len__(self) -> int:
        return len(self._priors)

    def rate(self, index: int) -> float:
        """The estimated probability that a prediction of bin `index` is right."""
        return self._rates[index].blended(self._priors[index], self._weight)

    def observe(self, index: int, hit: bool) -> None:
        """Adds one outcome of bin `index`."""
        self._rates[index].observe(hit)
