"""A budget on the experts of verifications: MoE-Spec (arXiv 2602.16052). Lossy, off unless asked for.

A set of experts is chosen for each layer of a pass that verifies drafts (`prefetch.budget`), and what a node chose
outside of it is dropped. Prompts and steps of one token are never touched. With room for all it changes no bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from edgemoe.cache import ExpertCache
from edgemoe.config import EngineConfig
from edgemoe.draft.settings import one_of
from edgemoe.errors import PlanError
from edgemoe.experts.budget_routing import BudgetRouting, BudgetTotals
from edgemoe.experts.expert_layer import ExpertLayers
from edgemoe.model.sequential_runner import PassInput
from edgemoe.prefetch.budget import RULES, Budget, Unit
from edgemoe.sizes import format_bytes, parse_bytes

DROPPED = ("substitute", "truncate")
"""What becomes of a choice outside of the set: the node chooses again inside of it, or does without."""


@dataclass(frozen=True)
class BudgetSettings:
    """A budget and what becomes of what it drops, as the configuration asks for them."""

    budget: Budget
    dropped: str

    def describe(self) -> str:
        """What is lossy about it, in a few words."""
        amount, moved = self.budget.amount, self.budget.rule == "residency"
        if self.budget.unit is Unit.MASS:
            size = f"{100 * amount:.4g}% of each {'token' if moved else 'layer'}'s routing mass"
        elif self.budget.unit is Unit.EXPERTS:
            size = f"{amount:.0f} {'new ' if moved else ''}expert{'s' if amount != 1 else ''} a layer"
        else:
            size = f"{format_bytes(amount)} of {'new ' if moved else ''}experts a pass"
        return f"checks of drafts keep to {size}"


def budget_settings(config: EngineConfig) -> BudgetSettings | None:
    """The budget that `config` asks for, or None; PlanError names what is wrong with it."""
    one_of("--budget-rule", config.budget_rule, RULES)
    one_of("--budget-dropped", config.budget_dropped, DROPPED)
    text = str(config.budget).strip().lower()
    if text == "off":
        return None
    return BudgetSettings(Budget(*_size(text), config.budget_rule), config.budget_dropped)


def _size(text: str) -> tuple[Unit, float]:
    if re.fullmatch(r"\d+", text):
        unit, amount, least = Unit.EXPERTS, float(text), 1.0
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        unit, amount, least = Unit.MASS, float(match[1]) / 100, 1e-9
    else:
        try:
            unit, amount, least = Unit.NBYTES, float(parse_bytes(text)), 1.0
        except ValueError:
            raise PlanError(
                f'--budget {text!r} is no size: give off, experts of a layer ("8"), a share of the routing mass '
                '("95%") or bytes of a pass ("64MiB")'
            ) from None
    if amount < least or (unit is Unit.MASS and amount > 1):
        raise PlanError(f"--budget {text} is not possible: give at least 1 expert or byte, or a share up to 100%")
    return unit, amount


class ExpertBudget:
    """Puts a model's passes under a budget where they verify drafts."""

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
        """In the block, in which `work` is run in one pass, verifications keep to the budget.

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
        with self._layers.restricting(routing):
            yield


def expert_budget_for(config: EngineConfig, layers: ExpertLayers, cache: ExpertCache) -> ExpertBudget | None:
    """Puts passes under the budget that `config` asks for; None where it asks for none."""
    asked = budget_settings(config)
    return ExpertBudget(asked, layers, cache, cache.store.experts) if asked is not None else None
