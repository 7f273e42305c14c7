"""How fast the kernels of experts and of attention are, at the shape of Qwen3-30B-A3B, in bf16 and in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.device.kernels.checks import INNER, OUTER, published
from bench.device.section import Found, SkippedError, Target
from bench.device.timing import device_ms, host_us, synchronize
from edgemoe.cache import accelerator
from edgemoe.cache.record import ALIGNMENT, RecordLayout, round_up
from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.triton.availability import missing
from edgemoe.model.pass_graph import DeviceCapturer
from edgemoe.plan import machine

EXPERTS, TOP_K = 128, 8
TURNS = 16
"""Choices of a graph, each of other experts: what one left in the card's caches is of no use to the next."""
REPLAYS = 20
FEW, MANY = (1, 5), (512, 4096)
"""Tokens, of a step and of a prompt's chunk."""
HEADS, KV_HEADS, WIDTH, CONTEXT = 32, 4, 128, 4608
CACHED = (512, 4096)
"""Tokens that one token attends to."""
MAX_ERROR = 2e-2


def measure(target: Target) -> Found:
    """By format: the host's time of the launches, the card's time in a graph, and bytes a second against its memory's.

    A dry run computes each once.
    """
    if reason := missing():
        raise SkippedError(reason)
    device = torch.device(target.device)
    figures: dict[str, Any] = {}
    for name, kind in published().items():
        layer = _Layer(kind, device, small=target.small)
        if target.small:
            layer.run(layer.choice(1))
            figures[name] = {"tokens": 1, "record_nbytes": layer.records.nbytes}
            break
        vram = machine.memory_speed(layer.memory) / 1e9
        figures[name] = {"vram_GBps": round(vram)}
        figures[name] |= {f"{tokens} tokens": layer.few(tokens, vram) for tokens in FEW}
        figures[name] |= {f"{tokens} tokens": layer.many(tokens) for tokens in MANY}
        del layer
    faults = [] if target.small else _attention(figures, device)
    return Found(figures, faults)


class _Layer:
    """The experts of one layer in slots, with kernels for them, in bf16 (in a dry run float32 and small)."""

    def __init__(self, kind: WeightFormat, device: torch.device, *, small: bool) -> None:
        from edgemoe.kernels.triton.activations import GateRule
        from edgemoe.kernels.triton.grouped_ffn import GroupedFfn, GroupedMatrix
        from edgemoe.kernels.triton.launcher import Launcher

        self.dtype = torch.float32 if small else torch.bfloat16
        self.width, inner = (64, 32) if small else (OUTER, INNER)
        self.experts = 2 * TOP_K if small else EXPERTS
        shapes = {"gate_up_proj": (2 * inner, self.width), "down_proj": (self.width, inner)}
        self.records = RecordLayout([part for name, shape in shapes.items() for part in kind.parts(name, shape)])
        # Bytes of 32 to 63 are ordinary numbers in every format.
        slot_nbytes = round_up(self.records.nbytes, ALIGNMENT)
        self.memory = torch.empty(self.experts, slot_nbytes, dtype=torch.uint8, device=device).random_(32, 64)
        self.launcher = Launcher()
        up, down = (GroupedMatrix(kind, shape, self.records.places(name), device) for name, shape in shapes.items())
        self._ffn = GroupedFfn(self.launcher, self.memory, up, down, GateRule("silu", True), self.dtype)
        self._table = torch.randperm(self.experts, device=device).int()
        self._device = device
        self._generator = torch.Generator().manual_seed(0)

    def choice(self, tokens: int) -> _Choice:
        """A random choice of experts for each of `tokens` tokens."""
        chosen = [torch.randperm(self.experts, generator=self._generator)[:TOP_K] for _ in range(tokens)]
        return _Choice(torch.stack(chosen).to(self._device), self.width, self.dtype)

    def run(self, choice: _Choice) -> None:
        """Queues a whole layer: four launches."""
        from edgemoe.kernels.triton.grouped_ffn import combine, resolve

        resolve(
            self.launcher, choice.ids, choice.weights, self._table, choice.slots, choice.done, choice.chosen,
            first=True, live=None, top_k=TOP_K,
        )  # fmt: skip
        self._ffn.run(choice.hidden, choice.slots, choice.outputs, TOP_K)
        combine(self.launcher, choice.outputs, choice.weights, choice.done, choice.out)

    def few(self, tokens: int, vram: float) -> dict[str, Any]:
        """Microseconds of a layer and of its two products, and GB/s of these; `vram` is the memory's GB/s."""
        choices = [self.choice(tokens) for _ in range(TURNS)]
        for each in choices:
            self.run(each)
        synchronize()
        products = _graph_ms([partial(self._multiply, each) for each in choices], self._device)
        layer = _graph_ms([partial(self.run, each) for each in choices], self._device)
        nbytes = sum(len(each.ids.unique()) for each in choices) / TURNS * self.records.nbytes
        speed = nbytes / products / 1e6
        return {
            "launch_us": host_us(lambda: self._multiply(choices[0])),
            "layer_launch_us": host_us(lambda: self.run(choices[0])),
            "graph_us": round(1e3 * products, 1),
            "layer_graph_us": round(1e3 * layer, 1),
            "GBps": round(speed),
            "of_vram": round(speed / vram, 2),
        }

    def many(self, tokens: int) -> dict[str, Any]:
        """Milliseconds of the two products for a prompt's tokens, and TFLOP/s."""
        choice = self.choice(tokens)
        slots = self._table[choice.ids.flatten()]

        def run() -> None:
            self._ffn.run_many(choice.hidden, choice.ids, slots, choice.outputs, TOP_K, self.experts)

        run()
        taken = min(device_ms(run) for _ in range(3))
        return {"ms": round(taken, 3), "TFLOPps": round(6 * tokens * TOP_K * OUTER * INNER / taken / 1e9, 1)}

    def _multiply(self, choice: _Choice) -> None:
        self._ffn.run(choice.hidden, choice.slots, choice.outputs, TOP_K)


