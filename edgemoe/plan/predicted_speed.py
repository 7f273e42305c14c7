"""The speed that a profile of this machine predicts for a plan, as the plan shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PredictedSpeed:
    """Tokens a second of one sequence by a profile of this machine, or why that profile does not apply."""

    taken: str
    """The profile's day."""
    plain: float
    drafted: float
    """With `depth` tokens drafted for each verification, each accepted with probability `acceptance`."""
    depth: int
    acceptance: float
    refused: str
    """Why the profile that is kept is not used; empty where it is."""

    def line(self) -> tuple[str, str, str]:
        """A row for people: what, how much, and why."""
        if self.refused:
            return "predicted", "nothing", self.refused
        drafts = f"{self.drafted:.1f} with {self.depth} drafted of which {self.acceptance:.0%} are right"
        return "predicted", f"{self.plain:.1f} tokens/s", f"one sequence; {drafts}; from the profile of {self.taken}"
