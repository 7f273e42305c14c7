"""How much each expert will be wanted by a verification, from the routing of its draft."""

from __future__ import annotations

from collections.abc import Sequence

import torch

EDGES = torch.tensor([0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0])
BINS = len(EDGES) + 1
MIN_AMOUNT = 0.01
"""Amount below which an expert is not named."""


class Forecast:
    """Per layer the sum over drafted nodes of path probability times router share; grows with the tree."""

    def __init__(self, experts: Sequence[int]) -> None:
        """`experts[layer]` is how many experts a layer has."""
        self._amounts = [torch.zeros(count) for count in experts]

    def news(self, layer: int, shares: torch.Tensor, top_k: int) -> torch.Tensor:
        """Bool [nodes, experts]: which of each node's `top_k` greatest shares no node before wanted."""
        chosen = shares.topk(min(top_k, shares.shape[-1]), dim=-1).indices
        new = torch.zeros_like(shares, dtype=torch.bool).scatter(-1, chosen, True)
        return new & (shares > 0) & (self._amounts[layer] < MIN_AMOUNT)

    def add(self, layer: int, shares: torch.Tensor, certain: torch.Tensor) -> None:
        """More nodes: `shares`, float32 [nodes, experts], and their path probabilities, [nodes] on the CPU."""
        self._amounts[layer] += (shares.cpu() * certain[:, None]).sum(0)

    def bins(self, layer: int) -> dict[int, int]:
        """The experts of `layer` that are named, and how much each is wanted, as a bin of `BINS`."""
        amounts = self._amounts[layer]
        named = (amounts >= MIN_AMOUNT).nonzero().flatten()
        numbers = torch.bucketize(amounts[named], EDGES, right=True)
        return dict(zip(named.tolist(), numbers.tolist(), strict=True))
