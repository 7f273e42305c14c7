"""The dense part of a pass of few tokens as graphs of the device: captured once, replayed between the MoE layers.

A graph has everything but the experts: embedding, norms, attention, routers, head. What a pass is about - tokens,
positions, lengths and addresses of KV buffers - it reads from one tensor, so that a replay serves any sequences.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from edgemoe.cache import accelerator
from edgemoe.experts.draft_routing import DraftRouting
from edgemoe.experts.expert_layer import ExpertLayer, ExpertLayers
from edgemoe.experts.grouped_layer import DeviceTools, GroupedLayer
from edgemoe.kernels.triton.attention import DecodeAttention
from edgemoe.kernels.triton.device_linear import FewTokenLinears
from edgemoe.kernels.triton.launcher import Launcher
from edgemoe.kernels.triton.pass_layout import PassLayout
from edgemoe.model.packed_attention import PackedAttention

DRAFT_ROOM = 64
"""Tokens of drafts that may lie behind a sequence's last one."""


class Graph(Protocol):
    """Work that is captured from `begin` to `end`, and queued by `replay`; see `accelerator.Graph`."""

    def begin(self, pool: Any = None) -> None:
        """Starts capturing."""
        ...

    def end(self) -> None:
        """Ends capturing."""
        ...

    def replay(self) -> None:
        """Queues the work."""
        ...


class Capturer(Protocol):
    """Makes graphs on one device."""

    def graph(self) -> Graph:
        """An empty graph."""
        ...

    def pool(self) -> Any:
        """Memory that the graphs of one model share."""
        ...

    def stream(self) -> AbstractContextManager[Any]:
        """In the block, work is queued on a stream that can be captured."""
        ...

    def make_room(self) -> None:
        """Frees memory that a capture could not: to be called before each."""
        ...


class DevicePasses(NamedTuple):
    """What graphs of passes are made with."""

    tools: DeviceTools
    capturer: Capturer
    context: int
    """Tokens of a sequence at most, drafts included."""


class DeviceCapturer:
    """Captures on an accelerator. Has not run on a card yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None
        """One for all captures: libraries keep a workspace for each stream, and blocks of memory belong to one."""

    def graph(self) -> accelerator.Graph:
        """See `Capturer`."""
        return accelerator.Graph()

    def pool(self) -> Any:
        """See `Capturer`."""
        if self._pool is None:
            self._pool = accelerator.new_graph_pool()
        return self._pool

    @contextmanager
    def stream(self) -> Iterator[None]:
        """See `Capturer`."""
        if self._stream is None:
            self._stream = accelerator.new_stream(self._device)
        before, stream = accelerator.current_stream(self._device), self._stream
        stream.wait_stream(before)
        try:
            with accelerator.on_stream(stream):
                yield
        finally:
            before.wait_stream(stream)

    def make_room(self) -> None:
        """See `Capturer`: PyTorch gives back nothing of what it keeps while a capture is under way."""
        gc.collect()
        accelerator.synchronize(self._device)
        accelerator.release_unused()


@dataclass(frozen=True)
class Piece:
    """A graph that ends before a MoE layer, or with the logits, and what it hands to the layer."""

    graph: Graph
    layer: ExpertLayer | None
    """The layer to compute after the replay; None after the last piece."""
    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    """What the layer is called with; of the last piece, nothing."""
    out: torch.Tensor
    """Where the layer's output belongs, of the shape of `hidden`."""


class PassGraph:
    """A pass of `tokens` tokens, some of which may be padding. Its tensors stay: replays read and write them."""

    def __init__(self, layout: PassLayout, device: torch.device) -> None:
        self.layout = layout
        self.tokens = layout.tokens
        self.host = torch.zeros(layout.size + self.tokens, dtype=torch.int64)
        """What `inputs` is filled with: the metadata of `layout`, then the token ids; on the CPU."""
        self.inputs = torch.zeros(layout.size + self.tokens, dtype=torch.int64, device=device)
        self.metadata = self.inputs[: layout.size]
        self.ids = self.inputs[layout.size :].view(1, -1)
        self.live = layout.live(self.metadata)
        self.pieces: list[Piece] = []
        self.logits = torch.empty(0)
        """[tokens, vocabulary], written by the last piece."""
        self.hidden: torch.Tensor | None = None
        """[tokens, kinds, hidden size], written by the last piece, where a draft head reads hidden states."""
        self.chosen = torch.empty(0, 0, dtype=torch.int32)
        """Of a pass with every expert resident: the experts of each layer's pairs, int32 [layers, pairs]."""
        self.wanted: list[torch.Tensor] = []
        """Of a draft: by layer, the routing weights that it would have had, float32 [tokens, experts]."""


