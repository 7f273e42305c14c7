"""What a predictor foretold against what was asked for: how often each kind of foretelling comes true."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

LIKELY = 0.25
"""Rate from which a foretelling counts as naming an expert; below it is noise that only feeds the rates."""


@dataclass
class PredictionTotals:
    """A predictor's record since the engine was loaded, in experts of passes."""

    wanted: int = 0
    """Experts asked for that were not resident when the prediction was made."""
    named: int = 0
    """Those of them that it had named."""
    right: int = 0
    """Named experts that were not resident and were asked for: the same, seen from the prediction."""
    wrong: int = 0
    """Named experts that were not resident and were not asked for."""
    bytes_useful: int = 0
    """Bytes brought for it that were there when the pass that it spoke of asked for them."""
    bytes_late: int = 0
    """Those that were still on their way."""
    bytes_wasted: int = 0
    """Those that this pass did not ask for, or that had to go before."""

    @property
    def recall(self) -> float:
        """Share of what was missing that was foretold."""
        return self.named / max(1, self.wanted)

    @property
    def precision(self) -> float:
        """Share of what was foretold as missing that was asked for."""
        return self.right / max(1, self.right + self.wrong)

    def telemetry(self, name: str) -> dict[str, Any]:
        """What `Stats` tells of the predictor called `name`, by name."""
        return {
            f"{name}_recall": self.recall,
            f"{name}_precision": self.precision,
            f"{name}_bytes_useful": self.bytes_useful,
            f"{name}_bytes_late": self.bytes_late,
            f"{name}_bytes_wasted": self.bytes_wasted,
        }


class Scorecard:
    """How often the foretellings of each bin come true, from outcomes of which old ones fade.

    Outcomes come from every pass, whether anything was loaded or not, so that a predictor that was silenced for
    being wrong is heard again when it is right.
    """

    def __init__(self, bins: int, prior: float, *, weight: float = 8.0, memory: float = 512.0) -> None:
        """Every bin starts at the rate `prior`, which counts as `weight` outcomes of some `memory`."""
        self.totals = PredictionTotals()
        self._prior = prior
        self._weight = weight
        self._fade = 1 - 1 / memory
        self._right = [0.0] * bins
        self._seen = [0.0] * bins

    def rate(self, number: int) -> float:
        """How likely a foretelling of bin `number` is to come true."""
        return (self._right[number] + self._weight * self._prior) / (self._seen[number] + self._weight)

    def settle(self, foretold: Mapping[int, int], wanted: Collection[int], resident: Collection[int]) -> None:
        """A layer was reached: `foretold` are its experts and their bins, `resident` what was there already then."""
        named = {expert for expert, number in foretold.items() if self.rate(number) >= LIKELY}
        for expert, number in foretold.items():
            if expert in resident:
                continue
            came_true = expert in wanted
            self._right[number] = self._right[number] * self._fade + came_true
            self._seen[number] = self._seen[number] * self._fade + 1
            self.totals.right += came_true and expert in named
            self.totals.wrong += not came_true and expert in named
        missing = [expert for expert in wanted if expert not in resident]
        self.totals.wanted += len(missing)
        self.totals.named += sum(expert in named for expert in missing)
