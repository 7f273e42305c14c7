"""What a budget on experts does to the routing of one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgemoe.cache import ExpertCache
from edgemoe.prefetch.budget import Budget, Demand, Unit, within
from edgemoe.routing import Choice, hidden_score

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
    by a layer in parts, in the order of its tokens; each part then has a set of its own.
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
        self._left = budget.amount
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
        if self._dropped == "truncate":
            inside = allowed & chosen
            # Nobody goes without any: one that would takes the best of the set.
            best = torch.zeros_like(chosen).scatter(
                -1, scores.float().masked_fill(~allowed, float("-inf")).argmax(-1, keepdim=True), True
            )
            allowed = torch.where(inside.any(-1, keepdim=True), inside, best)
        touched = (chosen & ~allowed).any(-1, keepdim=True)
        self._allowed = allowed | ~touched
        return scores.masked_fill(~self._allowed, hidden_score(scores))

    def substitute(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `layer` computes, `index` and `weights` [tokens, top-k] each: what may not be has no weight."""
        experts = self._experts[layer]
        inside = index.clamp(max=experts - 1)
        if self._seen != layer:
            # The router chose unseen: what it chose is all that is known of it.
            spread = torch.zeros(len(index), experts, device=index.device).scatter(-1, inside, weights.float().abs())
            self._allowed = self._allow(layer, spread, spread > 0)
        allowed, self._allowed, self._seen = self._allowed, None, None
        if allowed is None:
            return index, weights
        kept = allowed.gather(-1, inside) | (index >= experts)
        touched = ~kept.all(-1, keepdim=True)
        left = torch.where(kept, weights, torch.zeros_like(weights)).nan_to_num()
        sums = weights.float().nan_to_num().sum(-1, keepdim=True)
        if float(sums.std(correction=0)) <= SAME_SUM * float(sums.mean().abs()):
            # The family's weights sum to the same for every token: so do those that are left.
            left = (left * (sums / left.float().sum(-1, keepdim=True).clamp_min(1e-9))).to(weights.dtype)
        weights = torch.where(touched, left, weights)
        # What weighs nothing is not computed; it must only name an expert that is there.
        return torch.where(kept, index, allowed.int().argmax(-1, keepdim=True)), weights

    def _allow(self, layer: int, probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor | None:
        """The set of the next tokens to come by `layer`, bool [tokens, experts]; None where none is restricted."""
        first = self._passed[layer]
        self._passed[layer] = first + len(chosen)
        certain = self._rows[first : first + len(chosen)].to(chosen.device)
        verified = certain > 0
        if not bool(verified.any()):
            return None
        free = torch.zeros(self._experts[layer], dtype=torch.bool)
        free[self._cache.residents(layer)] = True
        # What tokens that are not restricted want is moved anyway.
        free = free.to(chosen.device) | chosen[~verified].any(0)
        demand = Demand(probabilities[verified], chosen[verified], certain[verified])
        record = self._cache.store.slot_nbytes
        left = max(0.0, self._left) / (len(self._experts) - layer)
        allowed = within(self._budget, demand, free, int(left // record))
        if self._budget.unit is Unit.NBYTES:
            counted = allowed & ~free if self._budget.rule == "residency" else allowed
            self._left -= int(counted.sum()) * record
        self._totals.budget_choices += int(chosen[verified].sum())
        self._totals.budget_dropped += int((chosen[verified] & ~allowed).sum())
        return allowed | ~verified[:, None]


def _probabilities(scores: torch.Tensor) -> torch.Tensor:
    """`scores`, [tokens, experts], as float32 that sum to 1 for each token: logits are those negative somewhere."""
    scores = scores.float()
    if bool((scores < 0).any()):
        return scores.softmax(-1)
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-9)
