"""Host memory of an exact size, on a CUDA runtime that tests stand in for."""

from __future__ import annotations

import mmap
from types import SimpleNamespace

import pytest
import torch

from edgemoe.cache.host_buffer import HUGE_PAGE, HostBuffer, memory_of_its_own
from tests.support.cache_fakes import FakeStore, LockedStore


class Runtime:
    """The two calls of the CUDA runtime, by the addresses that they are given."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        if self.answer == 0:
            self.locked[address] = nbytes
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return 0


def install(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> list[str]:
    """Puts `runtime` in place; the list collects the devices on which tensors are made."""
    made: list[str] = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, cudart=lambda: runtime))

    def zeros(count: int, *, device: str) -> None:
        made.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    return made


def test_it_has_the_size_that_is_asked_for_and_unlocks_it_when_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(0)
    made = install(monkeypatch, runtime)
    buffer = HostBuffer(5 << 20, pin=True)
    assert buffer.locked
    assert runtime.locked == {buffer.memory.data_ptr(): 5 << 20}
    assert len(buffer.memory) == 5 << 20
    assert buffer.memory.dtype is torch.uint8
    buffer.memory.fill_(7)
    buffer.close()
    buffer.close()
    assert runtime.locked == {}
    assert len(buffer.memory) == 0
    assert made == []


def test_where_the_system_refuses_it_is_pageable_and_the_error_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = install(monkeypatch, Runtime(2))
    buffer = HostBuffer(1 << 12, pin=True)
    assert not buffer.locked
    assert made == ["cuda"], "the next launch would report the refusal"
    buffer.memory.fill_(1)
    buffer.close()


def test_nothing_is_locked_that_need_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(0)
    install(monkeypatch, runtime)
    buffer = HostBuffer(1 << 12, pin=False)
    assert not buffer.locked
    assert runtime.locked == {}
    buffer.close()


def test_the_records_that_tests_call_locked_are_locked_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(0)
    install(monkeypatch, runtime)
    store = LockedStore(FakeStore([4, 4], 256))
    assert sum(runtime.locked.values()) == store.nbytes == 8 * 256
    store.close()
    assert runtime.locked == {}


def test_an_empty_buffer_is_one() -> None:
    buffer = HostBuffer(0, pin=False)
    assert len(buffer.memory) == 0
    buffer.close()


@pytest.mark.parametrize("nbytes", [0, 5, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 7])
def test_memory_of_its_own_is_zeros_that_live_as_long_as_a_part_of_them(nbytes: int) -> None:
    memory = memory_of_its_own(nbytes)
    assert memory.dtype is torch.uint8
    assert len(memory) == nbytes
    assert not memory.any()
    part = memory[nbytes // 2 :]
    del memory
    part.fill_(3)
    assert int(part.sum()) == 3 * len(part)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")
def test_memory_of_whole_huge_pages_begins_at_one() -> None:
    assert memory_of_its_own(2 * HUGE_PAGE + 1).data_ptr() % HUGE_PAGE == 0
