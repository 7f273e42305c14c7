"""Which share of the missing experts the CPU computes beside a device, as asked for or as measured."""

from __future__ import annotations

from collections.abc import Sequence

from edgemoe.cache import accelerator
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.errors import PlanError
from edgemoe.experts.expert_ffn import FastExperts
from edgemoe.kernels.triton import availability
from edgemoe.plan.plan import Plan
from edgemoe.plan.profile import ForeignProfile, ProfileConditions, read_profile


def cpu_share(
    asked: str | float, plan: Plan, experts_modules: Sequence[ExpertsModule], state: StateFolder
) -> tuple[float, str]:
    """The share, from 0 to 1, and where it is from or why it is 0. Both are empty where none is `asked` for.

    `asked` is the setting `cpu_share`. `plan` says where the experts are; the profile is the one in `state`. Raises
    PlanError where `asked` is none of what the setting may be.
    """
    wanted = _share(asked)
    if wanted == 0:
        return 0.0, ""
    refusal = _refusal(plan, experts_modules)
    if refusal:
        return 0.0, refusal
    return _measured(plan, state) if wanted is None else (wanted, "as asked for")


def _share(asked: str | float) -> float | None:
    """What `asked` says: 0 for "off", None for "auto"."""
    text = str(asked).strip().lower()
    if text in ("off", "auto"):
        return 0.0 if text == "off" else None
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise PlanError(
            f"cpu_share={text!r} is no share of the missing experts: give auto, off, a share such as 35%, "
            "or a number from 0 to 1 such as 0.35"
        ) from None
    if not 0 <= share <= 1:
        raise PlanError(f"cpu_share={text} is not from 0 to 1 (0% to 100%): give such a share, auto or off")
    return share


def _refusal(plan: Plan, experts_modules: Sequence[ExpertsModule]) -> str:
    """Why the CPU computes no missing expert, whatever was asked for; empty where it can."""
    if not accelerator.is_accelerator(plan.device):
        return "without another device the CPU computes every expert"
    if plan.slots == plan.experts:
        return "every expert has a slot"
    if plan.host_tier == "file":
        return "the experts are not in RAM (host_tier=)"
    if missing := availability.missing():
        return missing
    if not any(map(FastExperts.fits, experts_modules)):
        return f"the CPU has no kernels for {' and '.join(plan.formats)}"
    return ""


def _measured(plan: Plan, state: StateFolder) -> tuple[float, str]:
    """The share by the profile of this machine."""
    try:
        profile = read_profile(state, ProfileConditions.of(plan))
    except ForeignProfile as error:
        return 0.0, str(error)
    if profile is None or profile.card is None:
        return 0.0, "not measured on this machine: take a profile with edgemoe profile and the same options"
    return profile.card.cpu_share, f"as measured on {profile.taken}"
