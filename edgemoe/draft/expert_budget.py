"""A budget on the experts of verifications: MoE-Spec (arXiv 2602.16052). Lossy, off unless asked for.

`prefetch.budget` chooses a set of experts for each layer of a pass that verifies drafts, and a node's choices outside
of the set are dropped. Prompts and steps of one token are unrestricted. A budget that holds all experts changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from edgemoe.cache import ExpertCache
from edgemoe.config import EngineConfig
from edgemoe.draft.settings import BudgetSettings, budget_settings
from edgemoe.experts.budget_routing import BudgetRouting, BudgetTotals
from edgemoe.experts.expert_layer import ExpertLayers
from edgemoe.model.sequential_runner import PassInput


class ExpertBudget:
    """Restricts the experts of a model's verifications."""

    def __init__(
        self, settings: BudgetSettings, layers: ExpertLayers, cache: ExpertCache, experts: Sequence[int]
    ) -> None:
        """`experts[layer]` is how many experts a layer has."""
        self.totals = BudgetTotals()
        self._settings = settings
        self._layers = layers
        self._cache = cache
        self._experts = experts

    @contextmanager
    def restricting(self, work: Sequence[PassInput], certain: Sequence[Sequence[float] | None]) -> Iterator[None]:
        """The context of one pass over `work`, in which verifications keep to the budget.

        `certain[i]` are the path probabilities of the tokens of `work[i]`; None is for work that verifies nothing.
        """
        rows = [
            probability
            for item, known in zip(work, certain, strict=True)
            for probability in (known if known is not None else [0.0] * len(item.tokens))
        ]
        if not any(known is not None for known in certain):
            yield
            return
        routing = BudgetRouting(
            self._settings.budget, self._settings.dropped, self._cache, self._experts, torch.tensor(rows), self.totals
        )
        with self._layers.overriding(routing):
            yield


def expert_budget_for(config: EngineConfig, layers: ExpertLayers, cache: ExpertCache) -> ExpertBudget | None:
    """The budget that `config` asks for; None where it asks for none."""
    asked = budget_settings(config)
    return ExpertBudget(asked, layers, cache, cache.store.experts) if asked is not None else None
