"""Which experts of a layer a verification may use: MoE-Spec's budget and variants. Lossy, unless it holds all experts.

The set is chosen per layer and pass, from the routing of all verified nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

RULES = ("sum", "path", "residency")
"""How experts are ranked, and which ones count.

- "sum": by the sum of their router probabilities over all nodes (MoE-Spec, arXiv 2602.16052, section 1 of its method).
- "path": the same, weighted by path probability: how likely a node is to be committed (AcceptMoE, arXiv 2608.02989).
- "residency": as "sum", but resident experts are always allowed and do not count (AcceptMoE first drops low-demand
  experts that are not resident). A budget as a share of the weight then holds for each node separately, since any node
  may turn out to be the committed one.
"""

ROUNDING = 1e-6
"""Weight that a node may lack due to rounding."""
TIE_BREAK = 1e-3
"""Value of weight that a node does not lack, relative to weight that it lacks."""


class Unit(Enum):
    """The unit of a budget's amount."""

    EXPERTS = "experts"
    """Experts per layer."""
    MASS = "mass"
    """Share, 0 to 1, of the total weight of the experts that the nodes chose."""
    NBYTES = "bytes"
    """Bytes per pass, shared equally between layers; what a layer does not use goes to the layers after it."""


@dataclass(frozen=True)
class Budget:
    """How many experts may be used, and which. `amount` is in `unit`, at least 0."""

    unit: Unit
    amount: float
    rule: str
    """One of `RULES`."""

    def importance(self, path_probabilities: torch.Tensor) -> torch.Tensor:
        """The weight of each node, given its path probability: float32 [nodes] both."""
        return path_probabilities if self.rule == "path" else torch.ones_like(path_probabilities)


class Demand:
    """The demand of a pass's nodes for the experts of one layer."""

    def __init__(self, probabilities: torch.Tensor, chosen: torch.Tensor, importance: torch.Tensor) -> None:
        """From the router probabilities, float32 [nodes, experts], which sum to 1 per node, and the top-k choices.

        `chosen` is bool [nodes, experts]; `importance`, float32 [nodes], is the weight of each node.
        """
        weights = probabilities * chosen
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-9)
        self.topk_weights = weights
        """Float32 [nodes, experts]: each node's weights of its chosen experts, which sum to 1; 0 for others."""
        self.scores = (probabilities * importance[:, None]).sum(0)
        """Float32 [experts]: the weighted sum of probabilities over nodes."""
        self.expert_weights = (weights * importance[:, None]).sum(0)
        """Float32 [experts]: the weighted sum of `topk_weights` over nodes."""
        self.requested = chosen.any(0)
        """Bool [experts]: whether any node chose the expert."""


def allowed_experts(budget: Budget, demand: Demand, free: torch.Tensor, max_counted: int) -> torch.Tensor:
    """Bool [experts]: the experts that `budget` allows. Contains at least one if `demand` requests any.

    `free`, bool [experts], are allowed and do not count. `max_counted` limits the others, unless the unit is
    `Unit.MASS`. If the budget allows no expert, the requested one with the highest score is allowed.
    """
    if budget.unit is Unit.MASS and budget.amount >= 1:
        # A cumulative sum could miss the smallest weights due to rounding.
        allowed = demand.requested | free
    elif budget.unit is Unit.MASS and budget.rule == "residency":
        allowed = _cover_nodes(demand.topk_weights, free, budget.amount)
    else:
        allowed = _highest_scores(budget, demand, free, max_counted)
    if not bool(allowed.any()) and bool(demand.requested.any()):
        allowed[demand.scores.masked_fill(~demand.requested, -1.0).argmax()] = True
    return allowed


def _highest_scores(budget: Budget, demand: Demand, free: torch.Tensor, max_counted: int) -> torch.Tensor:
    """The experts of `free`, and the others with the highest scores."""
    scores = demand.scores
    if budget.rule == "residency":
        # An expert that no node chose would be loaded only for nodes that lose a chosen one.
        scores = scores.masked_fill(~demand.requested, -1.0)
    order = scores.masked_fill(free, float("inf")).argsort(descending=True, stable=True)
    counted = ~free[order]
    if budget.unit is Unit.MASS:
        weights = demand.expert_weights[order]
        kept = weights.cumsum(0) - weights < budget.amount * weights.sum()
    else:
        kept = counted.cumsum(0) <= max_counted
    if budget.rule == "residency":
        kept = kept & demand.requested[order]
    allowed = torch.zeros_like(demand.requested)
    allowed[order] = kept | ~counted
    return allowed


def _cover_nodes(topk_weights: torch.Tensor, free: torch.Tensor, share: float) -> torch.Tensor:
    """The experts of `free`, and others until each node keeps `share` of its weight. Greedy: the largest gain first."""
    weights, allowed = topk_weights.cpu().numpy(), free.cpu().numpy().copy()
    lacking = share * weights.sum(1) - weights[:, allowed].sum(1)
    while (lacking > ROUNDING).any():
        gain = np.minimum(weights, lacking.clip(min=0)[:, None]).sum(0)
        # Of equal gains the expert with more weight wins, since that may save nodes another expert.
        gain += TIE_BREAK * weights.sum(0)
        gain[allowed] = 0
        best = int(gain.argmax())
        allowed[best] = True
        lacking -= weights[:, best]
    return torch.from_numpy(allowed).to(free.device)
