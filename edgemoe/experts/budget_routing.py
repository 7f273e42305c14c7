"""The routing of one pass under an expert budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from edgemoe.cache import ExpertCache, ExpertId
from edgemoe.experts.router_hook import Choice, by_kind, hide
from edgemoe.prefetch.budget import Budget, Demand, Unit, allowed_experts

NORMALISED_SPREAD = 0.01
"""A family normalises its routing weights when their sums vary less than this over the tokens, relative to the mean."""


@dataclass
class BudgetTotals:
    """Counts of verifications under a budget since the engine was loaded."""

    budget_choices: int = 0
    """Experts that verified nodes chose, summed over nodes and layers."""
    budget_dropped: int = 0
    """Those of `budget_choices` that the budget left out."""


class _Decision(NamedTuple):
    """What `choose` decided for `layer`: bool [tokens, experts], or None where no token is restricted."""

    layer: int
    allowed: torch.Tensor | None


class BudgetRouting:
    """A `RoutingOverride` for one pass that restricts verified tokens to the set of experts that a budget allows.

    A pass may reach a layer in several calls, in the order of its tokens. Each call gets the share of the budget that
    belongs to its restricted tokens, and may also use what the calls before it were allowed.
    """

    resident_only = False

    def __init__(
        self,
        budget: Budget,
        dropped: str,
        cache: ExpertCache,
        experts: Sequence[int],
        path_probabilities: torch.Tensor,
        totals: BudgetTotals,
    ) -> None:
        """`experts[layer]` is the number of a layer's experts.

        `dropped` is what becomes of a choice outside of the set: "substitute" lets the token choose again inside of
        it, "truncate" drops the choice. `path_probabilities` is float32 [tokens of the pass], 0 for a token that is
        not restricted. `totals` is added to.
        """
        self._budget = budget
        self._dropped = dropped
        self._cache = cache
        self._experts = experts
        self._path_probabilities = path_probabilities
        self._totals = totals
        self._tokens_done = [0] * len(experts)
        self._charged = [0] * len(experts)
        self._free = [torch.zeros(count, dtype=torch.bool) for count in experts]
        self._decision: _Decision | None = None

    def choose(self, layer: int, choice: Choice) -> torch.Tensor:
        """See `RoutingOverride`. Leaves its decision for `substitute`."""
        scores = choice.scores
        top = scores.topk(choice.top_k, dim=-1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, top, True)
        allowed = self._allow(layer, _probabilities(scores), chosen)
        if allowed is not None:
            allowed = self._selectable(scores, chosen, allowed)
        self._decision = _Decision(layer, allowed)
        return scores if allowed is None else hide(scores, ~allowed)

    def substitute(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RoutingOverride`: a choice outside of the set gets the weight 0. Takes the decision of `choose`."""
        experts = self._experts[layer]
        decision, self._decision = self._decision, None
        if decision is not None and decision.layer != layer:
            decision = None
        allowed = self._allow_chosen(layer, index, weights) if decision is None else decision.allowed
        if allowed is None:
            return index, weights
        # Some families name no expert by a number beyond the last one.
        kept = allowed.gather(-1, index.clamp(max=experts - 1)) | (index >= experts)
        touched = ~kept.all(-1, keepdim=True)
        left = torch.where(kept, weights, torch.zeros_like(weights)).nan_to_num()
        sums = weights.float().nan_to_num().sum(-1, keepdim=True)
        if decision is not None and float(sums.std(correction=0)) <= NORMALISED_SPREAD * float(sums.mean().abs()):
            left = (left * (sums / left.float().sum(-1, keepdim=True).clamp_min(1e-9))).to(weights.dtype)
        weights = torch.where(touched, left, weights)
        # An expert of weight 0 is not computed, but must exist.
        return torch.where(kept, index, allowed.int().argmax(-1, keepdim=True)), weights

    def _selectable(self, scores: torch.Tensor, chosen: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """The experts that the router may choose, bool [tokens, experts], when the budget's set is `allowed`.

        A token whose `chosen` experts are all allowed keeps its scores untouched.
        """
        touched = (chosen & ~allowed).any(-1, keepdim=True)
        # In families that choose among groups first, a token never gets an expert of another group.
        inside = allowed & (scores > float("-inf"))
        if self._dropped == "truncate":
            own = inside & chosen
            # A token that would lose all its experts takes the best one of the set.
            first = scores.float().masked_fill(~inside, float("-inf")).argmax(-1, keepdim=True)
            best = torch.zeros_like(chosen).scatter(-1, first, True) & inside
            inside = torch.where(own.any(-1, keepdim=True), own, best)
        return inside | ~touched

    def _allow_chosen(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """As `_allow` for a router whose scores are not known: only its choice and routing weights are."""
        experts = self._experts[layer]
        spread = torch.zeros(len(index), experts + 1, device=index.device)
        spread.scatter_(-1, index.clamp(max=experts), weights.float().abs().nan_to_num())
        return self._allow(layer, _probabilities(spread[:, :-1]), spread[:, :-1] > 0)

    def _allow(self, layer: int, probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor | None:
        """The budget's set for the next tokens at `layer`, bool [tokens, experts]; None where none is restricted.

        Advances the state of `layer`: tokens done, experts charged to the budget, experts that are free from now on.
        """
        first = self._tokens_done[layer]
        last = self._tokens_done[layer] = first + len(chosen)
        certain = self._path_probabilities[first:last].to(chosen.device)
        verified = certain > 0
        free = self._free[layer] = self._free[layer].to(chosen.device)
        if self._budget.rule == "residency":
            free[self._cache.residents(layer)] = True
            # Unrestricted tokens load what they choose anyway.
            free |= chosen[~verified].any(0)
        if not bool(verified.any()):
            return None
        demand = Demand(probabilities[verified], chosen[verified], self._budget.importance(certain[verified]))
        allowed = allowed_experts(self._budget, demand, free, self._max_charged(layer, last))
        self._charged[layer] += int((allowed & ~free).sum())
        free |= allowed
        self._totals.budget_choices += int(chosen[verified].sum())
        self._totals.budget_dropped += int((chosen[verified] & ~allowed).sum())
        return allowed | ~verified[:, None]

    def _max_charged(self, layer: int, last: int) -> int:
        """How many more experts of `layer` may be charged to the budget for the tokens up to `last`."""
        limit = int(self._budget.amount)
        if self._budget.unit is Unit.NBYTES:
            nbytes = [self._cache.store.record_nbytes(ExpertId(each, 0)) for each in range(layer + 1)]
            charged = sum(size * count for size, count in zip(nbytes, self._charged[:layer], strict=False))
            limit = max(0, limit - charged) // (len(self._experts) - layer) // nbytes[layer]
        if limit >= self._experts[layer]:
            return limit
        restricted = self._path_probabilities > 0
        done, total = int(restricted[:last].sum()), int(restricted.sum())
        return -(-limit * done // total) - self._charged[layer]


def _probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Router probabilities, float32 [tokens, experts]; 0 for an expert that the family itself has hidden."""
    scores = scores.float()

    def shares() -> torch.Tensor:
        positive = scores.clamp(min=0)
        return positive / positive.sum(-1, keepdim=True).clamp_min(1e-9)

    return by_kind(scores, lambda: scores.softmax(-1), shares)
