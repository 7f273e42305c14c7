"""What a profile of this machine says of a plan, before anything is loaded: tokens a second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe import moesd
from edgemoe.performance_model import PerformanceModel
from edgemoe.profile_conditions import ProfileConditions
from edgemoe.profile_file import ForeignProfile, read

if TYPE_CHECKING:
    from edgemoe.plan import Plan
    from edgemoe.state_folder import StateFolder

ACCEPTANCE = 0.7
"""Probability that a drafted token is accepted: an assumption, since only the text decides it."""
DEPTHS = range(1, 9)
"""Drafted tokens, of which the number that is best on this machine is told."""


@dataclass(frozen=True)
class Prediction:
    """Tokens a second of one sequence, as a profile of this machine foretells them, or why it does not."""

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


def predict(state: StateFolder, plan: Plan) -> Prediction | None:
    """The prediction for `plan` by the profile that is kept; None where there is none."""
    try:
        profile = read(state, ProfileConditions.of(plan))
    except ForeignProfile as error:
        return Prediction("", 0.0, 0.0, 0, ACCEPTANCE, str(error))
    if profile is None:
        return None
    model, share = profile.model, plan.slots / plan.experts
    depth = max(DEPTHS, key=lambda depth: _drafted(model, share, depth))
    plain = model.tokens_per_second(1, model.hit_rate(share, 1))
    return Prediction(profile.taken, plain, _drafted(model, share, depth), depth, ACCEPTANCE, "")


def _drafted(model: PerformanceModel, share: float, depth: int) -> float:
    hit_rate = model.hit_rate(share, 1, depth + 1)
    return model.tokens_per_second(1, hit_rate, depth, moesd.tokens_per_cycle(ACCEPTANCE, depth))
