"""Which experts of a layer a verification may use: MoE-Spec's budget and its relatives. Lossy, unless it holds all.

A set is chosen for each layer and pass, from the routing of all nodes that are verified there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

RULES = ("sum", "path", "residency")
"""How experts are ranked, and what a budget counts.

- "sum": by the sum of the router's probabilities over all nodes (MoE-Spec, arXiv 2602.16052, section 1 of its method).
- "path": the same, each node weighed by its path probability: the chance that it is committed (AcceptMoE, 2608.02989).
- "residency": as "sum", but resident experts are free and the budget counts only what must be moved (AcceptMoE drops
  low-demand experts first that are not resident). A share of the mass is then every node's own: none is left with
  less, since any may turn out to be the one that is committed.
"""

ROUNDING = 1e-6
"""Weight that may be lacking all the same: sums are rounded."""
TIE = 1e-3
"""What weight beyond what is lacking counts for."""


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
        return certain if self.rule == "path" else torch.ones_like(certain)


class Demand:
    """What the nodes of a pass ask of one layer.

    `probabilities`, float32 [nodes, experts], sum to 1 for each node; `chosen`, bool of the same shape, are its top-k;
    `importance`, float32 [nodes], is what it counts for.
    """

    def __init__(self, probabilities: torch.Tensor, chosen: torch.Tensor, importance: torch.Tensor) -> None:
        taken = probabilities * chosen
        taken = taken / taken.sum(1, keepdim=True).clamp_min(1e-9)
        self.shares = taken
        """Float32 [nodes, experts]: the weight with which each node chose each expert, 1 in all for each node."""
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
    if budget.unit is Unit.MASS and budget.amount >= 1:
        # A sum may leave the least of them out, by rounding.
        allowed = demand.wanted | free
    elif budget.unit is Unit.MASS and budget.rule == "residency":
        allowed = _covering(demand.shares, free, budget.amount)
    else:
        allowed = _foremost(budget, demand, free, most)
    if not bool(allowed.any()) and bool(demand.wanted.any()):
        allowed[demand.scores.masked_fill(~demand.wanted, -1.0).argmax()] = True
    return allowed


def _foremost(budget: Budget, demand: Demand, free: torch.Tensor, most: int) -> torch.Tensor:
    """`free` and the first of the others in the order of their scores."""
    rank = demand.scores
    if budget.rule == "residency":
        # Moving one that nobody chose would only serve nodes that have to do without another.
        rank = rank.masked_fill(~demand.wanted, -1.0)
    order = rank.masked_fill(free, float("inf")).argsort(descending=True, stable=True)
    counted = ~free[order]
    if budget.unit is Unit.MASS:
        taken = demand.taken[order]
        kept = taken.cumsum(0) - taken < budget.amount * taken.sum()
    else:
        kept = counted.cumsum(0) <= most
    if budget.rule == "residency":
        kept = kept & demand.wanted[order]
    allowed = torch.zeros_like(demand.wanted)
    allowed[order] = kept | ~counted
    return allowed


def _covering(shares: torch.Tensor, free: torch.Tensor, amount: float) -> torch.Tensor:
    """`free` and those others that keep `amount` of its weight for every node, first whom most nodes lack most."""
    own, allowed = shares.cpu().numpy(), free.cpu().numpy().copy()
    lacking = amount * own.sum(1) - own[:, allowed].sum(1)
    while (lacking > ROUNDING).any():
        gain = np.minimum(own, lacking.clip(min=0)[:, None]).sum(0)
        # Of those that would do as well, the one with more weight: it may spare another node another.
        gain += TIE * own.sum(0)
        gain[allowed] = 0
        best = int(gain.argmax())
        allowed[best] = True
        lacking -= own[:, best]
    return torch.from_numpy(allowed).to(free.device)
