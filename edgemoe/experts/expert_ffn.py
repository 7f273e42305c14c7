"""The feed-forward networks of one MoE layer's experts, computed from records in slots.

`PlainExperts` is the reference: one expert after the other, in PyTorch, on any device. `FastExperts` uses CPU kernels
for experts with few tokens: they read each weight once, at memory speed. Both follow a family's conventions
(transposed, biased, gated) as transformers declares them on its experts module.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from edgemoe.cache.slots import SlotRegion
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.experts.prepared_experts import PreparedExperts, gated_steps, steps_of_one
from edgemoe.formats.float_format import FloatFormat
from edgemoe.kernels.cpu.arrays import Groups
from edgemoe.kernels.cpu.kernel_choice import widens
from edgemoe.kernels.cpu.packed import packed_matrix
from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
from edgemoe.kernels.cpu.slot_matrix import SlotMatrix
from edgemoe.kernels.cpu.threads import KernelThreads, kernels_have_the_cores
from edgemoe.kernels.gated_silu import ACTIVATION_DTYPES, is_gated_silu
from edgemoe.kernels.packed_linear import packed_linear
from edgemoe.kernels.row_linear import few_on_cpu, row_linear
from edgemoe.kernels.rows import gathered
from edgemoe.kernels.weighted_sum import fast_weighted_sum, weighted_sum, weighted_sum_step

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.program import Step


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
        self.weights = weights
        self.top_k = index.shape[-1]
        self.summed: torch.Tensor | None = None
        """The sums of all outputs times their weights, [tokens, hidden size], where experts have computed them."""
        self.rows: Mapping[int, list[int]] = rows_of(self._chosen(index, weights), experts)
        """The pairs of each chosen expert, ascending. A choice that names no expert is in none: its output row is 0."""
        self._pairs = index.numel()

    @cached_property
    def outputs(self) -> torch.Tensor:
        """What experts write, [pairs, hidden size]."""
        complete = sum(map(len, self.rows.values())) == self._pairs
        make = self.hidden.new_empty if complete else self.hidden.new_zeros
        return make(self._pairs, self.hidden.shape[-1])

    def _chosen(self, index: torch.Tensor, weights: torch.Tensor) -> list[int]:
        """The expert of each pair; -1 where its weight is 0, as some families write "no expert": it causes no load."""
        pairs = zip(index.flatten().tolist(), weights.flatten().tolist(), strict=True)
        return [expert if weight else -1 for expert, weight in pairs]

    def inputs(self, expert: int, multiple: int = 1) -> torch.Tensor:
        """The hidden states of an expert's pairs, [pairs, hidden size].

        The last one is repeated until there are a `multiple` of rows.
        """
        tokens = self.tokens(self.rows[expert])
        return self.hidden[tokens + tokens[-1:] * (-len(tokens) % multiple)]

    def write(self, expert: int, outputs: torch.Tensor) -> None:
        """Writes the outputs of an expert's pairs, [at least pairs, hidden size]; rows of padding come last."""
        rows = self.rows[expert]
        self.outputs[rows] = outputs[: len(rows)].to(self.outputs.dtype)

    def complete(self) -> torch.Tensor:
        """The outputs of all pairs, once every expert has written its own."""
        return self.outputs

    def has_all(self, rows: Sequence[int]) -> bool:
        """Whether `rows` are all pairs."""
        return len(rows) == self._pairs

    @property
    def wanted(self) -> list[int]:
        """The experts to borrow; see `in_order_of_use`."""
        return in_order_of_use(self.rows)

    def tokens(self, rows: Sequence[int]) -> list[int]:
        """The token number of each pair in `rows`."""
        return [row // self.top_k for row in rows]


def rows_of(chosen: Sequence[int], experts: int) -> dict[int, list[int]]:
    """The pairs of each chosen expert, ascending. `chosen[pair]` is its number; one beyond `experts` - 1 is none."""
    rows: dict[int, list[int]] = {}
    for pair, expert in enumerate(chosen):
        if 0 <= expert < experts:
            rows.setdefault(expert, []).append(pair)
    return rows


def in_order_of_use(rows: Mapping[int, Sequence[int]]) -> list[int]:
    """The experts of `rows`, by ascending number of pairs, then by their last pair.

    The last ones count as used most recently, and so stay resident longest: an expert of many tokens is the one most
    likely to be chosen again soon.
    """
    return sorted(rows, key=lambda expert: (len(rows[expert]), rows[expert][-1]))


class SortedGroups(TokenGroups):
    """As the base class for a device, with one read of the device by the host: that of the choices.

    The pairs are sorted by expert on the device, so that those of an expert lie together. An index from the host, as in
    the base class, would wait for all work that is queued on the device, twice an expert.
    """

    def __init__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: int) -> None:
        """As the base class."""
        super().__init__(hidden, index, weights, experts)
        counts = {expert: len(self.rows[expert]) for expert in sorted(self.rows)}
        starts = itertools.accumulate(counts.values(), initial=self._below)
        self._spans = {expert: (start, counts[expert]) for expert, start in zip(counts, starts, strict=False)}
        """The first pair of each expert and the number of its pairs, in the sorted order."""
        self._written: dict[int, torch.Tensor] = {}

    def _chosen(self, index: torch.Tensor, weights: torch.Tensor) -> list[int]:
        """See the base class. Sorting is queued on the device before it is read."""
        chosen = index.masked_fill(weights == 0, -1).reshape(-1)
        self._order = chosen.argsort(stable=True)
        self._sorted = self.hidden.index_select(0, self._order // self.top_k)
        return self._on_host(chosen)

    def _on_host(self, chosen: torch.Tensor) -> list[int]:
        """The only read of the device."""
        choices: list[int] = chosen.tolist()
        self._below = sum(expert < 0 for expert in choices)
        return choices

    def inputs(self, expert: int, multiple: int = 1) -> torch.Tensor:
        """See the base class; `multiple` is 1."""
        return self._sorted.narrow(0, *self._spans[expert])

    def write(self, expert: int, outputs: torch.Tensor) -> None:
        """See the base class; there is no padding."""
        self._written[expert] = outputs.to(self.hidden.dtype)

    def complete(self) -> torch.Tensor:
        """See the base class."""
        above = self._pairs - self._below - sum(count for _, count in self._spans.values())
        parts = [self._written[expert] for expert in self._spans]
        if self._below:
            parts.insert(0, self.hidden.new_zeros(self._below, self.hidden.shape[-1]))
        if above:
            parts.append(self.hidden.new_zeros(above, self.hidden.shape[-1]))
        joined = torch.cat(parts)
        return torch.empty_like(joined).index_copy_(0, self._order, joined)


class Experts(ABC):
    """Computes experts of one layer from their records in slots."""

    row_multiple = 1
    """An expert's tokens are padded to a multiple of this; the padding rows are dropped."""
    multiplies: torch.dtype | None = None
    """The dtype of what `steps_of_one` takes; None where these experts are no steps."""

    def __init__(self, module: Any, moe: ExpertsModule, region: SlotRegion) -> None:
        """`module` is transformers' experts module without its weights; `moe` says how `region`'s slots hold them."""
        self.module = module
        self.region = region
        self._layout = moe.layout
        self._formats = moe.formats
        self._transposed = moe.transposed
        self._shapes = {name: moe.matrix_shape(name) for name in moe.formats}

    @abstractmethod
    def compute(self, groups: TokenGroups, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Writes `groups.outputs` for the pairs of `experts`, whose records are in `slots`, pinned."""

    def steps_of_one(
        self, x: torch.Tensor, weights: torch.Tensor, slots: np.ndarray
    ) -> tuple[torch.Tensor, list[Step]] | None:
        """Where the weighted sum of one token's experts will be, [1, hidden size], and the steps that write it.

        None where there is no kernel for it. `x` is the hidden state, [1, hidden size] of the dtype that it
        `multiplies`; `weights` is [1, top-k], and `slots`, int64 [top-k], says where its experts are. Earlier steps may
        write all of them.
        """
        return None

    def combined(self, groups: TokenGroups) -> torch.Tensor:
        """The sums of the tokens' experts, times their weights, once every expert has written its outputs."""
        outputs = groups.complete()
        if getattr(self.module, "has_post_expert_norm", False):
            outputs = self.module.post_expert_norm(outputs)
        return self._sum(outputs, groups.weights)

    def _sum(self, outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return weighted_sum(outputs, weights)

    def _one(self, groups: TokenGroups, expert: int, slot: int) -> None:
        """The reference arithmetic of one expert."""
        module, views = self.module, self.region.views(slot, self._layout)
        x = groups.inputs(expert, self.row_multiple)
        row_by_row = few_on_cpu(groups.hidden)
        inner = self._linear(x, views, up_name(module), slot, row_by_row)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        groups.write(expert, self._linear(inner, views, "down_proj", slot, row_by_row))

    def _linear(
        self, x: torch.Tensor, views: Mapping[str, torch.Tensor], name: str, slot: int, row_by_row: bool
    ) -> torch.Tensor:
        kind = self._formats[name]
        if isinstance(kind, FloatFormat):
            weight = kind.dequantize(views, name)
            weight = weight.t() if name in self._transposed else weight
            product = (row_linear if row_by_row else F.linear)(x.to(weight.dtype), weight)
        else:
            product = self._packed_linear(x, views, name, slot, row_by_row).to(x.dtype)
        # Added separately, as in transformers: a fused bias rounds differently in bf16.
        return product + views[f"{name}_bias"] if self.module.has_bias else product

    def _packed_linear(
        self, x: torch.Tensor, views: Mapping[str, torch.Tensor], name: str, slot: int, row_by_row: bool
    ) -> torch.Tensor:
        return packed_linear(x, self._formats[name], views, name, self._shapes[name][0], row_by_row=row_by_row)


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

    def __init__(
        self, module: Any, moe: ExpertsModule, region: SlotRegion, threads: KernelThreads, dtype: torch.dtype
    ) -> None:
        """As the base class; `fits` must hold. `threads` run the kernels; `dtype` is the model's."""
        super().__init__(module, moe, region)
        self._threads = threads
        self._up_name, self._dtype = up_name(module), dtype
        self._matrices = {name: self._matrix(region, moe, name) for name in (self._up_name, "down_proj")}
        plain = not module.has_bias and not any(matrix.interleaved for matrix in self._matrices.values())
        self._in_one = plain and is_gated_silu(module)
        self._max_tokens = min(matrix.max_tokens for matrix in self._matrices.values())
        self._is_usual = self._in_one and not getattr(module, "has_post_expert_norm", False)
        if self._is_usual and dtype in ACTIVATION_DTYPES:
            self.multiplies = self._matrices[self._up_name].inputs
        self._kept: dict[object, PreparedExperts | None] = {}

    def _matrix(self, region: SlotRegion, moe: ExpertsModule, name: str) -> SlotMatrix | PackedMatrix:
        kind, shape = self._formats[name], self._shapes[name]
        transposed = name in moe.transposed
        if isinstance(kind, FloatFormat) and (transposed or not widens(kind.dtype, shape[1])):
            return SlotMatrix(kind.dtype, shape, region.memory, moe.layout.part_offset(name), transposed=transposed)
        return PackedMatrix(kind, shape, region.memory, moe.layout.places(name), self._dtype)

    @staticmethod
    def fits(moe: ExpertsModule) -> bool:
        """Whether the kernels support the formats and the orientation that these experts are stored in."""

        def fits(name: str) -> bool:
            kind, (_, columns) = moe.formats[name], moe.matrix_shape(name)
            if isinstance(kind, FloatFormat):
                return SlotMatrix.fits(kind.dtype, columns, transposed=name in moe.transposed)
            return packed_matrix.fits(kind, columns)

        return all(map(fits, moe.formats))

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

    def steps_of_one(
        self, x: torch.Tensor, weights: torch.Tensor, slots: np.ndarray
    ) -> tuple[torch.Tensor, list[Step]] | None:
        """See the base class. The same bits as those of `compute`."""
        up, down = self._matrices[self._up_name], self._matrices["down_proj"]
        return steps_of_one(up, down, x, weights, slots, self._dtype)

    def combined(self, groups: TokenGroups) -> torch.Tensor:
        """See the base class."""
        return super().combined(groups) if groups.summed is None else groups.summed

    def _sum(self, outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return fast_weighted_sum(self._threads, outputs, weights)

    def _packed_linear(
        self, x: torch.Tensor, views: Mapping[str, torch.Tensor], name: str, slot: int, row_by_row: bool
    ) -> torch.Tensor:
        matrix = self._matrices[name]
        assert isinstance(matrix, PackedMatrix)
        return matrix.linear(slot, x)

    def _few(self, groups: TokenGroups, few: Sequence[tuple[int, int]]) -> None:
        """The kernels' arithmetic for all of `few`, (expert, slot) each, in one program where nothing is in between."""
        prepared = self._prepared(groups, few)
        if prepared is not None:
            slots = dict(few)
            by_pair = sorted((pair, slots[expert]) for expert, (pair,) in groups.rows.items())
            groups.summed = prepared.run(groups.hidden, groups.weights, [slot for _, slot in by_pair])
            return
        rows = [row for expert, _ in few for row in groups.rows[expert]]
        starts = np.cumsum([0] + [len(groups.rows[expert]) for expert, _ in few])
        matrices = Groups(np.array([slot for _, slot in few]), starts)
        owners = [slot for expert, slot in few for _ in groups.rows[expert]]
        hidden, up, down = groups.hidden, self._matrices[self._up_name], self._matrices["down_proj"]
        chosen, steps = gathered(hidden, groups.tokens(rows), up.inputs)
        if not self._in_one or hidden.dtype not in ACTIVATION_DTYPES:
            if steps:
                self._threads.run(steps)
            inner = self._activated(up.multiply(self._threads, matrices, chosen), hidden.dtype, owners)
            outer = down.multiply(self._threads, matrices, inner).to(hidden.dtype)
            groups.outputs[rows] = self._biased(outer, "down_proj", owners)
            return
        steps += gated_steps(up, down, matrices, chosen, rows, groups.outputs)
        if groups.has_all(rows) and not getattr(self.module, "has_post_expert_norm", False):
            summing = weighted_sum_step(groups.outputs, groups.weights)
            if summing is not None:
                groups.summed, step = summing
                steps.append(step)
        self._threads.run(steps)

    def _prepared(self, groups: TokenGroups, few: Sequence[tuple[int, int]]) -> PreparedExperts | None:
        """The program for one token whose experts are all in `few`, where there can be one."""
        hidden, weights = groups.hidden, groups.weights
        if not self._is_usual or len(hidden) != 1 or len(few) != groups.top_k or hidden.dtype not in ACTIVATION_DTYPES:
            return None
        key = len(few), hidden.dtype, weights.dtype
        if key not in self._kept:
            up, down = self._matrices[self._up_name], self._matrices["down_proj"]
            self._kept[key] = PreparedExperts.of(up, down, self._threads, hidden, weights)
        return self._kept[key]

    def _activated(self, products: torch.Tensor, dtype: torch.dtype, owners: Sequence[int]) -> torch.Tensor:
        """What the second matrix multiplies, [pairs, columns] of `dtype`; `products` are the first one's, float32."""
        module, inner = self.module, self._biased(products.to(dtype), self._up_name, owners)
        return module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # type: ignore[no-any-return]

    def _biased(self, values: torch.Tensor, name: str, owners: Sequence[int]) -> torch.Tensor:
        if not self.module.has_bias:
            return values
        return values + torch.stack([self.region.views(slot, self._layout)[f"{name}_bias"] for slot in owners])


def up_name(module: Any) -> str:
    """The first matrix of an expert of `module`."""
    return "gate_up_proj" if module.has_gate else "up_proj"
