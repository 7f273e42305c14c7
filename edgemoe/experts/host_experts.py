"""Experts that the CPU computes from their records in RAM, while a device gets others over the link.

Of the experts that a pass of few tokens misses, the CPU takes a share that its kernels read in the time in which the
link moves the rest. The records are read where they lie, and nothing is loaded for them. The CPU adds products in
another order than the device: results differ in their last bits, by what happens to be resident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch

from edgemoe.cache.host_store import HostStore
from edgemoe.cache.record import ExpertId
from edgemoe.cache.slots import SlotRegion
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.experts.expert_ffn import FastExperts, TokenGroups
from edgemoe.kernels.cpu.threads import KernelThreads

MAX_TOKENS = 8
"""Tokens of a pass up to which the CPU helps: of more, an expert has several, which a device computes in one go."""


class CpuHelp:
    """What the CPU computes of the missing experts of one model."""

    def __init__(self, store: HostStore, share: float, threads: KernelThreads, dtype: torch.dtype) -> None:
        """A `share` of them, from 0 to 1, from the records in `store`. `threads` run the kernels; `dtype` is the
        model's. Until `close` the memory of `store` is referred to."""
        self._store = store
        self._share = share
        self._threads = threads
        self._dtype = dtype
        self._layers: list[HostExperts] = []

    def layer(self, number: int, module: Any, moe: ExpertsModule) -> HostExperts | None:
        """The help for MoE layer `number`; None where the CPU has no kernels for it.

        `module` is transformers' experts module, and `moe` says how the records hold its weights.
        """
        if not FastExperts.fits(moe):
            return None
        kernels = {
            first: FastExperts(module, moe, SlotRegion(records, 0), self._threads, self._dtype)
            for first, records in _runs(self._store, number)
        }
        self._layers.append(HostExperts(self._share, kernels))
        return self._layers[-1]

    def close(self) -> None:
        """Drops all references to the records. Idempotent. Nothing may be computed afterwards."""
        for layer in self._layers:
            layer.close()
        self._layers.clear()


class HostExperts:
    """The CPU's kernels on one layer's records in RAM."""

    def __init__(self, share: float, kernels: Mapping[int, FastExperts]) -> None:
        """`share`, from 0 to 1, is the CPU's part of the missing experts.

        `kernels` are those of each run of records that lie one after the other, by the expert in slot 0 of its region.
        """
        self._share = share
        self._kernels = dict(kernels)

    def part_of(self, missing: Sequence[int]) -> list[int]:
        """Those of the `missing` experts, coldest first, that the CPU computes: the coldest, rounded down."""
        # What a float loses of a product such as 10 · 0.7 is no expert.
        return list(missing[: int(len(missing) * self._share + 1e-9)])

    def compute(
        self, hidden: torch.Tensor, rows: Mapping[int, Sequence[int]], top_k: int, experts: Sequence[int]
    ) -> tuple[list[int], torch.Tensor]:
        """The pairs of `experts`, and their outputs, [pairs, hidden size] in the dtype of `hidden`. On the CPU.

        `hidden` is [tokens, hidden size] on the CPU; `rows` has the pairs of each expert, of which a token has `top_k`.
        """
        pairs = [pair for expert in experts for pair in rows[expert]]
        groups = _Pairs(hidden, [pair // top_k for pair in pairs], {expert: len(rows[expert]) for expert in experts})
        for first, own in groupby(sorted(experts), key=self._first_of):
            numbers = list(own)
            self._kernels[first].compute(groups, numbers, [number - first for number in numbers])
        return pairs, groups.outputs

    def close(self) -> None:
        """Drops the kernels, and with them the records."""
        self._kernels.clear()

    def _first_of(self, expert: int) -> int:
        """The first expert of the run that holds `expert`."""
        return max(first for first in self._kernels if first <= expert)


class _Pairs(TokenGroups):
    """Some pairs of a pass, by expert: their outputs lie together in that order. Without weights, they have no sum."""

    def __init__(self, hidden: torch.Tensor, tokens: Sequence[int], counts: Mapping[int, int]) -> None:
        """`tokens` has the token of each pair; `counts` the pairs of each expert, which follow one another."""
        self.hidden = hidden
        self.weights = hidden.new_empty(0)
        self.top_k = 0
        self.summed = None
        ends = dict(zip(counts, accumulate(counts.values()), strict=True))
        self.rows = {expert: list(range(end - counts[expert], end)) for expert, end in ends.items()}
        self._tokens = tokens
        self._pairs = len(tokens)

    def tokens(self, rows: Sequence[int]) -> list[int]:
        """See the base class."""
        return [self._tokens[row] for row in rows]

    def has_all(self, rows: Sequence[int]) -> bool:
        """See the base class: no, whatever there is of a token is not all."""
        return False


def _runs(store: HostStore, layer: int) -> list[tuple[int, torch.Tensor]]:
    """The records of `layer` in order: the first expert of each run of neighbours, uint8 [records, record bytes]."""
    records = [store.record(ExpertId(layer, number))[0] for number in range(store.experts[layer])]
    firsts = [
        number for number, record in enumerate(records) if number == 0 or not _follows(records[number - 1], record)
    ]
    ends = [*firsts[1:], len(records)]
    return [(first, _joined(records[first], end - first)) for first, end in zip(firsts, ends, strict=True)]


def _follows(record: torch.Tensor, following: torch.Tensor) -> bool:
    """Whether `following` begins where `record` ends, in the same memory."""
    same = record.untyped_storage().data_ptr() == following.untyped_storage().data_ptr()
    return same and following.storage_offset() == record.storage_offset() + len(record)


def _joined(record: torch.Tensor, count: int) -> torch.Tensor:
    """`record` and the ones after it, `count` in all, uint8 [count, record bytes]."""
    return record.as_strided((count, len(record)), (len(record), 1))
