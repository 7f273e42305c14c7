"""One MoE layer's arithmetic over experts that lie in slots.

`PlainExperts` is the reference: one expert after the other, in PyTorch, on any device. `FastExperts` is
the same on a CPU with kernels that read each expert once at memory speed when an expert has few tokens.
Both take a family's layout (transposed, biased, gated) as transformers declares it on its experts module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from edgemoe.cache.record import Part, RecordLayout
from edgemoe.cache.slots import SlotPool
from edgemoe.kernels.cpu.threads import Workers, kernels_have_the_cores

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.gemv_kernels import Kernel


class TokenGroups:
    """The (token, expert) pairs of a layer pass, grouped by expert.

    `hidden` is [tokens, hidden size]; `outputs` is [tokens * top-k, hidden size], a row a pair, written by
    the experts in any order: that the result does not depend on the order of arrival is what makes
    it exact whatever the cache holds.
    """

    def __init__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: int) -> None:
        self.hidden = hidden
        self.top_k = index.shape[-1]
        rows: dict[int, list[int]] = {}
        # A choice of weight 0 is how some families say "no expert": nothing is loaded for it.
        for pair, expert in enumerate(index.masked_fill(weights == 0, -1).reshape(-1).tolist()):
            if 0 <= expert < experts:
                rows.setdefault(expert, []).append(pair)
        self.rows: Mapping[int, list[int]] = rows
        """The pairs of each expert that is wanted. Choices that name no stacked expert (null experts) are in none."""
        pairs = index.numel()
        complete = sum(map(len, rows.values())) == pairs
        make = hidden.new_empty if complete else hidden.new_zeros
        self.outputs = make(pairs, hidden.shape[-1])

    @property
    def wanted(self) -> list[int]:
        """The experts to acquire: those that most tokens want come last, and so stay resident longest.

        What many want now, of one sequence or of several, will be wanted again soonest; where as many want
        two of them, the latest tokens decide.
        """
        return sorted(self.rows, key=lambda expert: (len(self.rows[expert]), self.rows[expert][-1]))

    def tokens(self, rows: Sequence[int]) -> list[int]:
        """The token of each pair."""
        return [row // self.top_k for row in rows]


class Experts(ABC):
    """Computes some experts of a batch. `module` is transformers' experts module, without its weights."""

    row_multiple = 1
    """Tokens of an expert are filled up to a multiple of this; the extra rows are dropped."""

    def __init__(self, module: Any, layout: RecordLayout, pool: SlotPool) -> None:
        self.module = module
        self.layout = layout
        self.pool = pool

    @abstractmethod
    def compute(self, groups: TokenGroups, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Writes `groups.outputs` for the pairs of `experts`, whose records are in `slots` and pinned."""

    def _one(self, groups: TokenGroups, expert: int, slot: int) -> None:
        """The reference arithmetic of one expert."""
        module, rows = self.module, groups.rows[expert]
        weights = self.pool.views(slot, self.layout)
        tokens = groups.tokens(rows)
        x = groups.hidden[tokens + tokens[-1:] * (-len(tokens) % self.row_multiple)]
        up = "gate_up_proj" if module.has_gate else "up_proj"
        inner = self._linear(x, weights, up)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        outer = self._linear(inner, weights, "down_proj")[: len(rows)]
        groups.outputs[rows] = outer.to(groups.outputs.dtype)

    def _linear(self, x: torch.Tensor, weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        weight = weights[name].t() if self.module.is_transposed else weights[name]
        product = F.linear(x.to(weight.dtype), weight)
        # Added apart, as transformers does: a fused bias would be rounded differently in bf16.
        return product + weights[f"{name}_bias"] if self.module.has_bias else product


class PlainExperts(Experts):
    """Every expert by the reference arithmetic."""

    def compute(self, groups: TokenGroups, experts: Sequence[int], slots: Sequence[int]) -> None:
        """See the base class."""
        for expert, slot in zip(experts, slots, strict=True):
            self._one(groups, expert, slot)


class FastExperts(Experts):
    """Kernels for experts with few tokens, the reference for the rest. CPU only."""

    row_multiple = 16
    # PyTorch's CPU products compile and keep code for every number of rows; in a prefill every expert has another.

    def __init__(self, module: Any, layout: RecordLayout, pool: SlotPool, workers: Workers) -> None:
        super().__init__(module, layout, pool)
        self._workers = workers
        self._up = SlotMatrix(pool, layout, "gate_up_proj" if module.has_gate else "up_proj", module.is_transposed)
        self._down = SlotMatrix(pool, layout, "down_proj", module.is_transposed)
        self._max_tokens = min(self._up.max_tokens, self._down.max_tokens)

    @staticmethod
    def fits(module: Any, layout: RecordLayout) -> bool:
        """Whether there is a kernel for how this family stores its experts."""
        up = "gate_up_proj" if module.has_gate else "up_proj"
        return all(SlotMatrix.fits(layout, name, module.is_transposed) for name in (up, "down_proj"))

    def compute(self, groups: TokenGroups, experts: Sequence[int], slots: Sequence[int]) -> None:
        """See the base class."""
        pairs = list(zip(experts, slots, strict=True))
        most = self._max_tokens if kernels_have_the_cores(self._workers) else 0
        few = [pair for pair in pairs if len(groups.rows[pair[0]]) <= most]
        if few:
            self._few(groups, few)
        for expert, slot in pairs:
            if len(groups.rows[expert]) > most:
                self._one(groups, expert, slot)

    def _few(self, groups: TokenGroups, few: Sequence[tuple[int, int]]) -> None:
        module = self.module
        rows = [row for expert, _ in few for row in groups.rows[expert]]
        starts = np.cumsum([0] + [len(groups.rows[expert]) for expert, _ in few])
        slots = np.array([slot for _, slot in few])
        owners = [slot for expert, slot in few for _ in groups.rows[expert]]
        inner = self._up.multiply(self._workers, slots, starts, groups.hidden[groups.tokens(rows)])
        inner = self._biased(inner.to(groups.hidden.dtype), self._up.name, owners)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        outer = self._down.multiply(self._workers, slots, starts, inner)
        outer = self._biased(outer.to(groups.hidden.dtype), "down_proj", owners)
        if rows == list(range(len(groups.outputs))):
            groups.outputs = outer
        else:
            groups.outputs[rows] = outer

    def _biased(self, values: torch.Tensor, name: str, owners: Sequence[int]) -> torch.Tensor:
        if not self.module.has_bias:
            return values
        return values + torch.stack([self.pool.views(slot, self.layout)[f"{name}_bias"] for slot in owners])


class SlotMatrix:
    """One weight matrix of every record in the pool, as the kernels see it."""

    def __init__(self, pool: SlotPool, layout: RecordLayout, name: str, transposed: bool) -> None:
        part = next(part for part in layout.parts if part.name == name)
        self.name = name
        self._transposed = transposed
        self._rows, self._columns = part.shape[::-1] if transposed else part.shape
        self._nbytes = part.nbytes
        found = self._find(part, transposed)
        assert found is not None, f"there is no kernel for {part}"
        self._kernel = found
        self.max_tokens = found.max_tokens
        self._pool = pool.memory.numpy().view(found.unit)
        self._offset = layout.part_offset(name) // np.dtype(found.unit).itemsize

    @classmethod
    def fits(cls, layout: RecordLayout, name: str, transposed: bool) -> bool:
        """Whether a kernel exists for this part's dtype, orientation and width."""
        return cls._find(next(part for part in layout.parts if part.name == name), transposed) is not None

    @staticmethod
    def _find(part: Part, transposed: bool) -> Kernel | None:
        from edgemoe.kernels.cpu import gemv_kernels

        return (
            gemv_kernels.column_kernel(part.dtype) if transposed else gemv_kernels.row_kernel(part.dtype, part.shape[1])
        )

    def multiply(self, workers: Workers, slots: Any, starts: Any, x: torch.Tensor) -> torch.Tensor:
        """The products of all pairs, float32 [pairs, rows]: pair p is slot i with starts[i] ≤ p < starts[i + 1].

        `x` is [pairs, columns] in any float dtype.
        """
        values = self._kernel.values(x)
        out = self._kernel.results(len(values), self._rows)
        extent = self._rows if self._transposed else self._columns

        def run(first: int, last: int) -> None:
            self._kernel.run(slots, self._offset, extent, self._pool, starts, values, out, first, last)

        workers.split(self._rows, run, nbytes=self._nbytes * len(slots))
        return torch.from_numpy(out)
