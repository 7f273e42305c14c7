"""The feed-forward networks of one MoE layer's experts, computed from records in slots.

`PlainExperts` is the reference: one expert after the other, in PyTorch, on any device. `FastExperts` uses CPU kernels
for experts with few tokens: they read each weight once, at memory speed. Both follow a family's conventions
(transposed, biased, gated) as transformers declares them on its experts module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from edgemoe.cache.record import RecordLayout
from edgemoe.cache.slots import SlotPool
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.kernels.cpu.slot_matrix import SlotMatrix
from edgemoe.kernels.cpu.threads import KernelThreads, kernels_have_the_cores


class TokenGroups:
    """The (token, expert) pairs of one pass through a layer, grouped by expert.

    `hidden` is [tokens, hidden size]. `outputs` is [tokens * top-k, hidden size], one row per pair. Experts write
    their rows in any order, so the result does not depend on the order in which records arrive.
    """

    def __init__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: int) -> None:
        """`index` and `weights` are [tokens, top-k], the chosen experts and their routing weights.

        `experts` is the number of experts in the layer: a choice beyond it names no expert.
        """
        self.hidden = hidden
        self.top_k = index.shape[-1]
        rows: dict[int, list[int]] = {}
        # Some families give "no expert" the weight 0: it causes no load.
        for pair, expert in enumerate(index.masked_fill(weights == 0, -1).reshape(-1).tolist()):
            if 0 <= expert < experts:
                rows.setdefault(expert, []).append(pair)
        self.rows: Mapping[int, list[int]] = rows
        """The pairs of each chosen expert, ascending. A choice that names no expert is in none: its output row is 0."""
        pairs = index.numel()
        complete = sum(map(len, rows.values())) == pairs
        make = hidden.new_empty if complete else hidden.new_zeros
        self.outputs = make(pairs, hidden.shape[-1])

    @property
    def wanted(self) -> list[int]:
        """The experts to borrow, by ascending number of tokens, then by their last token.

        The last ones count as used most recently, and so stay resident longest: an expert of many tokens is the one
        most likely to be chosen again soon.
        """
        return sorted(self.rows, key=lambda expert: (len(self.rows[expert]), self.rows[expert][-1]))

    def tokens(self, rows: Sequence[int]) -> list[int]:
        """The token number of each pair in `rows`."""
        return [row // self.top_k for row in rows]


class Experts(ABC):
    """Computes experts of one layer from their records in slots."""

    row_multiple = 1
    """An expert's tokens are padded to a multiple of this; the padding rows are dropped."""

    def __init__(self, module: Any, moe: ExpertsModule, pool: SlotPool) -> None:
        """`module` is transformers' experts module without its weights; `moe` says how `pool`'s slots hold them."""
        self.module = module
        self.pool = pool
        self._layout = moe.layout
        self._formats = moe.formats

    @abstractmethod
    def compute(self, groups: TokenGroups, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Writes `groups.outputs` for the pairs of `experts`, whose records are in `slots`, pinned."""

    def _one(self, groups: TokenGroups, expert: int, slot: int) -> None:
        """The reference arithmetic of one expert."""
        module, rows = self.module, groups.rows[expert]
        views = self.pool.views(slot, self._layout)
        tokens = groups.tokens(rows)
        x = groups.hidden[tokens + tokens[-1:] * (-len(tokens) % self.row_multiple)]
        inner = self._linear(x, views, "gate_up_proj" if module.has_gate else "up_proj")
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        outer = self._linear(inner, views, "down_proj")[: len(rows)]
        groups.outputs[rows] = outer.to(groups.outputs.dtype)

    def _linear(self, x: torch.Tensor, views: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        weight = self._formats[name].dequantize(views, name)
        weight = weight.t() if self.module.is_transposed else weight
        product = F.linear(x.to(weight.dtype), weight)
        # Added separately, as in transformers: a fused bias rounds differently in bf16.
        return product + views[f"{name}_bias"] if self.module.has_bias else product


class PlainExperts(Experts):
    """The reference arithmetic for every expert."""

    def compute(self, groups: TokenGroups, experts: Sequence[int], slots: Sequence[int]) -> None:
        """See the base class."""
        for expert, slot in zip(experts, slots, strict=True):
            self._one(groups, expert, slot)


class FastExperts(Experts):
    """Kernels for experts with few tokens, the reference arithmetic for the others. CPU only."""

    # PyTorch compiles and keeps CPU code for every number of rows, which differs between the experts of a prefill.
    row_multiple = 16

    def __init__(self, module: Any, moe: ExpertsModule, pool: SlotPool, threads: KernelThreads) -> None:
        """As the base class; `fits` must hold. `threads` run the kernels."""
        super().__init__(module, moe, pool)
        self._threads = threads
        up = "gate_up_proj" if module.has_gate else "up_proj"
        self._up = SlotMatrix(pool, moe.layout, up, module.is_transposed)
        self._down = SlotMatrix(pool, moe.layout, "down_proj", module.is_transposed)
        self._max_tokens = min(self._up.max_tokens, self._down.max_tokens)

    @staticmethod
    def fits(module: Any, layout: RecordLayout) -> bool:
        """Whether the kernels support the dtypes and the orientation that this family stores its experts in."""
        up = "gate_up_proj" if module.has_gate else "up_proj"
        return all(SlotMatrix.fits(layout, name, module.is_transposed) for name in (up, "down_proj"))

    def compute(self, groups: TokenGroups, experts: Sequence[int], slots: Sequence[int]) -> None:
        """See the base class."""
        pairs = list(zip(experts, slots, strict=True))
        limit = self._max_tokens if kernels_have_the_cores(self._threads) else 0
        few = [pair for pair in pairs if len(groups.rows[pair[0]]) <= limit]
        if few:
            self._few(groups, few)
        for expert, slot in pairs:
            if len(groups.rows[expert]) > limit:
                self._one(groups, expert, slot)

    def _few(self, groups: TokenGroups, few: Sequence[tuple[int, int]]) -> None:
        """The kernels' arithmetic for all of `few`, (expert, slot) each, in one call per matrix."""
        module = self.module
        rows = [row for expert, _ in few for row in groups.rows[expert]]
        starts = np.cumsum([0] + [len(groups.rows[expert]) for expert, _ in few])
        slots = np.array([slot for _, slot in few])
        owners = [slot for expert, slot in few for _ in groups.rows[expert]]
        inner = self._up.multiply(self._threads, slots, starts, groups.hidden[groups.tokens(rows)])
        inner = self._biased(inner.to(groups.hidden.dtype), self._up.name, owners)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        outer = self._down.multiply(self._threads, slots, starts, inner)
        outer = self._biased(outer.to(groups.hidden.dtype), "down_proj", owners)
        if rows == list(range(len(groups.outputs))):
            groups.outputs = outer
        else:
            groups.outputs[rows] = outer

    def _biased(self, values: torch.Tensor, name: str, owners: Sequence[int]) -> torch.Tensor:
        if not self.module.has_bias:
            return values
        return values + torch.stack([self.pool.views(slot, self._layout)[f"{name}_bias"] for slot in owners])
