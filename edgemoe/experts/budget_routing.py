"""What a budget on experts does to the routing of one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgemoe.cache import ExpertCache
from edgemoe.experts.router_hook import Choice, are_logits, hidden_score
from edgemoe.prefetch.budget import Budget, Demand, Unit, within

SAME_SUM = 0.01
"""Relative spread of the nodes' sums of weights up to which a family is taken to normalise them."""


@dataclass
class BudgetTotals:
    """What verifications under a budget asked for, since the engine was loaded."""

    budget_choices: int = 0
    """Experts that nodes of verifications chose, each for each node and layer."""
    budget_dropped: int = 0
    """Those of them that the budget left out."""


class BudgetRouting:
    """Restricts one pass: hides scores outside of the set before a router chooses, and weighs what is left.

    `rows`, float32 [tokens of the pass], are path probabilities, 0 for a token that is not restricted. A pass may come
    by a layer in parts, in the order of its tokens: each part then has its share of the budget by its restricted
    tokens, and what the parts before it were allowed besides.
    """

    def __init__(
        self,
        budget: Budget,
        dropped: str,
        cache: ExpertCache,
        experts: Sequence[int],
        rows: torch.Tensor,
        totals: BudgetTotals,
    ) -> None:
        self._budget = budget
        self._dropped = dropped
        self._cache = cache
        self._experts = experts
        self._rows = rows
        self._totals = totals
        self._passed = [0] * len(experts)
        self._counted = [0] * len(experts)
        self._free = [torch.zeros(count, dtype=torch.bool) for count in experts]
        self._allowed: torch.Tensor | None = None
        self._seen: int | None = None

    def choose(self, layer: int, choice: Choice) -> torch.Tensor:
        """The scores that `layer` chooses by. For `RouterMode`."""
        scores, self._seen = choice.scores, layer
        top = scores.topk(choice.top_k, dim=-1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, top, True)
        allowed = self._allowed = self._allow(layer, _probabilities(scores), chosen)
        if allowed is None:
            return scores
        touched = (chosen & ~allowed).any(-1, keepdim=True)
        # Of families that choose among groups first, a token never gets what is in the others.
        inside = allowed & (scores > float("-inf"))
        if self._dropped == "truncate":
            own = inside & chosen
            # Nobody goes without any: one that would takes the best of the set.
            first = scores.float().masked_fill(~inside, float("-inf")).argmax(-1, keepdim=True)
            best = torch.zeros_like(chosen).scatter(-1, first, True) & inside
            inside = torch.where(own.any(-1, keepdim=True), own, best)
        self._allowed = inside | ~touched
        return scores.masked_fill(~self._allowed, hidden_score(scores))

    def substitute(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `layer` computes, `index` and `weights` [tokens, top-k] each: what may not be has no weight."""
        experts = self._experts[layer]
        inside = index.clamp(max=experts - 1)
        seen, self._seen = self._seen == layer, None
        if not seen:
            # The router chose unseen: what it chose is all that is known of it.
            spread = torch.zeros(len(index), experts + 1, device=index.device)
            spread.scatter_(-1, index.clamp(max=experts), weights.float().abs().nan_to_num())
            self._allowed = self._allow(layer, _probabilities(spread[:, :-1]), spread[:, :-1] > 0)
        allowed, self._allowed = self._allowed, None
        if allowed is None:
            return index, weights
        kept = allowed.gather(-1, inside) | (index >= experts)
        touched = ~kept.all(-1, keepdim=True)
        left = torch.where(kept, weights, torch.zeros_like(weights)).nan_to_num()
        sums = weights.float().nan_to_num().sum(-1, keepdim=True)
        if seen and float(sums.std(correction=0)) <= SAME_SUM * float(sums.mean().abs()):
            # The family's weights sum to the same for every token: so do those that are left.
            left = (left * (sums / left.float().sum(-1, keepdim=True).clamp_min(1e-9))).to(weights.dtype)
        weights = torch.where(touched, left, weights)
        # What weighs nothing is not computed; it must only name an expert that is there.
        return torch.where(kept, index, allowed.int().argmax(-1, keepdim=True)), weights

    def _allow(self, layer: int, probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor | None:
        """The set of the next tokens to come by `layer`, bool [tokens, experts]; None where none is restricted."""
        first = self._passed[layer]
        last = self._passed[layer] = first + len(chosen)
        certain = self._rows[first:last].to(chosen.device)
        verified = certain > 0
        free = self._free[layer] = self._free[layer].to(chosen.device)
        if self._budget.rule == "residency":
            free[self._cache.residents(layer)] = True
            # What tokens that are not restricted want is moved anyway.
            free |= chosen[~verified].any(0)
        if not bool(verified.any()):
            return None
        demand = Demand(probabilities[verified], chosen[verified], self._budget.importance(certain[verified]))
        allowed = within(self._budget, demand, free, self._most(layer, last))
        self._counted[layer] += int((allowed & ~free).sum())
        free |= allowed
        self._totals.budget_choices += int(chosen[verified].sum())
        self._totals.budget_dropped += int((chosen[verified] & ~allowed).sum())
        return allowed | ~verified[:, None]

    def _most(self, layer: int, last: int) -> int:
        """How many experts more may count at `layer`, once all tokens before `last` have come by."""
        most = int(self._budget.amount)
        if self._budget.unit is Unit.NBYTES:
            record = self._cache.store.slot_nbytes
            left = max(0, most - record * sum(self._counted[:layer]))
            most = left // (len(self._experts) - layer) // record
        if most >= self._experts[layer]:
            return most
        restricted = self._rows > 0
        done, total = int(restricted[:last].sum()), int(restricted.sum())
        return -(-most * done // total) - self._counted[layer]


def _probabilities(scores: torch.Tensor) -> torch.Tensor:
    """`scores`, [tokens, experts], as float32 that sum to 1 for each token; 0 is what a family has hidden itself."""
    scores = scores.float()
    if are_logits(scores):
        return scores.softmax(-1)
    scores = scores.clamp(min=0)
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-9)
