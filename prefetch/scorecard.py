"""How accurate a predictor of experts is: totals, and a calibrated hit rate for each bin of its predictions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edgemoe.prefetch.calibration import CalibratedRates

MIN_RATE = 0.25
"""Hit rate of a bin from which its predictions count in the totals. Those of other bins only update the hit rate."""


@dataclass
class PredictionTotals:
    """Totals of a predictor since the engine was loaded; experts count once per pass."""

    missing: int = 0
    """Requested experts that were not resident at the time of the prediction."""
    right: int = 0
    """Those of them that were predicted."""
    wrong: int = 0
    """Predicted experts that were neither resident nor requested."""
    bytes_useful: int = 0
    """Bytes of prefetches that arrived before the request of the predicted pass."""
    bytes_late: int = 0
    """Bytes of prefetches that were still in flight at that request."""
    bytes_wasted: int = 0
    """Bytes of prefetches that the predicted pass did not request, or that were evicted before."""

    @property
    def recall(self) -> float:
        """Fraction of the missing experts that was predicted; 0 without any."""
        return self.right / max(1, self.missing)

    @property
    def precision(self) -> float:
        """Fraction of the predicted experts, without resident ones, that was requested; 0 without any."""
        return self.right / max(1, self.right + self.wrong)

    def telemetry(self, name: str) -> dict[str, Any]:
        """The fields of `Stats` for the predictor called `name`, by field name."""
        return {
            f"{name}_recall": self.recall,
            f"{name}_precision": self.precision,
            f"{name}_bytes_useful": self.bytes_useful,
            f"{name}_bytes_late": self.bytes_late,
            f"{name}_bytes_wasted": self.bytes_wasted,
        }


class Scorecard:
    """The totals of one predictor, and the hit rate of each bin of its predictions.

    Predictions are scored in every pass, whether they led to loads or not. So a predictor that was too inaccurate for
    loads resumes once it is accurate again.
    """

    def __init__(self, bins: int, prior: float, *, weight: float = 8.0, memory: float = 512.0) -> None:
        """Each bin starts at hit rate `prior`, which counts as `weight` outcomes; about the last `memory` count."""
        self.totals = PredictionTotals()
        self._rates = CalibratedRates([prior] * bins, weight, memory)

    def rate(self, index: int) -> float:
        """The estimated probability that a prediction of bin `index` is right."""
        return self._rates.rate(index)

    def score(self, bins: Mapping[int, int], requested: Collection[int], resident: Collection[int]) -> None:
        """Scores a prediction for one layer against the experts `requested` by a pass.

        `bins` gives the bin of each predicted expert. `resident` were resident at the time of the prediction, and are
        ignored.
        """
        predicted = {expert for expert, index in bins.items() if self.rate(index) >= MIN_RATE}
        for expert, index in bins.items():
            if expert in resident:
                continue
            hit = expert in requested
            self._rates.observe(index, hit)
            self.totals.right += hit and expert in predicted
            self.totals.wrong += not hit and expert in predicted
        self.totals.missing += sum(expert not in resident for expert in requested)
