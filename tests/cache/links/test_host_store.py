from __future__ import annotations

import pytest
import torch

from edgemoe.cache import ExpertId
from edgemoe.cache import host_store as module
from edgemoe.cache.host_buffer import HostBuffer
from edgemoe.cache.host_store import HostStore
from tests.support.cache_fakes import FakeStore, holds

EVERYONE = [ExpertId(layer, number) for layer, count in enumerate((3, 5)) for number in range(count)]


def test_filling_copies_every_record_and_reports_every_byte() -> None:
    source = FakeStore([3, 5], 256, pieces=3)
    host = HostStore(source, 0, pin=False)
    reported: list[tuple[int, int]] = []
    host.fill(3, lambda done, total: reported.append((done, total)))
    assert [done for done, _ in reported] == [256 * (count + 1) for count in range(8)]
    assert {total for _, total in reported} == {host.nbytes} == {8 * 256}
    assert (host.layouts, host.experts) == (source.layouts, source.experts)
    for expert in EVERYONE:
        record, locked = host.record(expert)
        assert not locked
        assert len(record) == 256
        assert holds(record, expert, 256)
    host.close()


def test_its_pieces_fill_a_slot_that_may_be_longer() -> None:
    host = HostStore(FakeStore([3, 5], 128), 0, pin=False)
    host.fill(1, lambda done, total: None)
    slot = torch.zeros(200, dtype=torch.uint8)
    pieces = host.pieces(EVERYONE[4], slot)
    assert [nbytes for nbytes, _ in pieces] == [128]
    for _, move in pieces:
        move()
    assert holds(slot, EVERYONE[4], 128)
    assert not slot[128:].any()
    host.close()


def test_records_do_not_overlap_across_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLAB_NBYTES", 300)
    host = HostStore(FakeStore([3, 5], 128), 0, pin=False)
    host.fill(2, lambda done, total: None)
    assert all(holds(host.record(expert)[0], expert, 128) for expert in EVERYONE)
    slabs = {host.record(expert)[0].untyped_storage().data_ptr() for expert in EVERYONE}
    assert len(slabs) == 4, "8 records, 2 per slab"
    host.close()


def test_a_slab_takes_at_least_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLAB_NBYTES", 10)
    host = HostStore(FakeStore([2], 128), 0, pin=False)
    host.fill(1, lambda done, total: None)
    assert holds(host.record(ExpertId(0, 1))[0], ExpertId(0, 1), 128)
    host.close()


def test_nothing_is_locked_without_pin() -> None:
    host = HostStore(FakeStore([3], 128), 1 << 30, pin=False)
    assert host.pinned_nbytes == 0
    assert not any(host.record(ExpertId(0, number))[1] for number in range(3))
    host.close()


class LockedBuffer(HostBuffer):
    """A host buffer that says that it is locked, or that the system refused."""

    def __init__(self, nbytes: int, *, locked: bool) -> None:
        super().__init__(nbytes, pin=False)
        self.locked = locked

    def close(self) -> None:
        self.locked = False
        super().close()


class Locking:
    """A fake system that locks `max_slabs` slabs and refuses to lock others."""

    def __init__(self, max_slabs: int) -> None:
        self.max_slabs = max_slabs
        self.asked: list[tuple[int, bool]] = []

    def __call__(self, nbytes: int, *, pin: bool) -> LockedBuffer:
        self.asked.append((nbytes, pin))
        return LockedBuffer(nbytes, locked=pin and sum(asked for _, asked in self.asked) <= self.max_slabs)


@pytest.mark.parametrize(
    ("limit", "max_slabs", "locked", "asked"),
    [
        (1 << 20, 99, 8, [True, True, True, True]),
        (512, 99, 4, [True, True, False, False]),
        (767, 99, 4, [True, True, False, False]),
        (255, 99, 0, [False, False, False, False]),
        (0, 99, 0, [False, False, False, False]),
        (1 << 20, 1, 2, [True, True, False, False]),
    ],
)
def test_locking_stays_within_the_limit_and_stops_at_the_first_refusal(
    monkeypatch: pytest.MonkeyPatch, limit: int, max_slabs: int, locked: int, asked: list[bool]
) -> None:
    """`Locking` fakes the system's page locks, which need CUDA. 8 records of 128 bytes, 2 per slab."""
    system = Locking(max_slabs)
    monkeypatch.setattr(module, "SLAB_NBYTES", 256)
    monkeypatch.setattr(module, "HostBuffer", system)
    host = HostStore(FakeStore([3, 5], 128), limit, pin=True)
    assert system.asked == [(256, requested) for requested in asked]
    assert [host.record(expert)[1] for expert in EVERYONE] == [True] * locked + [False] * (8 - locked)
    assert host.pinned_nbytes == locked * 128 <= limit
    host.close()


def test_close_drops_the_records_and_leaves_the_source_open() -> None:
    source = FakeStore([3], 128)
    host = HostStore(source, 0, pin=False)
    host.close()
    host.close()
    assert not source.closed
    with pytest.raises(KeyError):
        host.record(ExpertId(0, 0))


def test_a_read_that_fails_while_filling_is_raised() -> None:
    source = FakeStore([3], 128)
    source.faults[ExpertId(0, 1)] = OSError("disk gone")
    host = HostStore(source, 0, pin=False)
    with pytest.raises(OSError, match="disk gone"):
        host.fill(2, lambda done, total: None)
    host.close()
