"""Replaces the experts of a model's MoE layers: borrows records from the cache and computes as they arrive."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from edgemoe.cache import ExpertCache, accelerator
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.experts.expert_ffn import Experts, FastExperts, PlainExperts, SortedGroups, TokenGroups
from edgemoe.experts.expert_predictor import ExpertPredictor
from edgemoe.experts.lockstep import LockstepPasses
from edgemoe.experts.router_hook import CurrentLayer, RouterMode
from edgemoe.experts.routing_override import RoutingOverride
from edgemoe.kernels.cpu.threads import KernelThreads

_ATTRIBUTE = "edgemoe_expert_layer"


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
        self.experts = experts
        self._cache = cache

    def compute(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts, [..., hidden size], with transformers' signature and result.

        `hidden` is [..., hidden size]; `index` and `weights` are [tokens, top-k]. Loads the experts that are not
        resident. The host reads `index`: the one synchronisation that a layer needs to know what to load.
        """
        groups = self._groups(hidden, index, weights)
        wanted, predict_next = groups.wanted, None
        if self._predictor is not None:
            self._predictor.enter_layer(self.number, wanted, groups.hidden)
            predict_next = partial(self._predictor.predict_next, self.number, groups.hidden, groups.top_k)
        # Closed here: where the computation raises, nothing stays pinned for as long as somebody looks at the error.
        with closing(self._cache.borrow(self.number, wanted, meanwhile=predict_next)) as loans:
            for loan in loans:
                self.experts.compute(groups, loan.experts, loan.slots)
                self._cache.poll()
        return self.experts.combined(groups).view(hidden.shape)

    def slots_for_one(self) -> np.ndarray | None:
        """The slots of all experts, int64 [experts], where steps may compute any of them without a request.

        That is while every expert of the model is resident. None otherwise, and where experts are no steps.
        """
        return None if self.experts.multiplies is None else self._cache.slots_of(self.number)

    def hit(self, experts: Sequence[int]) -> None:
        """Counts `experts` as requested, which steps have computed."""
        self._cache.hit(self.number, experts)

    def draft(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `compute` for resident experts: no load, no hit or miss counted, no use remembered."""
        groups = self._groups(hidden, index, weights)
        with self._cache.lend(self.number, groups.wanted) as loan:
            self.experts.compute(groups, loan.experts, loan.slots)
        return self.experts.combined(groups).view(hidden.shape)

    def _groups(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> TokenGroups:
        flat = hidden.reshape(-1, hidden.shape[-1])
        make = TokenGroups if hidden.device.type == "cpu" else SortedGroups
        return make(flat, index.reshape(len(flat), -1), weights.reshape(len(flat), -1), self._count)

    def compute_together(
        self, hidden: Sequence[torch.Tensor], index: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """As `compute` for several passes at once, an output for each: every expert is borrowed once for all."""
        flat = [each.reshape(-1, each.shape[-1]) for each in hidden]
        top_k = index[0].shape[-1]
        joined = self.compute(
            torch.cat(flat),
            torch.cat([each.reshape(-1, top_k) for each in index]),
            torch.cat([each.reshape(-1, top_k) for each in weights]),
        )
        parts = joined.split([len(each) for each in flat])
        return [part.view(each.shape) for part, each in zip(parts, hidden, strict=True)]


@dataclass
class _Silenced:
    """A layer of zeros that passes in lockstep wait at as at the one with its number."""

    number: int

    def compute_together(
        self, hidden: Sequence[torch.Tensor], index: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Zeros for each pass."""
        return [torch.zeros_like(each) for each in hidden]


Grouped = Callable[[int, ExpertsModule, Experts, "ExpertPredictor | None"], "ExpertLayer | None"]
"""Makes the layer of a number whose experts are computed by kernels on a device; None where there are none for it."""


Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`ExpertLayer.compute` of a layer, or its `draft`."""
Take = Callable[["ExpertLayer", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A layer's output for hidden states, index and weights, as `ExpertLayer.compute` has them."""


class ExpertLayers:
    """The installed MoE layers of one model, with the modes that all of them run in."""

    def __init__(self, current: CurrentLayer, cache: ExpertCache | None = None) -> None:
        """`cache` has the experts of all layers; None for a model without any."""
        self.layers: list[ExpertLayer] = []
        """By their numbers. Those of a draft head come last."""
        self.in_passes = 0
        """How many of them the model's own passes run: all but those of a draft head."""
        self.capture: Take | None = None
        self.reached = 0
        """The layer that the pass which runs now, or ran last, has come to."""
        self.poll: Callable[[], None] = lambda: None
        """Called before each layer of a pass; what it raises ends the pass."""
        self._current = current
        self._cache = cache
        self._silent = False
        self._override: RoutingOverride | None = None
        self._lockstep: LockstepPasses | None = None
        self._rows: torch.Tensor | None = None

    @property
    def as_usual(self) -> bool:
        """Whether passes route and compute as the model says, each by itself and every token."""
        return not self._silent and self._override is None and self._lockstep is None and self._rows is None

    @property
    def routes_itself(self) -> bool:
        """Whether routers choose by themselves: no `RoutingOverride` wants their scores."""
        return self._override is None

    @property
    def override(self) -> RoutingOverride | None:
        """What routes the passes now, in the place of the routers; None where nothing does."""
        return self._override

    @contextmanager
    def captured(self, take: Take) -> Iterator[None]:
        """In the block `take` gets the calls of `forward`, in the place of the layers."""
        self.capture = take
        try:
            yield
        finally:
            self.capture = None

    def forward(
        self, layer: ExpertLayer, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The output of `layer` in the current mode; arguments and result as in `ExpertLayer.compute`."""
        if self.capture is not None:
            return self.capture(layer, hidden, index, weights)
        self.reached = layer.number
        self.poll()
        if self._silent:
            if self._lockstep is not None and self._lockstep.inside:
                return self._lockstep.wait_for_others(_Silenced(layer.number), hidden, index, weights)
            return torch.zeros_like(hidden)
        if self._override is not None:
            top_k = index.shape[-1]
            found = self._override.substitute(layer.number, index.reshape(-1, top_k), weights.reshape(-1, top_k))
            if found is None:
                return torch.zeros_like(hidden)
            if self._override.resident_only:
                return layer.draft(hidden, *found) if self._rows is None else self._some(layer.draft, hidden, *found)
            index, weights = (new.view(old.shape) for new, old in zip(found, (index, weights), strict=True))
        if self._lockstep is not None:
            return self._lockstep.wait_for_others(layer, hidden, index, weights)
        if self._rows is not None:
            return self._some(layer.compute, hidden, index, weights)
        return layer.compute(hidden, index, weights)

    def _some(self, compute: Compute, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What `compute` gives for the tokens of `computing`, and zeros for the others."""
        rows, flat, top_k = self._rows, hidden.reshape(-1, hidden.shape[-1]), index.shape[-1]
        chosen = index.reshape(-1, top_k)[rows], weights.reshape(-1, top_k)[rows]
        outputs = torch.zeros_like(flat)
        outputs[rows] = compute(flat[rows], *chosen)
        return outputs.view(hidden.shape)

    @contextmanager
    def computing(self, rows: torch.Tensor) -> Iterator[None]:
        """In the block experts are computed for the tokens `rows`, int64, alone; for the others the output is zero."""
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """In the block every layer's output is zero and no expert is loaded. May be nested."""
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before

    @contextmanager
    def overriding(self, routing: RoutingOverride) -> Iterator[None]:
        """In the block passes are routed by `routing`. A nested block replaces the outer one's routing."""
        before, self._override = self._override, routing
        try:
            if routing.resident_only:
                self.show_residents()
            with RouterMode(self._current, routing.choose):
                yield
        finally:
            self._override = before
            if routing.resident_only and self._cache is not None:
                # Kernels that are queued may read any slot that the table on a device has.
                self._cache.released_all()

    @property
    def all_resident(self) -> bool:
        """Whether every expert of the model, without a draft head's, is resident, and so stays it."""
        cache = self._cache
        return cache is not None and all(cache.slots_of(layer) is not None for layer in range(self.in_passes))

    def show_residents(self) -> None:
        """Brings the table on the device, where there is one, up to what is resident now."""
        if self._cache is not None and self._cache.table is not None:
            for layer in range(len(self.layers)):
                self._cache.make_readable(layer)
            self._cache.table.flush()

    @property
    def running_lockstep(self) -> LockstepPasses | None:
        """What passes run in now, where they run in lockstep."""
        return self._lockstep

    @contextmanager
    def lockstep(self) -> Iterator[LockstepPasses]:
        """In the block passes that run as tasks of the yielded `LockstepPasses` share their experts."""
        self._lockstep = LockstepPasses()
        try:
            yield self._lockstep
        finally:
            self._lockstep = None


def install(
    model: Any,
    experts_modules: Sequence[ExpertsModule],
    cache: ExpertCache,
    threads: KernelThreads,
    predictor: ExpertPredictor | None = None,
    *,
    plain: bool = False,
    grouped: Grouped | None = None,
    head_layers: int = 0,
) -> ExpertLayers:
    """Replaces the forward of every experts module of `model` by an `ExpertLayer`.

    Also registers hooks on the model's MoE blocks (`CurrentLayer`). `plain` uses the reference arithmetic everywhere.
    `grouped` makes the layers that a device has kernels for. The last `head_layers` are a draft head's: nothing is
    predicted for them from the layer before.
    """
    layers = ExpertLayers(CurrentLayer(model, experts_modules), cache)
    layers.in_passes = len(experts_modules) - head_layers
    for number, moe in enumerate(experts_modules):
        module, region = moe.module(model), cache.region(number)
        on_cpu = not accelerator.is_accelerator(cache.pool.device)
        if not plain and on_cpu and FastExperts.fits(moe):
            experts: Experts = FastExperts(module, moe, region, threads, model.dtype)
        else:
            experts = PlainExperts(module, moe, region)
        own = predictor if number < layers.in_passes else None
        made = None if grouped is None else grouped(number, moe, experts, own)
        layer = made or ExpertLayer(number, moe, experts, cache, own)
        layers.layers.append(layer)
        module.forward = types.MethodType(_forward(layers, layer), module)
        vars(module)[_ATTRIBUTE] = layers, layer
    return layers


def installed_in(module: nn.Module) -> tuple[ExpertLayers, ExpertLayer] | None:
    """What `install` has made of an experts module."""
    found: tuple[ExpertLayers, ExpertLayer] | None = vars(module).get(_ATTRIBUTE)
    return found


def _forward(layers: ExpertLayers, layer: ExpertLayer) -> Callable[..., torch.Tensor]:
    """A forward method of `layer`, with the argument names that transformers' families use."""

    def forward(
        module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return layers.forward(layer, hidden_states, top_k_index, top_k_weights)

    return forward