class GraphAttention:
    """The attention of a captured pass, over KV buffers that its metadata names. For `PackedAttention.on_device`."""

    def __init__(self, launcher: Launcher, metadata: torch.Tensor, context: int, windows: list[int | None]) -> None:
        """`windows[layer]` is the sliding window of the KV cache's layer; `context` bounds a sequence's tokens."""
        self._launcher = launcher
        self._metadata = metadata
        self._context = context
        self._windows = windows
        self._made: dict[tuple[Any, ...], DecodeAttention] = {}

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """[1, tokens, heads, value width]. Raises NotImplementedError for attention that no kernel computes."""
        heads, kv_heads, width, value_width = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        refusal = DecodeAttention.refusal(heads, kv_heads, width, value_width, query.dtype, options)
        if refusal:
            raise NotImplementedError(refusal)
        number, window = module.layer_idx, self._windows[module.layer_idx]
        scaling, softcap = options.get("scaling"), options.get("softcap")
        shape = (heads, kv_heads, width, value_width, query.dtype, scaling, softcap, window)
        if shape not in self._made:
            self._made[shape] = DecodeAttention(
                self._launcher,
                *shape[:5],
                context=self._context,
                scaling=scaling,
                softcap=softcap,
                window=window,
            )
        return self._made[shape].attend(query, key, value, self._metadata, number, options.get("s_aux"))


class Capture(NamedTuple):
    """What passes of one number of tokens are captured with. Each method fills a graph.

    They raise what `forward` raises, and RuntimeError where something in it cannot be captured.
    """

    graph: PassGraph
    capturer: Capturer
    layers: ExpertLayers
    attention: PackedAttention
    attend: GraphAttention
    linears: FewTokenLinears
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """The logits [tokens, vocabulary] of ids and positions, [1, tokens]."""

    def between_layers(self) -> None:
        """Captures a pass in pieces between the MoE layers."""

        def skip(layer: ExpertLayer, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(hidden)

        pieces = _Pieces(self.capturer)
        self._twice(pieces, self.layers.captured(skip), self.layers.captured(pieces.at_experts))

    def draft(self, routing: DraftRouting) -> None:
        """Captures a pass routed by `routing`, in one piece with the experts, since it asks the host nothing."""
        with self.layers.overriding(routing):
            self._twice(_Pieces(self.capturer), nullcontext(), nullcontext())
        # The first ones are those of the pass that was not captured.
        self.graph.wanted = [wanted for _, wanted in routing.wanted]

    def whole(self) -> None:
        """Captures a pass that finds every expert of the model resident, in one piece with the experts."""
        graph, layers = self.graph, self.layers

        def draft(layer: ExpertLayer, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            assert isinstance(layer, GroupedLayer)
            pairs = index.numel()
            if not graph.chosen.numel():
                # The layers of a model choose equally many.
                graph.chosen = torch.full((layers.in_passes, pairs), -1, dtype=torch.int32, device=index.device)
            return layer.draft(hidden, index, weights, chosen=graph.chosen[layer.number, :pairs])

        self._twice(_Pieces(self.capturer), layers.captured(draft), layers.captured(draft))

    def _twice(
        self, pieces: _Pieces, first: AbstractContextManager[None], second: AbstractContextManager[None]
    ) -> None:
        """Runs the pass in `first`, in which libraries and kernels prepare themselves, and captures it in `second`."""
        graph = self.graph
        positions = graph.layout.positions(graph.metadata)
        with self.attention.captured(self.attend), self.capturer.stream(), self.linears:
            with first:
                self.forward(graph.ids, positions)
            self.capturer.make_room()
            with second, pieces.capturing():
                graph.logits = self.forward(graph.ids, positions)
        graph.pieces = pieces.finished(graph.logits)


class _Pieces:
    """The pieces of a capture under way."""

    def __init__(self, capturer: Capturer) -> None:
        self._capturer = capturer
        self._pieces: list[Piece] = []
        self._open: Graph | None = None

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Captures the work of the block; the graph that is open at its end is the last one."""
        self._begin()
        try:
            yield
        except BaseException:
            self._abandon()
            raise
        self._last = self._end()

    def at_experts(
        self, layer: ExpertLayer, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Ends a piece before a MoE layer, and begins the next one with its output."""
        graph = self._end()
        out = torch.empty_like(hidden)
        self._pieces.append(Piece(graph, layer, hidden, index, weights, out))
        self._begin()
        return out

    def finished(self, logits: torch.Tensor) -> list[Piece]:
        """All pieces, in the order of their replay."""
        nothing = logits.new_empty(0)
        return [*self._pieces, Piece(self._last, None, nothing, nothing, nothing, nothing)]

    def _begin(self) -> None:
        self._open = self._capturer.graph()
        self._open.begin(self._capturer.pool())

    def _end(self) -> Graph:
        graph, self._open = self._open, None
        assert graph is not None
        graph.end()
        return graph

    def _abandon(self) -> None:
        graph, self._open = self._open, None
        if graph is not None:
            try:
                graph.end()
            except RuntimeError:
                # The capture is invalid already: its error is on the way.
                return
