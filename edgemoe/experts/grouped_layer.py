"""One MoE layer on a device: kernels look the experts up in a table there, and are queued before the host knows them.

The host reads the choice while the hits are computed, starts what is missing, and queues the same kernels again as
records arrive. They leave out what was computed before, and what is not there yet. With `CpuHelp` the CPU computes some
of what is missing while the link moves the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from edgemoe.cache import ExpertCache, ExpertId
from edgemoe.cache.slots import SlotRegion, SlotTable
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.experts.expert_ffn import Experts, in_order_of_use, rows_of, up_name
from edgemoe.experts.expert_layer import ExpertLayer, Grouped
from edgemoe.experts.expert_predictor import ExpertPredictor
from edgemoe.experts.host_experts import MAX_TOKENS, CpuHelp, HostExperts
from edgemoe.experts.host_reads import HostRead, HostReads
from edgemoe.experts.lookahead import RouterScores
from edgemoe.kernels.row_linear import BATCH_INVARIANT_TOKENS
from edgemoe.kernels.triton.activations import gate_rule
from edgemoe.kernels.triton.grouped_ffn import GroupedFfn, GroupedMatrix, combine, resolve
from edgemoe.kernels.triton.launcher import Launcher

KEPT_TOKENS = 16
"""Tokens of a pass up to which its buffers are kept for the next one of as many."""


@dataclass
class DeviceTools:
    """What the MoE layers of one model share on a device."""

    launch: Launcher
    table: SlotTable
    reads: HostReads
    live: torch.Tensor | None = None
    """int64 [1] on the device, the tokens of the pass that are no padding; None where there is no padding."""
    live_tokens: int | None = None
    """The same number on the host."""
    uncounted: deque[tuple[Sequence[int], HostRead]] = field(default_factory=deque)
    """Layers, and a choice for each, of requests that found every expert of the model resident: counted later."""
    closing: list[Callable[[], None]] = field(default_factory=list)
    """What `close` calls: others keep memory of the device, too."""
    _pairs: dict[tuple[int, int, torch.dtype], PairBuffers] = field(default_factory=dict)

    def close(self) -> None:
        """Frees what is kept on the device, graphs included. No pass may follow."""
        for each in self.closing:
            each()
        self.closing.clear()
        self.uncounted.clear()
        self._pairs.clear()
        self.reads.close()

    @contextmanager
    def padded(self, live: torch.Tensor, live_tokens: int) -> Iterator[None]:
        """In the block passes have `live_tokens` tokens, as `live` tells the device; what follows is padding."""
        self.live, self.live_tokens = live, live_tokens
        try:
            yield
        finally:
            self.live, self.live_tokens = None, None

    def buffers(self, tokens: int, top_k: int, like: torch.Tensor) -> PairBuffers:
        """Buffers for the pairs of a pass. Those of `KEPT_TOKENS` are kept: they serve one layer after the other."""
        if tokens > KEPT_TOKENS:
            return PairBuffers.empty(tokens * top_k, like)
        key = (tokens * top_k, like.shape[-1], like.dtype)
        if key not in self._pairs:
            self._pairs[key] = PairBuffers.empty(tokens * top_k, like)
        return self._pairs[key]


@dataclass(frozen=True)
class PairBuffers:
    """What kernels write for each (token, choice) pair of one layer, on the device."""

    slots: torch.Tensor
    """Int32 [pairs], the slots of the pairs that are computed next, -1 for the others."""
    done: torch.Tensor
    """Int32 [pairs], 1 for those that were computed."""
    chosen: torch.Tensor
    """Int32 [pairs], their experts, -1 where there is none."""
    outputs: torch.Tensor
    """[pairs, hidden size], of those that were computed."""

    @classmethod
    def empty(cls, pairs: int, like: torch.Tensor) -> PairBuffers:
        """For hidden states such as `like`, [..., hidden size]."""
        slots, done, chosen = (torch.empty(pairs, dtype=torch.int32, device=like.device) for _ in range(3))
        return cls(slots, done, chosen, like.new_empty(pairs, like.shape[-1]))


class _Pass:
    """The pairs of one pass through one layer, computed as their experts become readable."""

    def __init__(self, layer: GroupedLayer, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        """`hidden` is [tokens, hidden size], `index` and `weights` [tokens, top-k]."""
        self.hidden, self.index, self.weights = hidden.contiguous(), index.contiguous(), weights.contiguous()
        self.top_k = index.shape[-1]
        self._layer = layer
        self.buffers = layer.tools.buffers(len(hidden), self.top_k, hidden)

    def resolve(self, *, first: bool) -> None:
        """Queues the look-up of all pairs (`first`), or of those that were not computed yet."""
        own, tools = self.buffers, self._layer.tools
        resolve(
            tools.launch,
            self.index,
            self.weights,
            tools.table.device_table[self._layer.number, : self._layer.count],
            own.slots,
            own.done,
            own.chosen,
            first=first,
            live=tools.live,
            top_k=self.top_k,
        )

    def compute(self) -> None:
        """Queues the experts of the pairs that were looked up."""
        own, ffn = self.buffers, self._layer.ffn
        # Each pair by itself, to bits that depend on no other token, or tiles.
        if len(self.hidden) <= BATCH_INVARIANT_TOKENS:
            ffn.run(self.hidden, own.slots, own.outputs, self.top_k)
        else:
            ffn.run_many(self.hidden, self.index, own.slots, own.outputs, self.top_k, self._layer.count)

    def put(self, pairs: Sequence[int], outputs: torch.Tensor) -> None:
        """Queues a copy of the `outputs` of `pairs`, [pairs, hidden size] on the CPU. They then count as computed."""
        own, device = self.buffers, self.hidden.device
        # Copies of pageable memory have left it when the calls return.
        rows = torch.tensor(pairs).to(device, non_blocking=True)
        own.outputs.index_copy_(0, rows, outputs.to(device, non_blocking=True))
        own.done.index_fill_(0, rows, 1)

    def combined(self, out: torch.Tensor | None) -> torch.Tensor:
        """Queues the sums over each token's pairs, times their weights: [tokens, hidden size], in `out` if given."""
        own, module = self.buffers, self._layer.module
        outputs = own.outputs
        if getattr(module, "has_post_expert_norm", False):
            outputs = module.post_expert_norm(outputs)
        out = torch.empty_like(self.hidden) if out is None else out.view(self.hidden.shape)
        combine(self._layer.tools.launch, outputs, self.weights, own.done, out)
        return out


