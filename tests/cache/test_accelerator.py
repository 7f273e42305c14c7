"""What the package asks of a device, on stand-ins for PyTorch's backend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench.no_card.caching_allocator import CachingAllocator
from edgemoe.cache import accelerator
from edgemoe.cache.accelerator import Graph, is_accelerator

CARD = torch.device("cuda:1")


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda", True), ("cuda:3", True), (CARD, True), ("cpu", False), ("meta", False)]
)
def test_devices_that_are_no_cpu_are_told_by_their_type(device: torch.device | str, expected: bool) -> None:
    assert is_accelerator(device) == expected


@pytest.mark.parametrize(
    ("hip", "capability", "expected"),
    [(None, (7, 5), False), (None, (8, 0), True), (None, (12, 0), True), ("6.4", (0, 0), True)],
)
def test_devices_before_compute_capability_8_do_not_multiply_bf16(
    hip: str | None, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert accelerator.multiplies_bf16(CARD) == expected


def test_free_memory_is_also_what_pytorch_keeps_without_using_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is made beside another engine, or after one was closed, may use that."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert accelerator.free_nbytes(CARD) == 1500


@pytest.mark.parametrize("version", ["public", "private", "none"])
def test_unused_memory_of_device_and_host_is_given_back_in_every_version(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("device"))
    monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    monkeypatch.delattr(torch._C, "_host_emptyCache", raising=False)
    if version == "public":
        monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: emptied.append("host"), raising=False)
    elif version == "private":
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: emptied.append("host"), raising=False)
    accelerator.release_unused()
    assert emptied == (["device"] if version == "none" else ["device", "host"])


@pytest.mark.parametrize("where", ["cpu", "cuda:1"])
def test_the_generators_of_the_caller_are_kept(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {1: 5}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: state.__setitem__(device, value))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with accelerator.keeping_generators(torch.device(where)):
        torch.rand(3)
        state[1] = 6
    assert torch.equal(torch.get_rng_state(), before)
    assert state[1] == (5 if where == "cuda:1" else 6)


class Backend:
    """Graphs that note what is done with them, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.graph = SimpleNamespace(
            capture_begin=lambda pool, capture_error_mode: self.log.append(f"begin {pool} {capture_error_mode}"),
            capture_end=lambda: self.log.append("end"),
            replay=lambda: self.log.append("replay"),
        )

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self.graph)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_graphs_share_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend()
    backend.install(monkeypatch)
    for _ in range(2):
        graph = Graph()
        graph.begin((0, 9))
        graph.end()
        graph.replay()
    assert backend.log == ["begin (0, 9) thread_local", "end", "replay"] * 2


def test_a_capture_that_fails_leaves_the_allocator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, ended = Backend(), list[tuple[str, tuple[object, ...]]]()
    backend.install(monkeypatch)

    def fail() -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(backend.graph, "capture_end", fail)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *place, name=name: ended.append((name, place)), raising=False)
    graph = Graph()
    graph.begin((0, 9))
    with pytest.raises(RuntimeError, match="previous error"):
        graph.end()
    assert ended == [("_cuda_endAllocateToPool", (0, (0, 9))), ("_cuda_releasePool", (0, (0, 9)))]


@pytest.mark.parametrize("nbytes", [512, 1 << 20, 2 << 20, 3 << 20, (8 << 20) + 512, 10 << 20, 15 << 20])
def test_many_buffers_take_their_size_and_their_share_of_the_gaps(nbytes: int) -> None:
    memory = CachingAllocator(1 << 40)
    for number in range(60):
        memory.take(number, nbytes)
    taken = 60 * accelerator.segment_nbytes(nbytes)
    assert taken <= memory.reserved <= taken + (20 << 20)
