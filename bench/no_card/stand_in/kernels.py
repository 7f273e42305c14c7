"""What the kernels of experts do on a stand-in device, pair by pair, and the check of every record that they read.

A launch is queued on the device's lane of compute. What it reads it reads when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bench.no_card.stand_in.lanes import Device
from edgemoe.cache import ExpertId, SlotRegion
from edgemoe.kernels.triton import grouped_kernels, table_kernels
from edgemoe.kernels.triton.launcher import Launch
from tests.support.cache_fakes import pattern

Work = Callable[[], None]


class Ledger:
    """What one pass through a layer should compute, and what kernels have computed for it."""

    def __init__(
        self, layer: int, experts: Sequence[int], weights: Sequence[float], top_k: int, *, draft: bool
    ) -> None:
        """`experts` and `weights` are of the pairs, [tokens * top-k]. A `draft` may leave pairs out."""
        self.layer = layer
        self.experts = experts
        self.weights = weights
        self.top_k = top_k
        self.draft = draft
        self.computed = [0] * len(experts)
        self.out: torch.Tensor | None = None
        """[tokens, hidden size], where the pass has come to its end."""

    def faults(self) -> list[str]:
        """What is wrong once the device has done everything."""
        if self.out is None:
            return []
        found = []
        for pair, (expert, weight, times) in enumerate(zip(self.experts, self.weights, self.computed, strict=True)):
            wanted = int(expert >= 0 and weight != 0)
            if times > wanted or (times < wanted and not self.draft):
                found.append(f"expert {expert} of layer {self.layer} was computed {times} times for pair {pair}")
        right = [0.0] * (len(self.experts) // self.top_k)
        for pair, times in enumerate(self.computed):
            right[pair // self.top_k] += times * self.weights[pair] * pattern(ExpertId(self.layer, self.experts[pair]))
        if self.out[:, 0].tolist() != right:
            found.append(f"layer {self.layer} gave {self.out[:, 0].tolist()} in the place of {right}")
        return found


class StandInKernels:
    """Queues launches on a `device`, each for the pass of `ledger`."""

    def __init__(self, device: Device, region: SlotRegion) -> None:
        self.ledger: Ledger | None = None
        """The pass whose kernels are queued now."""
        self.faults: list[str] = []
        self.reads = 0
        """Records that kernels have read."""
        self._device = device
        self._records = region.memory.numpy()
        self._base, self._step = region.memory.data_ptr(), region.slot_nbytes
        self._works: dict[int, Callable[[Launch], Work]] = {
            id(table_kernels.resolve): self._resolve,
            id(table_kernels.patch): self._patch,
            id(grouped_kernels.up): self._up,
            id(grouped_kernels.down): self._down,
            id(grouped_kernels.combine): self._combine,
        }

    def queue(self, launch: Launch) -> None:
        """Queues what `launch` does."""
        self._device.queue(self._device.compute, self._works[id(launch.kernel)](launch))

    def _resolve(self, launch: Launch) -> Work:
        ids, weights, table, live, slots, done, chosen, pairs, experts = launch.args
        ids, weights, table, slots, done, chosen = map(_array, (ids, weights, table, slots, done, chosen))
        first: bool = launch.constants["FIRST"]

        def work() -> None:
            for pair, (expert, weight) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
                wanted = 0 <= expert < experts and weight != 0
                if first:
                    chosen[pair] = expert if wanted else -1
                    done[pair] = 0
                slots[pair] = table[expert] if wanted and not done[pair] else -1
                if slots[pair] >= 0:
                    done[pair] = 1

        return work

    def _patch(self, launch: Launch) -> Work:
        table, *changes = launch.args
        flat = _array(table)
        places, values = [each >> 32 & 0x3FFFFFFF for each in changes], [(each & 0xFFFFFFFF) - 1 for each in changes]

        def work() -> None:
            flat[places] = values

        return work

    def _up(self, launch: Launch) -> Work:
        slots, inner = _array(launch.args[1]), launch.args[5].numpy()
        ledger = self._own()

        def work() -> None:
            for pair, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    inner[pair] = self._read(ledger, pair, slot)

        return work

    def _down(self, launch: Launch) -> Work:
        inner, slots, outputs = launch.args[0].numpy(), _array(launch.args[1]), launch.args[4].numpy()
        ledger = self._own()

        def work() -> None:
            for pair, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    value = self._read(ledger, pair, slot)
                    # What the first kernel read counts as well.
                    outputs[pair] = value if inner[pair, 0] == value else -1
                    ledger.computed[pair] += 1

        return work

    def _combine(self, launch: Launch) -> Work:
        outputs, weights, done, out = (each.numpy() for each in launch.args)

        def work() -> None:
            rows = np.where(done[:, None] != 0, outputs, 0).reshape(*weights.shape, -1)
            out[:] = (rows * weights[:, :, None]).sum(1)

        return work

    def _own(self) -> Ledger:
        assert self.ledger is not None
        return self.ledger

    def _read(self, ledger: Ledger, pair: int, slot: int) -> int:
        """The value of the record in `slot`, which should be that of the expert of `pair`."""
        self.reads += 1
        expert = ExpertId(ledger.layer, ledger.experts[pair])
        record = self._records[slot]
        found, right = int(record[0]), pattern(expert)
        if found != right or record.tobytes() != bytes([right]) * self._step:
            self._wrong(expert, slot, "which holds another record, or a half")
        elif self._base + slot * self._step in self._device.writing:
            self._wrong(expert, slot, "into which a copy is half done")
        return found

    def _wrong(self, expert: ExpertId, slot: int, why: str) -> None:
        self.faults.append(f"expert {expert.number} of layer {expert.layer} was read from slot {slot}, {why}")


def _array(tensor: Any) -> np.ndarray:
    """A tensor's memory in one row."""
    flat: np.ndarray = tensor.numpy().reshape(-1)
    return flat
