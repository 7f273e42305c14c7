"""Two grouped kernels over a pool of experts, which find their slots in a table, against the same in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear, silu

from bench.device.section import Found, Target
from bench.device.timing import device_ms, host_us, synchronize
from bench.device.triton_import import kernels

TOP_K = 8
EXPERTS = 128
REPLAYS = 50


class Case:
    """`tokens` tokens, each routed to `TOP_K` of the experts of one layer."""

    def __init__(self, target: Target, tokens: int) -> None:
        device = torch.device(target.device)
        # The interpreter cuts float32 off to bf16 where the card rounds, so that a dry run computes in float32.
        self.kind = torch.bfloat16 if target.cuda else torch.float32
        self.width, self.rows, slots = (2048, 768, 256) if target.cuda else (128, 64, 160)
        self.row_block, self.block = (32, 128) if target.cuda else (32, 64)
        self.pairs = TOP_K * tokens
        self.stride = 3 * self.width * self.rows
        torch.manual_seed(0)
        self.pool = torch.randn(slots, self.stride, device=device).mul_(self.width**-0.5).to(self.kind)
        self.table = torch.randperm(slots, device=device)[:EXPERTS].int()
        self.hidden = torch.randn(tokens, self.width, device=device).to(self.kind)
        chosen = [torch.randperm(EXPERTS, device=device)[:TOP_K] for _ in range(tokens)]
        self.experts = torch.stack(chosen).int().flatten()
        self.inner = torch.empty(self.pairs, self.rows, dtype=self.kind, device=device)
        self.outputs = torch.full((self.pairs, self.width), float("nan"), dtype=self.kind, device=device)
        self._kernels = kernels()

    def compute(self) -> None:
        """Queues both kernels."""
        language = self._kernels.tl
        kind = {torch.bfloat16: language.bfloat16, torch.float32: language.float32}[self.kind]
        settings = {"row_block": self.row_block, "block": self.block, "kind": kind, "num_warps": 4}
        where = self.pool, self.table, self.experts
        self._kernels.up_gate[(self.pairs, self.rows // self.row_block)](
            self.hidden, *where, self.inner, 0, self.stride, 0,
            top_k=TOP_K, width=self.width, rows=self.rows, **settings,
        )  # fmt: skip
        self._kernels.down[(self.pairs, self.width // self.row_block)](
            self.inner, *where, self.outputs, 0, self.stride, 2 * self.width * self.rows,
            width=self.rows, rows=self.width, **settings,
        )  # fmt: skip

    def error(self) -> float:
        """The largest relative error of a token and expert."""
        errors = []
        for pair, expert in enumerate(self.experts.tolist()):
            weights = self.pool[int(self.table[expert])].float()
            both, back = weights.split([2 * self.width * self.rows, self.width * self.rows])
            gate, up = linear(self.hidden[pair // TOP_K].float(), both.view(-1, self.width)).chunk(2)
            right = linear(silu(gate) * up, back.view(self.width, self.rows))
            errors.append(float((self.outputs[pair].float() - right).norm() / right.norm()))
        # Not by `max`, which may pass a NaN over.
        return float(torch.tensor(errors).max())


def measure(target: Target) -> Found:
    """Errors, and on a card the times of a launch from Python and of a replayed graph."""
    kernels()
    limit = 1e-2 if target.cuda else 1e-5
    figures: dict[str, Any] = {}
    faults: list[str] = []
    for tokens in (1, 5):
        case = Case(target, tokens)
        case.compute()
        synchronize()
        error = case.error()
        name = f"{tokens} tokens"
        figures[name] = {"relative_error": float(f"{error:.1e}"), **(_times(case) if target.cuda else {})}
        if not error < limit:
            faults.append(f"{name}: a relative error of {error:.1e}, where {limit:.0e} is allowed")
    return Found(figures, faults)


def _times(case: Case) -> dict[str, float]:
    launched = host_us(case.compute)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.compute()

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    replay()
    taken = device_ms(replay) / REPLAYS
    nbytes = len(set(case.experts.tolist())) * case.stride * case.kind.itemsize
    return {"launch_us": launched, "graph_us": round(1e3 * taken, 1), "GBps": round(nbytes / taken / 1e6)}
