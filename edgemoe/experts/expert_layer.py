"""What runs in the place of a model's experts: acquires records from the cache and computes as they arrive."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from edgemoe.cache import ExpertCache
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.experts.budget_routing import BudgetRouting
from edgemoe.experts.draft_routing import DraftRouting
from edgemoe.experts.expert_ffn import Experts, FastExperts, PlainExperts, TokenGroups
from edgemoe.experts.expert_predictor import ExpertPredictor
from edgemoe.experts.lockstep import LockstepPasses
from edgemoe.experts.router_hook import CurrentLayer, RouterMode
from edgemoe.kernels.cpu.threads import Workers


class ExpertLayer:
    """One MoE layer of a model whose experts live in a cache."""

    def __init__(
        self,
        number: int,
        moe: ExpertsModule,
        experts: Experts,
        cache: ExpertCache,
        predictor: ExpertPredictor | None,
    ) -> None:
        self.number = number
        self._predictor = predictor
        self._count = moe.experts
        self._experts = experts
        self._cache = cache

    def compute(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts, with transformers' signature and result.

        `hidden` is [..., hidden size]; `index` and `weights` are [tokens, top-k]. The host reads `index`:
        the one synchronisation that a layer needs when its experts may have to be loaded.
        """
        groups = self._groups(hidden, index, weights)
        wanted, predict_next = groups.wanted, None
        if self._predictor is not None:
            self._predictor.enter_layer(self.number, wanted, groups.hidden)
            predict_next = partial(self._predictor.predict_next, self.number, groups.hidden, groups.top_k)
        for loan in self._cache.borrow(self.number, wanted, meanwhile=predict_next):
            self._experts.compute(groups, loan.experts, loan.slots)
        return self._combined(groups, hidden, weights)

    def draft(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `compute` for experts that are all resident: nothing is loaded, counted or remembered as used."""
        groups = self._groups(hidden, index, weights)
        with self._cache.lend(self.number, groups.wanted) as loan:
            self._experts.compute(groups, loan.experts, loan.slots)
        return self._combined(groups, hidden, weights)

    def _groups(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> TokenGroups:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return TokenGroups(flat, index.reshape(len(flat), -1), weights.reshape(len(flat), -1), self._count)

    def _combined(self, groups: TokenGroups, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        outputs, module, tokens = groups.outputs, self._experts.module, len(groups.hidden)
        if getattr(module, "has_post_expert_norm", False):
            outputs = module.post_expert_norm(outputs)
        weighted = outputs.view(tokens, groups.top_k, -1) * weights.reshape(tokens, -1, 1)
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

    def __init__(self, where: CurrentLayer) -> None:
        self._where = where
        self._silent = False
        self._draft: DraftRouting | None = None
        self._budget: BudgetRouting | None = None
        self._lockstep: LockstepPasses | None = None

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
        if self._lockstep is not None:
            return self._lockstep.wait_for_others(layer, hidden, index, weights)
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
    def lockstep(self) -> Iterator[LockstepPasses]:
        """In the block passes that run as tasks of the meeting share their experts."""
        self._lockstep = LockstepPasses()
        try:
            yield self._lockstep
        finally:
            self._lockstep = None


def install(
    model: Any,
    experts_modules: Sequence[ExpertsModule],
    cache: ExpertCache,
    workers: Workers,
    predictor: ExpertPredictor | None = None,
    *,
    plain: bool = False,
) -> ExpertLayers:
    """Puts an `ExpertLayer` in the place of every experts module's forward. `plain` keeps the reference arithmetic."""
    layers = ExpertLayers(CurrentLayer(model, experts_modules))
    for number, moe in enumerate(experts_modules):
        module = moe.module(model)
        if not plain and cache.pool.device.type == "cpu" and FastExperts.fits(module, moe.layout):
            experts: Experts = FastExperts(module, moe.layout, cache.pool, workers)
        else:
            experts = PlainExperts(module, moe.layout, cache.pool)
        layer = ExpertLayer(number, moe, experts, cache, predictor)
        module.forward = types.MethodType(_forward(layers, layer), module)
    return layers


def _forward(layers: ExpertLayers, layer: ExpertLayer) -> Callable[..., torch.Tensor]:
    """The layer's forward as a method, with the argument names that families call it by."""

    def forward(
        module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return layers.forward(layer, hidden_states, top_k_index, top_k_weights)

    return forward