class GroupedLayer(ExpertLayer):
    """A MoE layer whose experts are computed by grouped kernels, wherever their records lie in the slots."""

    def __init__(
        self,
        number: int,
        moe: ExpertsModule,
        experts: Experts,
        cache: ExpertCache,
        predictor: ExpertPredictor | None,
        ffn: GroupedFfn,
        tools: DeviceTools,
        host: HostExperts | None = None,
    ) -> None:
        """As the base class; `experts` are the plain form of `ffn`. `host` computes some of those that are missing."""
        super().__init__(number, moe, experts, cache, predictor)
        self.count = moe.experts
        self.module = experts.module
        self.ffn = ffn
        self.tools = tools
        self._host = host

    def compute(
        self,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See the base class. The hits are queued before the host reads `index`, once; with all resident, never.

        The result is in `out`, of the shape of `hidden`, where it is given.
        """
        own = self._pass(hidden, index, weights)
        resident = self._cache.slots_of(self.number) is not None
        self._cache.make_readable(self.number)
        self.tools.table.flush()
        own.resolve(first=True)
        if resident:
            self.count_later([self.number], own.buffers.chosen[None])
            own.compute()
        else:
            try:
                self._compute_as_they_arrive(own)
            except BaseException:
                # Kernels that are queued may read any slot.
                self._cache.released_all()
                raise
        return own.combined(out).view(hidden.shape)

    def draft(
        self,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See the base class. Asks nothing of the host: what the table has is computed, the rest is left out.

        `chosen` gets the expert of each pair, int32 [pairs], where it is given.
        """
        own = self._pass(hidden, index, weights)
        own.resolve(first=True)
        if chosen is not None:
            chosen.copy_(own.buffers.chosen)
        own.compute()
        return own.combined(out).view(hidden.shape)

    def _pass(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> _Pass:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return _Pass(self, flat, index.reshape(len(flat), -1), weights.reshape(len(flat), -1))

    def _compute_as_they_arrive(self, own: _Pass) -> None:
        """Queues the hits, reads the choice meanwhile, and queues the others as loans give them."""
        readable = set(self.tools.table.readable[self.number])
        predictor, hidden = self._predictor, own.hidden[: self.tools.live_tokens]
        scores = [] if predictor is None else predictor.queue_scores(self.number, hidden, own.top_k)
        host = self._host if len(hidden) <= MAX_TOKENS else None
        read = self.tools.reads.start([own.buffers.chosen, *scores, *([] if host is None else [hidden])])
        own.compute()
        chosen, *found = read.wait()
        rows, elsewhere, tasks = rows_of(chosen.tolist(), self.count), list[int](), list[Callable[[], None]]()
        wanted = in_order_of_use(rows)
        if predictor is not None:
            known = _router_scores(found[: len(scores)])
            predictor.enter_layer(self.number, wanted, hidden, known)
            tasks.append(partial(predictor.predict_next, self.number, hidden, own.top_k, known))
        if host is not None:
            elsewhere = host.part_of([each for each in wanted if not self._cache.holds(ExpertId(self.number, each))])
            tasks.append(partial(_compute_elsewhere, own, host, found[-1], rows, elsewhere))
        # The loads are on the link by then: it moves some experts while the CPU computes others.
        with closing(self._cache.borrow(self.number, wanted, partial(_run, tasks), elsewhere)) as loans:
            for loan in loans:
                if not readable.issuperset(loan.experts):
                    self.tools.table.flush()
                    own.resolve(first=False)
                    own.compute()

    def count_later(self, layers: Sequence[int], chosen: torch.Tensor) -> None:
        """Counts a request of each of `layers` once its choice, a row of int32 [layers, pairs], has come to the host.

        Every expert of the model is resident. Requests that have come meanwhile are counted now.
        """
        waiting = self.tools.uncounted
        while waiting and waiting[0][1].arrived():
            numbers, read = waiting.popleft()
            for layer, row in zip(numbers, read.wait()[0].tolist(), strict=True):
                wanted = in_order_of_use(rows_of(row, self._cache.store.experts[layer]))
                if self._cache.slots_of(layer) is not None:
                    self._cache.hit(layer, wanted)
        waiting.append((layers, self.tools.reads.start([chosen])))


def _run(tasks: Sequence[Callable[[], None]]) -> None:
    for task in tasks:
        task()


def _compute_elsewhere(
    own: _Pass, host: HostExperts, hidden: torch.Tensor, rows: Mapping[int, Sequence[int]], experts: Sequence[int]
) -> None:
    """Computes `experts` on the CPU, and queues their outputs; `hidden` is on the CPU as well."""
    if experts:
        own.put(*host.compute(hidden, rows, own.top_k, experts))


def _router_scores(found: list[torch.Tensor]) -> RouterScores:
    own, following = (*found, None, None)[:2]
    return RouterScores(None if own is None else own.float(), None if following is None else following.float())


def grouped(cache: ExpertCache, tools: DeviceTools, dtype: torch.dtype, help: CpuHelp | None = None) -> Grouped:
    """Makes the layers that there are kernels for, in a model of `dtype` whose experts are in `cache`.

    With `help` the CPU computes some of the experts that are missing.
    """

    def make(
        number: int, moe: ExpertsModule, experts: Experts, predictor: ExpertPredictor | None
    ) -> GroupedLayer | None:
        ffn = grouped_ffn(tools.launch, experts.module, moe, cache.region(number), dtype)
        if ffn is None:
            return None
        host = None if help is None else help.layer(number, experts.module, moe)
        return GroupedLayer(number, moe, experts, cache, predictor, ffn, tools, host)

    return make


def grouped_ffn(
    launch: Launcher, module: Any, moe: ExpertsModule, region: SlotRegion, dtype: torch.dtype
) -> GroupedFfn | None:
    """The kernels of one layer's experts, in the slots of `region`; None where there are none for them.

    `module` is transformers' experts module, and `dtype` the model's.
    """
    gate = gate_rule(module)
    if gate is None:
        return None
    try:
        up, down = (_matrix(module, moe, region, name, dtype) for name in (up_name(module), "down_proj"))
        return GroupedFfn(launch, region.memory, up, down, gate, dtype)
    except ValueError:
        # A format, or an order of rows, that no kernel reads.
        return None


def _matrix(module: Any, moe: ExpertsModule, region: SlotRegion, name: str, dtype: torch.dtype) -> GroupedMatrix:
    bias = moe.layout.part_offset(f"{name}_bias") if module.has_bias else None
    return GroupedMatrix(
        moe.formats[name],
        moe.matrix_shape(name),
        moe.layout.places(name),
        region.memory.device,
        transposed=name in moe.transposed,
        bias=bias,
        bias_dtype=dtype,
    )
