"""What runs in the place of a model's experts: acquires records from the cache and computes as they arrive."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from edgemoe.budget_routing import BudgetRouting
from edgemoe.cache import ExpertCache
from edgemoe.draft_routing import DraftRouting
from edgemoe.expert_math import Batch, Experts, FastExperts, PlainExperts
from edgemoe.expert_site import ExpertSite
from edgemoe.foresight import Foresight
from edgemoe.meeting import Meeting
from edgemoe.routing import RouterMode, WhereWeAre
from edgemoe.workers import Workers


class ExpertLayer:
    """One MoE layer of a model whose experts live in a cache."""

    def __init__(
        self, number: int, site: ExpertSite, experts: Experts, cache: ExpertCache, foresight: Foresight | None
    ) -> None:
        self.number = number
        self._foresight = foresight
        self._count = site.experts
        self._experts = experts
        self._cache = cache

    def compute(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts, with transformers' signature and result.

        `hidden` is [..., hidden size]; `index` and `weights` are [tokens, top-k]. The host reads `index`:
        the one synchronisation that a layer needs when its experts may have to be loaded.
        """
        batch = self._batch(hidden, index, weights)
        wanted, look = batch.wanted, None
        if self._foresight is not None:
            self._foresight.reach(self.number, wanted, batch.hidden)
            look = partial(self._foresight.look, self.number, batch.hidden, batch.top_k)
        for loan in self._cache.borrow(self.number, wanted, meanwhile=look):
            self._experts.compute(batch, loan.experts, loan.slots)
        return self._combined(batch, hidden, weights)

    def draft(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `compute` for experts that are all resident: nothing is loaded, counted or remembered as used."""
        batch = self._batch(hidden, index, weights)
        with self._cache.lend(self.number, batch.wanted) as loan:
            self._experts.compute(batch, loan.experts, loan.slots)
        return self._combined(batch, hidden, weights)

    def _batch(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Batch:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return Batch(flat, index.reshape(len(flat), -1), weights.reshape(len(flat), -1), self._count)

    def _combined(self, batch: Batch, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        outputs, module, tokens = batch.outputs, self._experts.module, len(batch.hidden)
        if getattr(module, "has_post_expert_norm", False):
            outputs = module.post_expert_norm(outputs)
        weighted = outputs.view(tokens, batch.top_k, -1) * weights.reshape(tokens, -1, 1)
        return weighted.sum(dim=1).to(hidden.dtype).view(hidden.shape)

    def compute_together(
        self, hidden: Sequence[torch.Tensor], index: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """As `compute` for several passes that have met at this layer: every expert is acquired once for all."""
        flat = [each.reshape(-1, each.shape[-1]) for each in hidden]
        top_k = index[0].shape[-1]
        joined = self.compute(
            torch.cat(flat),
            torch.cat([each.reshape(-1, top_k) for each in index]),
            torch.cat([each.reshape(-1, top_k) for each in weights]),
        )
        parts = joined.split([len(each) for each in flat])
        return [part.view(each.shape) for part, each in zip(parts, hidden, strict=True)]


class ExpertLayers:
    """The installed layers of one model, and what all of them are told at once."""

    def __init__(self, where: WhereWeAre) -> None:
        self._where = where
        self._silent = False
        self._draft: DraftRouting | None = None
        self._budget: BudgetRouting | None = None
        self._meeting: Meeting | None = None

    def forward(
        self, layer: ExpertLayer, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What a model gets from its layer `layer`."""
        if self._silent:
            return torch.zeros_like(hidden)
        if self._draft is not None:
            return self._drafted(layer, self._draft, hidden, index, weights)
        if self._budget is not None:
            top_k = index.shape[-1]
            found = self._budget.substitute(layer.number, index.reshape(-1, top_k), weights.reshape(-1, top_k))
            index, weights = (new.view(old.shape) for new, old in zip(found, (index, weights), strict=True))
        if self._meeting is not None:
            return self._meeting.join(layer, hidden, index, weights)
        return layer.compute(hidden, index, weights)

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """In the block all outputs are zero and nothing is acquired: for passes that only look at what is around."""
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            # One such block may be inside of another.
            self._silent = before

    @contextmanager
    def drafting(self, routing: DraftRouting) -> Iterator[None]:
        """In the block passes use resident experts only, chosen by `routing`."""
        self._draft = routing
        try:
            with RouterMode(self._where, routing.choose):
                yield
        finally:
            self._draft = None

    @contextmanager
    def restricting(self, routing: BudgetRouting) -> Iterator[None]:
        """In the block passes use the experts that `routing` leaves them."""
        self._budget = routing
        try:
            with RouterMode(self._where, routing.choose):
                yield
        finally:
            self._budget = None

    @staticmethod
    def _drafted(
        layer: ExpertLayer, routing: DraftRouting, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        top_k = index.shape[-1]
        found = routing.substitute(layer.number, index.reshape(-1, top_k), weights.reshape(-1, top_k))
        return torch.zeros_like(hidden) if found is None else layer.draft(hidden, *found)

    @contextmanager
    def meeting(self) -> Iterator[Meeting]:
        """In the block passes that run as tasks of the meeting share their experts."""
        self._meeting = Meeting()
        try:
            yield self._meeting
        finally:
            self._meeting = None


def install(
    model: Any,
    sites: Sequence[ExpertSite],
    cache: ExpertCache,
    workers: Workers,
    foresight: Foresight | None = None,
    *,
    plain: bool = False,
) -> ExpertLayers:
    """Puts an `ExpertLayer` in the place of every experts module's forward. `plain` keeps the reference arithmetic."""
    layers = ExpertLayers(WhereWeAre(model, sites))
    for number, site in enumerate(sites):
        module = site.module(model)
        if not plain and cache.pool.device.type == "cpu" and FastExperts.fits(module, site.layout):
            experts: Experts = FastExperts(module, site.layout, cache.pool, workers)
        else:
            experts = PlainExperts(module, site.layout, cache.pool)
        layer = ExpertLayer(number, site, experts, cache, foresight)
        module.forward = types.MethodType(_forward(layers, layer), module)
    return layers


def _forward(layers: ExpertLayers, layer: ExpertLayer) -> Callable[..., torch.Tensor]:
    """The layer's forward as a method, with the argument names that families call it by."""

    def forward(
        module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return layers.forward(layer, hidden_states, top_k_index, top_k_weights)

    return forward
