"""The CUDA link's order of work, on a fake device of two threads: one for copies, one for compute."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

import pytest
import torch

from bench.support.policies.lru import BalancedLRU
from edgemoe.cache import ExpertCache, ExpertId, ExpertStore, SlotClass, SlotPool, Throttle, Transfer
from edgemoe.cache.cuda_link import CudaLink, CudaStreams, Streams
from edgemoe.cache.link import Priority
from edgemoe.cache.store import Piece
from tests.support.cache_fakes import FakeStore, FakeStreams, LockedStore, holds, pattern
from tests.support.waiting import wait_until

CPU = torch.device("cpu")
NBYTES = 128
A, B, C, D = (ExpertId(0, number) for number in range(4))
A_MOMENT = 0.03
"""Seconds after which an operation that must not happen is taken not to happen."""


class Bench:
    """A link over page-locked (or file-read) records, with 4 slots."""

    def __init__(self, streams: FakeStreams, *, locked: bool = True, pageable: tuple[ExpertId, ...] = ()) -> None:
        self.source = FakeStore([4, 4], NBYTES, pieces=2)
        self.streams = streams
        self.store: ExpertStore = LockedStore(self.source, pageable) if locked else self.source
        self.source.started.clear()
        self.slots = torch.zeros(4, NBYTES, dtype=torch.uint8)
        self.link = CudaLink(self.store, streams, staging=1, readers=2)

    def start(self, expert: ExpertId, slot: int, *, demand: bool = True) -> Transfer:
        priority = Priority.DEMAND if demand else Priority.PREFETCH
        return self.link.start(expert, slot, self.slots[slot], priority)

    def arrive(self, *transfers: Transfer) -> None:
        """Waits for the copies to complete, which `wait_any` does not."""
        wait_until(lambda: all(transfer.arrived() for transfer in transfers))

    def order(self) -> list[ExpertId]:
        return [ExpertId(0, byte - 1) for byte in self.streams.issued]

    def holds(self, slot: int, expert: ExpertId) -> bool:
        return holds(self.slots[slot], expert, NBYTES)


def test_a_locked_demand_is_queued_on_the_device_at_once_and_the_host_never_waits(streams: FakeStreams) -> None:
    bench = Bench(streams)
    streams.copies.hold()
    transfer = bench.start(A, 2)
    assert transfer.done
    assert not transfer.arrived()
    seen: list[bool] = []
    assert bench.link.wait_any([transfer]) == [transfer], "although the copy has not started"
    streams.compute.put(lambda: seen.append(bench.holds(2, A)))
    time.sleep(A_MOMENT)
    assert seen == [], "compute waits for the copy"
    streams.copies.go()
    wait_until(lambda: seen == [True])
    assert transfer.arrived()
    bench.link.close()


def test_what_has_passed_is_computed_before_what_is_still_copied(streams: FakeStreams) -> None:
    bench = Bench(streams)
    first = bench.start(A, 0)
    bench.arrive(first)
    streams.copies.hold()
    second = bench.start(B, 1)
    assert bench.link.wait_any([second, first]) == [first]
    assert bench.link.wait_any([second]) == [second]
    streams.copies.go()
    bench.link.close()


def test_two_prefetches_are_on_the_bus_so_that_it_is_never_idle_and_the_others_can_be_overtaken(
    streams: FakeStreams,
) -> None:
    bench = Bench(streams)
    streams.copies.hold()
    transfers = [bench.start(expert, expert.number, demand=False) for expert in (A, B, C, D)]
    wait_until(lambda: bench.order() == [A, B])
    time.sleep(A_MOMENT)
    assert bench.order() == [A, B]
    streams.copies.go()
    bench.arrive(*transfers)
    assert bench.order() == [A, B, C, D]
    assert all(bench.holds(expert.number, expert) for expert in (A, B, C, D))
    bench.link.close()


@pytest.mark.parametrize("pageable", [(), (D,)], ids=["locked", "pageable"])
def test_a_demand_overtakes_queued_prefetches(streams: FakeStreams, pageable: tuple[ExpertId, ...]) -> None:
    bench = Bench(streams, pageable=pageable)
    streams.copies.hold()
    transfers = [bench.start(expert, expert.number, demand=False) for expert in (A, B, C)]
    wait_until(lambda: bench.order() == [A, B])
    transfers.append(bench.start(D, 3))
    streams.copies.go()
    bench.arrive(*transfers)
    assert bench.order() == [A, B, D, C]
    assert bench.holds(3, D)
    bench.link.close()


def test_a_promoted_prefetch_overtakes_the_others(streams: FakeStreams) -> None:
    bench = Bench(streams)
    streams.copies.hold()
    transfers = [bench.start(expert, expert.number, demand=False) for expert in (A, B, C, D)]
    wait_until(lambda: bench.order() == [A, B])
    bench.link.promote(transfers[3])
    assert transfers[3].priority is Priority.DEMAND
    streams.copies.go()
    bench.arrive(*transfers)
    assert bench.order() == [A, B, D, C]
    bench.link.close()


def test_promoting_what_is_on_the_bus_or_there_changes_nothing(streams: FakeStreams) -> None:
    bench = Bench(streams)
    transfer = bench.start(A, 0, demand=False)
    bench.arrive(transfer)
    bench.link.promote(transfer)
    assert bench.link.wait_any([transfer]) == [transfer]
    bench.link.close()


def test_a_slot_is_not_overwritten_before_its_last_use(streams: FakeStreams) -> None:
    bench = Bench(streams)
    bench.link.wait_any([bench.start(A, 0)])
    read_a: list[bool] = []
    streams.compute.hold()
    streams.compute.put(lambda: read_a.append(bench.holds(0, A)))
    bench.link.released([0])
    other = bench.start(B, 0)
    time.sleep(A_MOMENT)
    assert not other.arrived(), "the copy waits for compute"
    streams.compute.go()
    bench.arrive(other)
    assert read_a == [True]
    assert bench.holds(0, B)
    bench.link.close()


def test_a_prefetch_too_waits_for_the_last_use_of_its_slot(streams: FakeStreams) -> None:
    bench = Bench(streams)
    first = bench.start(A, 0)
    bench.arrive(first)
    streams.compute.hold()
    bench.link.released([0])
    other = bench.start(B, 0, demand=False)
    wait_until(lambda: other.done)
    time.sleep(A_MOMENT)
    assert bench.holds(0, A)
    streams.compute.go()
    bench.arrive(other)
    bench.link.close()


def test_a_slot_that_nobody_read_since_is_filled_at_once(streams: FakeStreams) -> None:
    bench = Bench(streams)
    streams.compute.hold()
    bench.link.released([0])
    transfer = bench.start(A, 1)
    bench.arrive(transfer)
    assert bench.holds(1, A)
    streams.compute.go()
    bench.link.close()


def test_releasing_nothing_leaves_no_mark(streams: FakeStreams) -> None:
    bench = Bench(streams)
    streams.compute.hold()
    bench.link.released([])
    bench.arrive(bench.start(A, 0))
    assert bench.holds(0, A), "although compute is paused"
    streams.compute.go()
    bench.link.close()


def test_records_that_are_not_locked_go_through_the_staging_ring(streams: FakeStreams) -> None:
    bench = Bench(streams, locked=False)
    transfers = [bench.start(expert, expert.number) for expert in (A, B, C)]
    for transfer in transfers:
        bench.link.wait_any([transfer])
    bench.arrive(*transfers)
    assert all(bench.holds(expert.number, expert) for expert in (A, B, C))
    bench.link.close()


def test_a_staging_buffer_is_not_refilled_before_its_copy_has_passed(streams: FakeStreams) -> None:
    bench = Bench(streams, locked=False)
    streams.copies.hold()
    first, second = bench.start(A, 0), bench.start(B, 1)
    wait_until(lambda: first.done)
    time.sleep(A_MOMENT)
    assert set(bench.source.started) == {A}, "B must not be read into the only buffer yet"
    streams.copies.go()
    bench.arrive(first, second)
    assert bench.holds(0, A)
    assert bench.holds(1, B)
    bench.link.close()


def test_a_locked_demand_does_not_wait_for_a_staged_one(streams: FakeStreams) -> None:
    bench = Bench(streams, pageable=(A, B))
    streams.copies.hold()
    staged = [bench.start(A, 0), bench.start(B, 1)]
    assert bench.start(C, 2).done
    streams.copies.go()
    bench.arrive(*staged)
    bench.link.close()


def test_an_error_is_handed_over_and_the_link_goes_on(streams: FakeStreams) -> None:
    bench = Bench(streams, locked=False)
    bench.source.faults[A] = OSError("disk gone")
    bad, good = bench.start(A, 0), bench.start(B, 1)
    assert bench.link.wait_any([bad]) == [bad]
    assert str(bad.error) == "disk gone"
    assert not bad.arrived()
    assert bench.link.wait_any([good]) == [good]
    bench.arrive(good)
    assert bad in bench.link.wait_any([good, bad])
    assert bench.holds(1, B)
    del bench.source.faults[A]
    again = bench.start(A, 0)
    bench.link.wait_any([again])
    bench.arrive(again)
    assert bench.holds(0, A)
    bench.link.close()


def test_a_failed_prefetch_is_no_error_of_the_next(streams: FakeStreams) -> None:
    bench = Bench(streams, locked=False)
    bench.source.faults[A] = OSError("disk gone")
    bad, good = bench.start(A, 0, demand=False), bench.start(B, 1, demand=False)
    bench.arrive(good)
    assert bad.error is not None
    bench.link.close()


def test_a_failed_read_gives_its_staging_buffer_back_only_when_all_its_reads_have_ended(streams: FakeStreams) -> None:
    """One piece of A is still writing when the other fails; by then the buffer would belong to B."""
    bench = Bench(streams, locked=False)
    pieces = bench.source.pieces
    late = threading.Event()

    def slow_second_piece(expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
        (nbytes, move), failing = pieces(expert, slot)

        def slowly() -> None:
            time.sleep(0.2)
            move()
            late.set()

        return [failing, (nbytes, slowly if expert == A else move)]

    bench.source.pieces = slow_second_piece  # type: ignore[method-assign]
    bench.source.faults[A] = OSError("disk gone")
    streams.copies.hold()
    bad, good = bench.start(A, 0), bench.start(B, 1)
    assert late.wait(5)
    wait_until(lambda: bad.done and good.done)
    streams.copies.go()
    bench.arrive(good)
    assert bench.holds(1, B)
    bench.link.close()


def test_a_simulated_bandwidth_slows_demands_and_prefetches(streams: FakeStreams) -> None:
    store = LockedStore(FakeStore([4], 64_000))
    link = CudaLink(store, streams, 1, 1, Throttle(1_000_000))
    slots = torch.zeros(2, 64_000, dtype=torch.uint8)
    started = time.perf_counter()
    transfers = [link.start(A, 0, slots[0], Priority.PREFETCH), link.start(B, 1, slots[1], Priority.DEMAND)]
    wait_until(lambda: all(transfer.arrived() for transfer in transfers))
    assert time.perf_counter() - started >= 0.128
    assert holds(slots[1], B, 64_000)
    link.close()


def test_close_drops_what_is_queued_and_may_be_repeated(streams: FakeStreams) -> None:
    bench = Bench(streams)
    streams.copies.hold()
    *running, queued = (bench.start(expert, expert.number, demand=False) for expert in (A, B, C))
    wait_until(lambda: all(each.done for each in running))
    threading.Timer(0.05, streams.copies.go).start()
    bench.link.close()
    assert all(each.arrived() for each in running)
    assert not queued.done
    assert bench.order() == [A, B]
    bench.link.close()


@pytest.mark.parametrize("locked", [True, False])
def test_close_waits_for_demanded_copies_too(streams: FakeStreams, locked: bool) -> None:
    """The memory of the slots is freed next; a copy in flight would write into freed memory."""
    bench = Bench(streams, locked=locked)
    streams.copies.hold()
    transfer = bench.start(A, 0)
    wait_until(lambda: transfer.done)
    threading.Timer(0.05, streams.copies.go).start()
    bench.link.close()
    assert transfer.arrived()


def devices() -> list[str]:
    return ["fake", "cuda"] if torch.cuda.is_available() else ["fake"]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("locked", ["all", "some", "none"])
@pytest.mark.parametrize("seed", range(2))
def test_random_work_reads_the_right_bytes(device: str, locked: str, seed: int) -> None:
    """The host runs ahead of a slow device; each later read by compute sees the right record."""
    draw = random.Random(seed)
    layers, experts, slots = 3, 8, draw.choice([3, 9])
    source = FakeStore([experts] * layers, NBYTES, pieces=2)
    everyone = [ExpertId(layer, number) for layer in range(layers) for number in range(experts)]
    store: ExpertStore = source
    if locked != "none":
        store = LockedStore(source, draw.sample(everyone, 10) if locked == "some" else ())
    fake = FakeStreams(lambda: draw.random() * 1e-3) if device == "fake" else None
    streams: Streams = fake or CudaStreams(torch.device(device))
    link = CudaLink(store, streams, staging=2, readers=2)
    wrong: list[torch.Tensor | ExpertId] = []
    with SlotPool([SlotClass(NBYTES, slots)], CPU if fake else torch.device(device)) as pool:
        cache = ExpertCache(store, link, pool, BalancedLRU(layers, slots))

        def look(slot: int, expert: ExpertId) -> None:
            if fake is None:
                wrong.append((pool.regions[0].memory[slot] != pattern(expert)).any())
            else:
                memory = pool.regions[0].memory[slot]
                fake.compute.put(lambda: None if holds(memory, expert, NBYTES) else wrong.append(expert))

        for step in range(120):
            layer = step % layers
            cache.prefetch([ExpertId((layer + 1) % layers, number) for number in draw.sample(range(experts), 2)])
            requested = draw.sample(range(experts), draw.randint(1, 5))
            seen: list[int] = []
            for loan in cache.borrow(layer, requested):
                for number, slot in zip(loan.experts, loan.slots, strict=True):
                    look(slot, ExpertId(layer, number))
                seen += loan.experts
            assert sorted(seen) == sorted(requested)
            cache.check_integrity()
        link.close()
        if fake:
            fake.end()
            assert wrong == []
        else:
            assert not torch.stack([one for one in wrong if isinstance(one, torch.Tensor)]).any()


def test_what_ends_a_thread_fails_one_transfer_and_the_threads_go_on(streams: FakeStreams) -> None:
    store = FakeStore([4], 256, pieces=2)
    link = CudaLink(store, streams, staging=1, readers=1)
    slots = torch.zeros(2, store.slot_nbytes, dtype=torch.uint8)
    store.faults[ExpertId(0, 0)] = SystemExit("the reader is gone")  # type: ignore[assignment]
    failed, good = (link.start(ExpertId(0, number), number, slots[number], Priority.DEMAND) for number in range(2))
    wait_until(lambda: failed.done and good.done)
    assert "the reader is gone" in str(failed.error)
    assert good.error is None

    link.close()


def test_close_leaves_a_read_that_never_returns_alone(streams: FakeStreams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemoe.cache.cuda_link.CLOSE_SECONDS", 0.1)
    store = FakeStore([4], 256)
    link = CudaLink(store, streams, staging=1, readers=1)
    expert, slot = ExpertId(0, 0), torch.zeros(store.slot_nbytes, dtype=torch.uint8)
    store.hold(expert)
    transfer = link.start(expert, 0, slot, Priority.DEMAND)
    wait_until(lambda: expert in store.started)
    started = time.monotonic()
    link.close()
    assert time.monotonic() - started < 5
    store.gates[expert].set()
    wait_until(lambda: transfer.done)
    assert transfer.error is not None
    assert not slot.any()
