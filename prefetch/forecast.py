"""The expected demand of a verification for each expert, from the routing of its draft."""

from __future__ import annotations

from collections.abc import Sequence

import torch

EDGES = torch.tensor([0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0])
"""Lower edges of all bins of demand but the first."""
BINS = len(EDGES) + 1
MIN_DEMAND = 0.01
"""Demand below which an expert is not predicted."""


class Forecast:
    """The demand for each expert of each layer: a sum over drafted nodes of path probability times routing weight.

    It grows with the draft tree.
    """

    def __init__(self, experts: Sequence[int]) -> None:
        """`experts[layer]` is the number of experts of each layer."""
        self._demand = [torch.zeros(count) for count in experts]

    def new_experts(self, layer: int, weights: torch.Tensor, top_k: int) -> torch.Tensor:
        """Bool [nodes, experts]: which of each node's `top_k` experts of greatest weight earlier nodes hardly demand.

        `weights`, float32 [nodes, experts] on the CPU, are the routing weights of nodes not added yet.
        """
        chosen = weights.topk(min(top_k, weights.shape[-1]), dim=-1).indices
        new = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, chosen, True)
        return new & (weights > 0) & (self._demand[layer] < MIN_DEMAND)

    def add(self, layer: int, weights: torch.Tensor, path_probabilities: torch.Tensor) -> None:
        """Adds nodes: routing weights, float32 [nodes, experts], and path probabilities, [nodes] on the CPU."""
        self._demand[layer] += (weights.cpu() * path_probabilities[:, None]).sum(0)

    def bins(self, layer: int) -> dict[int, int]:
        """The predicted experts of `layer`, and the bin of each one's demand, below `BINS`."""
        demand = self._demand[layer]
        predicted = (demand >= MIN_DEMAND).nonzero().flatten()
        bins = torch.bucketize(demand[predicted], EDGES, right=True)
        return dict(zip(predicted.tolist(), bins.tolist(), strict=True))
