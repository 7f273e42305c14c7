"""Predicts the speed of a plan by the stored profile of this machine, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.plan import moesd
from edgemoe.plan.performance_model import PerformanceModel
from edgemoe.plan.predicted_speed import PredictedSpeed
from edgemoe.plan.profile import ForeignProfile, ProfileConditions, read_profile

if TYPE_CHECKING:
    from edgemoe.checkpoint.state_folder import StateFolder
    from edgemoe.plan.plan import Plan

ACCEPTANCE = 0.7
"""Assumed probability that a drafted token is accepted; the true one depends on the text."""
DEPTHS = range(1, 9)
"""Draft lengths; the prediction is for the best of them."""


def predict(state: StateFolder, plan: Plan) -> PredictedSpeed | None:
    """The prediction for `plan` by the profile in `state`; None without one."""
    try:
        profile = read_profile(state, ProfileConditions.of(plan))
    except ForeignProfile as error:
        return PredictedSpeed("", 0.0, 0.0, 0, ACCEPTANCE, str(error))
    if profile is None:
        return None
    model, share = profile.model, plan.slots / plan.experts
    depth = max(DEPTHS, key=lambda depth: _drafted(model, share, depth))
    plain = model.tokens_per_second(1, model.hit_rate(share, 1))
    return PredictedSpeed(profile.taken, plain, _drafted(model, share, depth), depth, ACCEPTANCE, "")


def _drafted(model: PerformanceModel, share: float, depth: int) -> float:
    hit_rate = model.hit_rate(share, 1, depth + 1)
    return model.tokens_per_second(1, hit_rate, depth, moesd.tokens_per_cycle(ACCEPTANCE, depth))
