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

    def importance(self, certain: torch.Tensor) -> torch.Tensor:
        """What nodes with the path probabilities `certain` count for, float32 of the same shape."""
        return torch.ones_like(certain) if self.rule == "sum" else certain


class Demand:
    """What the nodes of a pass ask of one layer.

    `probabilities`, float32 [nodes, experts], sum to 1 for each node; `chosen`, bool of the same shape, are its top-k;
    `importance`, float32 [nodes], is what it counts for.
    """

    def __init__(self, probabilities: torch.Tensor, chosen: torch.Tensor, importance: torch.Tensor) -> None:
        taken = probabilities * chosen
        taken = taken / taken.sum(1, keepdim=True).clamp_min(1e-9)
        self.scores = (probabilities * importance[:, None]).sum(0)
        """Float32 [experts]: the sum of probabilities over all nodes."""
        self.taken = (taken * importance[:, None]).sum(0)
        """Float32 [experts]: the weight with which nodes chose each expert."""
        self.wanted = chosen.any(0)
        """Bool [experts]: who was chosen at all."""


def within(budget: Budget, demand: Demand, free: torch.Tensor, most: int) -> torch.Tensor:
    """Bool [experts]: the set that `budget` allows; never empty where anything is wanted.

    `free`, bool [experts], are in it and do not count; `most` is how many others may be in it, where the budget is no
    share. Where that leaves nobody, the most wanted one is.
    """
    rank = demand.scores
    if budget.rule == "residency":
        # Moving one that nobody chose would only serve nodes that have to do without another.
        rank = rank.masked_fill(~demand.wanted, -1.0)
    order = rank.masked_fill(free, float("inf")).argsort(descending=True, stable=True)
    counted, wanted = ~free[order], demand.wanted[order]
    if budget.unit is not Unit.MASS:
        kept = counted.cumsum(0) <= most
    elif budget.amount < 1:
        taken = demand.taken[order]
        kept = taken.cumsum(0) - taken < budget.amount * taken.sum()
    else:
        # A sum may leave the least of them out, by rounding.
        kept = wanted
    if budget.rule == "residency":
        kept = kept & wanted
    allowed = torch.zeros_like(demand.wanted)
    allowed[order] = kept | ~counted
    if not bool(allowed.any()) and bool(wanted.any()):
        allowed[order[wanted][0]] = True
    return allowed
