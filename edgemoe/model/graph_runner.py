"""Passes of few tokens on a device, whose dense part is replayed and whose experts are computed in between."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from edgemoe.errors import is_device_or_memory_error, reason
from edgemoe.experts.draft_routing import DraftRouting
from edgemoe.experts.grouped_layer import GroupedLayer
from edgemoe.kernels.triton.device_linear import FewTokenLinears
from edgemoe.kernels.triton.pass_layout import Buffer, PassLayout, PassSequence, buffer_table
from edgemoe.model.head_runner import HiddenStates
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.packed_attention import PackedAttention
from edgemoe.model.pass_graph import Capture, DevicePasses, GraphAttention, PassGraph
from edgemoe.model.pass_logits import LogitsRows, split_rows
from edgemoe.model.row_layers import GrowingLayer, WindowLayer
from edgemoe.model.sequential_runner import PROBE_TOKENS, PassInput, SequentialRunner
from edgemoe.quiet import quiet_transformers

TOKENS = (1, 2, 4, 8, 16)
"""Tokens of the passes that are captured: one with fewer is padded."""
PIECES, WHOLE = "", "whole"
"""Kinds of graphs: those between the MoE layers, and those with the experts of a model that are all resident."""


class GraphRunner:
    """Runs several sequences in one pass by graphs, for models where `refusal` is empty. As `PackedRunner`."""

    def __init__(
        self,
        runner: SequentialRunner,
        attention: PackedAttention,
        passes: DevicePasses,
        states: HiddenStates | None = None,
    ) -> None:
        """Captures a pass and compares it with `runner`, on a few tokens and without experts.

        `states` takes the hidden states of passes, for a draft head. Raises what the device or the memory raises.
        """
        self._states = states
        self._runner = runner
        self._attention = attention
        self._tools, self._capturer, self._context = passes
        self._graphs: dict[tuple[int, str], PassGraph] = {}
        """By tokens, and their kind."""
        self._refusals: dict[str, str] = {}
        """Why some kind is not captured."""
        self._tools.closing.append(self.close)
        self.refusal = self._refusal()
        """Why the model cannot be captured, in a sentence; empty where it can."""

    def close(self) -> None:
        """Drops all graphs and their memory; `fits` holds for no pass afterwards. Idempotent."""
        self._graphs.clear()
        self.refusal = "the engine is closed"

    def fits(self, inputs: Sequence[PassInput]) -> bool:
        """Whether a graph serves the pass of `inputs`: few tokens, routed as the model says or among residents."""
        tokens = sum(len(item.tokens) for item in inputs)
        if self.refusal or tokens > TOKENS[-1] or not all(map(self._fits, inputs)):
            return False
        return self._kind(tokens) is not None

    def rows(self, inputs: Sequence[PassInput]) -> list[LogitsRows]:
        """As `PackedRunner.rows`; only where `fits`. The logits are valid until the next pass."""
        tokens, routing = sum(len(item.tokens) for item in inputs), self._runner.layers.override
        kind = self._kind(tokens)
        assert kind is not None
        graph = self._graph(tokens, kind)
        with self._runner.passing(inputs, kind="graph"):
            self._fill(graph, inputs)
            self._replay(graph, tokens)
            if kind == WHOLE:
                self._count(graph)
            if isinstance(routing, DraftRouting):
                for shares, wanted in zip(routing.wanted, graph.wanted, strict=True):
                    shares.append(wanted[:tokens])
            if self._states is not None and graph.hidden is not None:
                # The next replay writes to the same memory.
                self._states.add(graph.hidden[:tokens].clone())
            for item in inputs:
                for layer in item.cache.kv.layers:
                    layer.advance(len(item.tokens))
                item.cache.tokens += len(item.tokens)
            return self._outputs(graph.logits, inputs)

    def _fits(self, item: PassInput) -> bool:
        layers = getattr(item.cache.kv, "layers", ())
        ready = bool(layers) and all(layer.is_initialized for layer in layers)
        return ready and item.cache.tokens + TOKENS[-1] <= self._context

    def _kind(self, tokens: int) -> str | None:
        """The kind of graph that serves a pass as passes are routed now; None where there is none.

        It is `PIECES`, `WHOLE` or the rule of a draft. Those that can fail are captured here.
        """
        layers, routing = self._runner.layers, self._runner.layers.override
        if routing is None:
            whole = layers.as_usual and layers.all_resident and self._captures(tokens, WHOLE)
            return WHOLE if whole else PIECES
        if not isinstance(routing, DraftRouting) or routing.asks_host:
            return None
        return routing.rule if self._captures(tokens, routing.rule) else None

    def _captures(self, tokens: int, kind: str) -> bool:
        """Whether a graph of `kind` can be captured, and is."""
        if kind in self._refusals:
            return False
        try:
            self._graph(tokens, kind)
        except Exception as error:
            if _is_of_machine(error):
                raise
            self._refusals[kind] = reason(error)
        return kind not in self._refusals

    def _graph(self, tokens: int, kind: str) -> PassGraph:
        key = next(size for size in TOKENS if size >= tokens), kind
        if key not in self._graphs:
            self._graphs[key] = self._captured(*key)
        return self._graphs[key]

    def _captured(self, tokens: int, kind: str) -> PassGraph:
        runner, tools, routing = self._runner, self._tools, self._runner.layers.override
        layers = runner.start(1).kv.layers
        graph = PassGraph(PassLayout(tokens, len(layers), self._context), runner.device)
        windows = [layer.sliding_window if layer.is_sliding else None for layer in layers]
        attend = GraphAttention(tools.launch, graph.metadata, self._context, windows)

        def forward(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            with self._taking() as taken:
                logits: torch.Tensor = runner.model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
            graph.hidden = taken[-1] if taken else None
            return logits

        linears = FewTokenLinears(tools.launch, TOKENS[-1])
        captured = Capture(graph, self._capturer, runner.layers, self._attention, attend, linears, forward)
        with torch.inference_mode(), quiet_transformers(), tools.padded(graph.live, tokens):
            if isinstance(routing, DraftRouting):
                captured.draft(routing.alike())
            elif kind == WHOLE:
                # From now on nothing changes in the table.
                runner.layers.show_residents()
                captured.whole()
            else:
                captured.between_layers()
        return graph

    def _taking(self) -> AbstractContextManager[list[torch.Tensor]]:
        """In the block the list gets the hidden states of passes, where a head reads them."""
        return nullcontext(list[torch.Tensor]()) if self._states is None else self._states.taking()

    def _fill(self, graph: PassGraph, inputs: Sequence[PassInput]) -> None:
        """Makes room for the pass's rows, and brings what it is about to the device."""
        sequences = [_sequence(item) for item in inputs]
        ids = [token for item in inputs for token in item.tokens]
        size = graph.layout.size
        graph.layout.fill(graph.host[:size], sequences)
        graph.host[size:] = 0
        graph.host[size : size + len(ids)] = torch.tensor(ids)
        # A copy of pageable memory has left it when the call returns, so that `host` may be filled again.
        graph.inputs.copy_(graph.host, non_blocking=True)

    def _replay(self, graph: PassGraph, tokens: int) -> None:
        layers = self._runner.layers
        with self._tools.padded(graph.live, tokens):
            for piece in graph.pieces:
                piece.graph.replay()
                if piece.layer is None:
                    continue
                given = piece.hidden, piece.index, piece.weights
                if layers.as_usual and isinstance(piece.layer, GroupedLayer):
                    piece.layer.compute(*given, out=piece.out)
                else:
                    piece.out.copy_(layers.forward(piece.layer, *given))

    def _count(self, graph: PassGraph) -> None:
        """Has the requests of a pass counted that the host was not asked for."""
        layers = self._runner.layers
        first = layers.layers[0]
        assert isinstance(first, GroupedLayer)
        first.count_later(range(layers.in_passes), graph.chosen)

    def _outputs(self, logits: torch.Tensor, inputs: Sequence[PassInput]) -> list[LogitsRows]:
        wanted, first, parts = [], 0, []
        for item in inputs:
            first += len(item.tokens)
            wanted.append(logits[first - item.outputs : first])
            parts.append(item.outputs)
        return split_rows(wanted[0] if len(wanted) == 1 else torch.cat(wanted), parts)

    def _refusal(self) -> str:
        layers = self._runner.layers.layers
        if not all(isinstance(layer, GroupedLayer) for layer in layers):
            return "the experts of some layer have no kernel on a device"
        if not all(type(layer) in (GrowingLayer, WindowLayer) for layer in self._runner.start(1).kv.layers):
            return "some layers keep a state and no rows"
        try:
            return "" if self._agrees() else "a replayed pass gives other logits"
        except Exception as error:
            if _is_of_machine(error):
                raise
            return f"a pass cannot be captured: {reason(error)}"

    def _agrees(self) -> bool:
        """Whether replays at two places of a sequence, with and without padding, give the logits of plain steps."""
        runner = self._runner
        prompt = [(17 * place + 3) % runner.vocabulary for place in range(PROBE_TOKENS)]
        steps = [prompt[:3], prompt[3:4], prompt[:1]]
        plain, own = runner.start(4 * PROBE_TOKENS), runner.start(4 * PROBE_TOKENS)
        with runner.layers.silenced(), quiet_transformers():
            for cache in (plain, own):
                runner.step(cache, prompt)
            for step in steps:
                expected = runner.run([PassInput(plain, step, every=True)])[0]
                (found,) = self.rows([PassInput(own, step, every=True)])
                whole = found if isinstance(found, torch.Tensor) else found.whole
                if not runner.agree(expected, whole):
                    return False
        return True


def _is_of_machine(error: Exception) -> bool:
    """Whether the machine failed. What a capture does not permit is told as an error of the device, too."""
    return is_device_or_memory_error(error) and "captur" not in str(error)


def _sequence(item: PassInput) -> PassSequence:
    """Where the rows of `item` lie, after room for them was made."""
    cache, count = item.cache, len(item.tokens)
    table = _buffers(cache, count)
    if item.tree_mask is None:
        return PassSequence.causal(cache.tokens, count, table)
    mask = item.tree_mask
    seen = [sum(1 << place for place in row.nonzero().flatten().tolist()) for row in mask.ancestors]
    return PassSequence(mask.base, seen, table, len(mask.depths) - count)


def _buffers(cache: SequenceCache, tokens: int) -> torch.Tensor:
    """The table of the cache's buffers, kept with it until one of them is replaced."""
    layers: Sequence[Any] = cache.kv.layers
    replaced = [layer.make_room(tokens) for layer in layers]
    if cache.buffer_table is None or any(replaced):
        cache.buffer_table = buffer_table(Buffer(*layer.buffers) for layer in layers)
    return cache.buffer_table
