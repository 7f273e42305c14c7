"""Runs the pass of a step: scheduled tokens and draft trees become inputs, and what the cache counted is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from edgemoe.cache import CacheCounters
from edgemoe.draft.expert_budget import ExpertBudget
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.model_runner import ModelRunner, tree_input
from edgemoe.model.sequential_runner import PassInput
from edgemoe.request.request import Request
from edgemoe.scheduler.step import ScheduledStep, StepOutputs


class StepRunner:
    """Runs steps on one model. `budget` restricts the experts of verifications while it is set; it may be changed."""

    def __init__(self, model: ModelRunner, counters: CacheCounters, budget: ExpertBudget | None = None) -> None:
        """`counters` are those of the expert cache."""
        self.model = model
        self.budget = budget
        self.counters = counters

    def run(self, step: ScheduledStep, drafts: Mapping[Request, DraftTree], before: CacheCounters) -> StepOutputs:
        """Appends the step's tokens, and the trees `drafts`, to the requests' KV caches and returns the logits.

        `before` is a copy of the counters from the start of the step. After an error the KV caches are invalid.
        """
        inputs, bases = [], {}
        for request, count in step.parts:
            cache, tree = request.cache, drafts.get(request)
            assert cache is not None
            if tree is None:
                inputs.append(PassInput(cache, request.tokens[cache.tokens : cache.tokens + count]))
            else:
                bases[request] = cache.tokens
                cache.mark()
                inputs.append(tree_input(cache, tree, range(len(tree)), ())._replace(verifies=True))
        with self._restricted(step, inputs, drafts):
            logits = self.model.run_sampled(inputs)
        now = self.counters
        return StepOutputs(
            inputs=inputs,
            logits=logits,
            bases=bases,
            hits=now.hits - before.hits,
            misses=now.misses - before.misses,
            nbytes_loaded=now.bytes_loaded - before.bytes_loaded,
            link_wait_seconds=now.link_wait_seconds - before.link_wait_seconds,
            lossy=self.budget is not None,
        )

    def _restricted(
        self, step: ScheduledStep, inputs: Sequence[PassInput], drafts: Mapping[Request, DraftTree]
    ) -> AbstractContextManager[None]:
        """The context in which the pass runs: under the budget, where there is one."""
        if self.budget is None:
            return nullcontext()
        trees = [drafts.get(request) for request, _ in step.parts]
        return self.budget.restricting(inputs, [tree.probabilities if tree else None for tree in trees])
