"""The speed that a profile of this machine predicts for a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PredictedSpeed:
    """Predicted tokens per second of one sequence, or the reason why the profile does not apply."""

    taken: str
    """The day of the profile, as 2026-01-31; empty where it does not apply."""
    plain: float
    """Tokens per second without drafts."""
    drafted: float
    """Tokens per second with `depth` drafted tokens per verification, each accepted with probability `acceptance`."""
    depth: int
    acceptance: float
    refused: str
    """Why the profile does not apply; empty where it does."""

    def line(self) -> tuple[str, str, str]:
        """A row for people: name, amount, and why."""
        if self.refused:
            return "predicted", "nothing", self.refused
        drafts = f"{self.drafted:.1f} with {self.depth} drafted tokens at {self.acceptance:.0%} acceptance"
        return "predicted", f"{self.plain:.1f} tokens/s", f"one sequence; {drafts}; from the profile of {self.taken}"
