"""A CPU in the place of a card: the code of the device path runs there, its kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.support.no_card.quick_interpreter import quick_interpreter
from bench.support.no_card.recorded_graph import RecordingCapturer
from bench.support.policies.lru import BalancedLRU
from edgemoe.cache import ExpertCache, SlotPool, accelerator
from edgemoe.cache.cuda_link import CudaLink, Streams
from edgemoe.cache.host_buffer import HostBuffer
from edgemoe.cache.safetensors_store import SafetensorsStore
from edgemoe.cache.slot_classes import limit_slots, slot_classes
from edgemoe.cache.slots import SlotTable
from edgemoe.checkpoint.blueprint import read_blueprint
from edgemoe.checkpoint.checkpoint import open_checkpoint
from edgemoe.checkpoint.dense_loader import load_dense
from edgemoe.experts import expert_layer
from edgemoe.experts.expert_layer import ExpertLayers
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.model.sequential_runner import SequentialRunner
from edgemoe.plan.machine import ram_free
from edgemoe.runtime import Runtime

CPU = torch.device("cpu")


class Passed:
    """An event of work that was done at once."""


class ImmediateStreams(Streams):
    """A device that does all work when it is queued."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def staging(self, nbytes: int) -> HostBuffer:
        return HostBuffer(nbytes, pin=False)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[Passed, Passed]:
        target.copy_(source)
        return Passed(), Passed()

    def mark(self) -> Passed:
        return Passed()

    def compute_after(self, event: Any) -> None:
        return None

    def passed(self, event: Any) -> bool:
        return True

    def block(self, event: Any) -> None:
        assert isinstance(event, Passed)

    def seconds(self, start: Any, end: Any) -> float:
        return 1e-6


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes engines that are loaded with `device="cpu"` from now on take the CPU for a card."""
    from edgemoe.experts import host_reads

    monkeypatch.setattr(accelerator, "is_accelerator", lambda device: True)
    monkeypatch.setattr(accelerator, "free_nbytes", lambda device: ram_free())
    monkeypatch.setattr(accelerator, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr(accelerator, "device_name", lambda device: "a CPU in the place of a card")
    monkeypatch.setattr("edgemoe.checkpoint.dense_loader.keeping_generators", lambda device: torch.random.fork_rng([]))
    monkeypatch.setattr(accelerator, "selected", lambda device: nullcontext())
    monkeypatch.setattr(accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(accelerator, "release_unused", lambda: None)
    monkeypatch.setattr("edgemoe.runtime.CudaStreams", ImmediateStreams)
    monkeypatch.setattr(host_reads, "DeviceReads", lambda device: host_reads.DirectReads())
    monkeypatch.setattr(Runtime, "_device_passes", _recorded_passes)


def _recorded_passes(runtime: Runtime) -> Any:
    from edgemoe.model.pass_graph import DRAFT_ROOM, DevicePasses

    tools = runtime._tools
    assert tools is not None
    return DevicePasses(tools, RecordingCapturer(tools.launch), runtime._plan.context + DRAFT_ROOM)


@dataclass(frozen=True)
class OnCard:
    """A model whose experts are behind a cache on the pretended card, put together without an engine."""

    model: Any
    layers: ExpertLayers
    cache: ExpertCache
    tools: Any
    """`DeviceTools`."""
    capturer: RecordingCapturer

    def runner(self, context: int = 256) -> SequentialRunner:
        """One sequence a pass; with what graphs are made with."""
        from edgemoe.model.pass_graph import DevicePasses

        passes = DevicePasses(self.tools, self.capturer, context)
        return SequentialRunner(self.model, self.layers, CPU, 1000, threads=1, nbytes_per_token=1, device_passes=passes)


@contextmanager
def running_on_card(folder: Path, slots: int | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnCard]:
    """`folder` with `slots` slots (None is one for every expert), its kernels in Triton's interpreter."""
    from edgemoe.experts.grouped_layer import DeviceTools, grouped
    from edgemoe.experts.host_reads import DirectReads
    from edgemoe.kernels.triton.grouped_ffn import patch
    from edgemoe.kernels.triton.launcher import Launcher

    blueprint = read_blueprint(open_checkpoint(folder), "auto")
    modules = blueprint.experts_modules
    model = load_dense(blueprint, CPU, lambda done, total: None)
    layouts = [moe.layout for moe in modules]
    store = SafetensorsStore(blueprint.checkpoint.files, layouts, blueprint.records)
    classes = slot_classes([layout.nbytes for layout in layouts], store.experts)
    monkeypatch.setattr(accelerator, "is_accelerator", lambda device: True)
    launch, kernel_threads = Launcher(), KernelThreads(1)
    link = CudaLink(store, ImmediateStreams(CPU), 2, 1)
    slots = slots or sum(store.experts)
    with SlotPool(limit_slots(classes, slots), CPU) as pool:
        table = SlotTable(store.experts, CPU, partial(patch, launch))
        tools = DeviceTools(launch, table, DirectReads())
        cache = ExpertCache(store, link, pool, BalancedLRU(len(modules), slots), table)
        layers = expert_layer.install(model, modules, cache, kernel_threads, grouped=grouped(cache, tools, model.dtype))
        try:
            with quick_interpreter():
                yield OnCard(model, layers, cache, tools, RecordingCapturer(launch))
        finally:
            link.close()
            kernel_threads.close()
            store.close()
            # Kernels launched by others must not find a stand-in.
            monkeypatch.undo()
