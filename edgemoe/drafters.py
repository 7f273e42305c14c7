"""Makes what drafts for an engine, as its settings say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from edgemoe.draft import affinity_file
from edgemoe.draft.draft_model import DraftModel
from edgemoe.draft.head_drafter import USUAL_DEPTH, HeadDrafter
from edgemoe.draft.pass_drafter import ModelDrafter, PassDrafter, SelfDrafter
from edgemoe.draft.settings import DraftSettings
from edgemoe.draft.speculation import Speculation
from edgemoe.errors import PlanError
from edgemoe.experts.draft_routing import RULES
from edgemoe.experts.head_experts import HeadExperts
from edgemoe.kernels import batch_invariant_linear
from edgemoe.model.model_runner import ModelRunner
from edgemoe.plan.plan import Plan
from edgemoe.plan.profile import ForeignProfile, ProfileConditions, read_profile
from edgemoe.runtime import Runtime


def speculation_for(
    settings: DraftSettings, runner: ModelRunner, runtime: Runtime, plan: Plan, draft_model: DraftModel | None
) -> Speculation:
    """The speculation of the model that `runner` runs and `runtime` holds.

    Raises PlanError when the rule "affinity" has no table, CheckpointError when the draft model cannot be loaded.
    """
    passes: PassDrafter | None = None
    if "mtp" in settings.drafters:
        if runner.head is not None:
            # What is priced ends by itself.
            depth = settings.depth if settings.priced else min(settings.depth, USUAL_DEPTH)
            experts = HeadExperts(runtime.cache, runner.sequential.layers, plan.top_k)
            passes = HeadDrafter(runner, runner.head, experts, plan.prefill_chunk, depth)
        else:
            settings = settings.without_head(runner.head_refusal or runner.refusal)
    elif "self" in settings.drafters:
        passes = _self_drafter(settings, runner, runtime)
    elif draft_model is not None:
        own = draft_model.load(plan)
        if plan.device == "cpu":
            batch_invariant_linear.install_gemv(own.sequential.model, runtime.kernel_threads)
        passes = ModelDrafter(own, runner.vocabulary, draft_model.kv, plan.draft_kv_nbytes, plan.prefill_chunk)
    return Speculation(settings, runner, passes, runtime.predictor, _profiled_cost(runtime, plan))


def _profiled_cost(runtime: Runtime, plan: Plan) -> Callable[[int], float] | None:
    """What one more token costs by the profile of this machine, where one is kept, for so many sequences."""
    with suppress(ForeignProfile):
        profile = read_profile(runtime.state, ProfileConditions.of(plan))
        if profile is not None:
            model, share = profile.model, plan.slots / plan.experts
            return lambda sequences: model.token_cost(sequences, model.hit_rate(share, sequences))
    return None


def _self_drafter(settings: DraftSettings, runner: ModelRunner, runtime: Runtime) -> SelfDrafter:
    experts = runtime.cache.store.experts
    affinity = affinity_file.read(runtime.state, experts)
    if settings.rule == "affinity" and affinity is None:
        raise PlanError(
            "draft_rule='affinity' needs the similarities of the model's experts, which are not computed yet: "
            "compute them with edgemoe affinity, or give draft_rule='auto'"
        )
    rules = [settings.rule]
    if settings.rule == "auto":
        rules = [rule for rule in RULES if rule != "affinity" or affinity is not None]
    return SelfDrafter(runner, runtime.cache, experts, rules, affinity.most_similar if affinity else None)
