"""Which experts of a layer a verification may use: MoE-Spec's budget and its relatives. Lossy, unless it holds all.

A set is chosen for each layer and pass, from the routing of all nodes that are verified there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

RULES = ("sum", "path", "residency")
"""How experts are ranked, and what a budget counts.

- "sum": by the sum of the router's probabilities over all nodes (MoE-Spec, arXiv 2602.16052, section 1 of its method).
- "path": the same, each node weighed by its path probability: the chance that it is committed (AcceptMoE, 2608.02989).
- "residency": as "path", but resident experts are free and the budget counts only what must be moved (AcceptMoE drops
  low-demand experts first that are not resident).
"""


class Unit(Enum):
    """What the size of a budget is counted in."""

    EXPERTS = "experts"
    """Experts of each layer."""
    MASS = "mass"
    """Share, from 0 to 1, of the weight with which nodes chose experts."""
    NBYTES = "bytes"
    """Bytes of a whole pass, which its layers share equally; what one leaves over goes to those after it."""


@dataclass(frozen=True)
class Budget:
    """How many experts, and which. `amount` is in `unit`s, at least 0."""

    unit: Unit
    amount: float
    rule: str
    """One of `RULES`."""


class Demand:
    """What the nodes of a pass ask of one layer.

    `probabilities`, float32 [nodes, experts], sum to 1 for each node; `chosen`, bool of the same shape, are its top-k;
    `certain`, float32 [nodes], its path probability.
    """

    def __init__(self, probabilities: torch.Tensor, chosen: torch.Tensor, certain: torch.Tensor) -> None:
        taken = probabilities * chosen
        taken = taken / taken.sum(1, keepdim=True).clamp_min(1e-9)
        self.plain = probabilities.sum(0)
        """Float32 [experts]: the sum over all nodes."""
        self.weighed = (probabilities * certain[:, None]).sum(0)
        """Float32 [experts]: the same by path probability."""
        self.taken = (taken * certain[:, None]).sum(0)
        """Float32 [experts]: the weight with which nodes chose each expert, by path probability."""
        self.wanted = chosen.any(0)
        """Bool [experts]: who was chosen at all."""


def within(budget: Budget, demand: Demand, free: torch.Tensor, affordable: int) -> torch.Tensor:
    """Bool [experts]: the set that `budget` allows; never empty where anything is wanted.

    `free`, bool [experts], are those that need not be moved; `affordable` is how many a budget in bytes pays for.
    """
    residency = budget.rule == "residency"
    rank = demand.plain if budget.rule == "sum" else demand.weighed
    if residency:
        # Moving one that nobody chose would only serve nodes that have to do without another.
        rank = rank.masked_fill(~demand.wanted, -1.0).masked_fill(free, float("inf"))
    order = rank.argsort(descending=True, stable=True)
    paid = ~free[order] if residency else torch.ones_like(order, dtype=torch.bool)
    if budget.unit is Unit.MASS:
        taken = demand.taken[order]
        before = taken.cumsum(0) - taken
        kept = ~paid | (before < budget.amount * taken.sum())
        if budget.amount >= 1:
            # Rounding may not leave the last one out.
            kept |= taken > 0
    else:
        most = affordable if budget.unit is Unit.NBYTES else int(budget.amount)
        kept = ~paid | (paid.cumsum(0) <= most)
    if residency:
        kept &= ~paid | demand.wanted[order]
    allowed = torch.zeros_like(demand.wanted)
    allowed[order[kept]] = True
    if not bool((allowed & demand.wanted).any()) and bool(demand.wanted.any()):
        allowed[(demand.weighed * demand.wanted).argmax()] = True
    return allowed