class _Choice:
    """The pairs of a pass, with buffers for what kernels write."""

    def __init__(self, ids: torch.Tensor, width: int, dtype: torch.dtype) -> None:
        self.ids, pairs, device = ids, ids.numel(), ids.device
        self.hidden = torch.randn(len(ids), width, device=device).to(dtype)
        self.weights = torch.full(ids.shape, 1 / TOP_K, device=device, dtype=dtype)
        self.slots, self.done, self.chosen = (torch.zeros(pairs, dtype=torch.int32, device=device) for _ in range(3))
        self.outputs = torch.zeros(pairs, width, dtype=dtype, device=device)
        self.out = torch.zeros_like(self.hidden)


def _graph_ms(work: list[Callable[[], object]], device: torch.device) -> float:
    """The card's milliseconds for one of `work`, all of which are captured in one graph."""
    graph = accelerator.Graph()
    with DeviceCapturer(device).stream():
        graph.begin()
        for each in work:
            each()
        graph.end()

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    replay()
    return min(device_ms(replay) for _ in range(3)) / REPLAYS / len(work)


def _attention(figures: dict[str, Any], device: torch.device) -> list[str]:
    """Microseconds of a layer's attention in a graph, for one token; a fault where PyTorch's gives other values."""
    from edgemoe.kernels.triton.attention import DecodeAttention
    from edgemoe.kernels.triton.launcher import Launcher
    from edgemoe.kernels.triton.pass_layout import Buffer, PassLayout, PassSequence, buffer_table

    attention = DecodeAttention(Launcher(), HEADS, KV_HEADS, WIDTH, WIDTH, torch.bfloat16, context=CONTEXT)
    layout, faults = PassLayout(1, 1, CONTEXT), []
    for cached in CACHED:
        keys, values = (torch.randn(1, KV_HEADS, CONTEXT, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(2))
        query, key, value = (
            torch.randn(1, 1, heads, WIDTH, device=device, dtype=torch.bfloat16).transpose(1, 2)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        host = torch.zeros(layout.size, dtype=torch.int64)
        layout.fill(host, [PassSequence.causal(cached, 1, buffer_table([Buffer(keys, values)]))])
        metadata = host.to(device)
        found = attention.attend(query, key, value, metadata, 0)[0, 0].float()
        seen, given = (own[:, :, : cached + 1].float() for own in (keys, values))
        expected = scaled_dot_product_attention(query.float(), seen, given, enable_gqa=True)[0, :, 0]
        error = float((found - expected).abs().max() / expected.abs().max())
        taken = _graph_ms([partial(attention.attend, query, key, value, metadata, 0)] * TURNS, device)
        figures[f"attention, {cached} tokens"] = {"graph_us": round(1e3 * taken, 1), "error": float(f"{error:.1e}")}
        if not error <= MAX_ERROR:
            faults.append(f"attention over {cached} tokens: an error of {error:.1e}")
    return faults
