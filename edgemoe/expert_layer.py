"""What runs in the place of a model's experts: acquires records from the cache and computes as they arrive."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgemoe.cache import ExpertCache
from edgemoe.expert_math import Batch, Experts, FastExperts, PlainExperts
from edgemoe.expert_site import ExpertSite
from edgemoe.workers import Workers


class ExpertLayer:
    """One MoE layer of a model whose experts live in a cache."""

    def __init__(self, layer: int, site: ExpertSite, experts: Experts, cache: ExpertCache) -> None:
        self._layer = layer
        self._count = site.experts
        self._experts = experts
        self._cache = cache

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts, with transformers' signature and result.

        `hidden` is [..., hidden size]; `index` and `weights` are [tokens, top-k]. The host reads `index`:
        the one synchronisation that a layer needs when its experts may have to be loaded.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        batch = Batch(flat, index.reshape(len(flat), -1), weights.reshape(len(flat), -1), self._count)
        for loan in self._cache.borrow(self._layer, batch.wanted):
            self._experts.compute(batch, loan.experts, loan.slots)
        outputs, module = batch.outputs, self._experts.module
        if getattr(module, "has_post_expert_norm", False):
            outputs = module.post_expert_norm(outputs)
        weighted = outputs.view(len(flat), batch.top_k, -1) * weights.reshape(len(flat), -1, 1)
        return weighted.sum(dim=1).to(hidden.dtype).view(hidden.shape)


def install(
    model: Any, sites: Sequence[ExpertSite], cache: ExpertCache, workers: Workers, *, plain: bool = False
) -> None:
    """Puts an `ExpertLayer` in the place of every experts module's forward. `plain` keeps the reference arithmetic."""
    for layer, site in enumerate(sites):
        module = site.module(model)
        if not plain and cache.pool.device.type == "cpu" and FastExperts.fits(module, site.layout):
            experts: Experts = FastExperts(module, site.layout, cache.pool, workers)
        else:
            experts = PlainExperts(module, site.layout, cache.pool)
        module.forward = types.MethodType(_forward(ExpertLayer(layer, site, experts, cache)), module)


def _forward(layer: ExpertLayer) -> Callable[..., torch.Tensor]:
    """The layer's forward as a method, with the argument names that families call it by."""

    def forward(
        module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return layer.forward(hidden_states, top_k_index, top_k_weights)

    return forward
