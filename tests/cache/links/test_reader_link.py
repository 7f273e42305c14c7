"""The CPU's link, with real threads over a store whose reads the tests block."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

from bench.support.policies.lru import BalancedLRU
from edgemoe.cache import ExpertCache, ExpertId, SlotClass, SlotPool, Throttle, Transfer
from edgemoe.cache.link import Priority
from edgemoe.cache.reader_link import ReaderLink
from tests.support.cache_fakes import FakeStore, holds
from tests.support.waiting import wait_until

CPU = torch.device("cpu")
A, B, C, D = (ExpertId(0, number) for number in range(4))


def memory(store: FakeStore) -> torch.Tensor:
    return torch.zeros(store.slot_nbytes, dtype=torch.uint8)


def begin(link: ReaderLink, store: FakeStore, *experts: ExpertId, demand: bool = False) -> list[Transfer]:
    priority = Priority.DEMAND if demand else Priority.PREFETCH
    return [link.start(expert, slot, memory(store), priority) for slot, expert in enumerate(experts)]


def first_starts(store: FakeStore) -> list[ExpertId]:
    """The experts in the order in which their first pieces started."""
    return list(dict.fromkeys(store.started))


def wait_all(link: ReaderLink, transfers: list[Transfer]) -> None:
    left = transfers
    while left:
        arrived = link.wait_any(left)
        assert arrived
        left = [transfer for transfer in left if transfer not in arrived]


def test_a_record_arrives_whole_from_all_its_pieces() -> None:
    store = FakeStore([4], 1000, pieces=7)
    link = ReaderLink(store, 3)
    slot = memory(store)
    transfer = link.start(C, 5, slot, Priority.DEMAND)
    assert link.wait_any([transfer]) == [transfer]
    assert (transfer.expert, transfer.slot, transfer.nbytes, transfer.arrived()) == (C, 5, 1024, True)
    assert holds(slot, C, 1024)
    assert store.started == [C] * 7
    link.close()


def test_it_returns_all_that_are_done_in_the_given_order_and_none_that_is_not() -> None:
    store = FakeStore([4])
    store.hold(B)
    link = ReaderLink(store, 2)
    a, b, c = begin(link, store, A, B, C, demand=True)
    wait_until(lambda: a.done and c.done)
    assert link.wait_any([c, b, a]) == [c, a]
    assert not b.arrived()
    store.let(B)
    assert link.wait_any([b]) == [b]
    link.close()


def test_waiting_blocks_until_the_first_arrives() -> None:
    store = FakeStore([4])
    store.hold(A, B)
    link = ReaderLink(store, 2)
    transfers = begin(link, store, A, B, demand=True)
    threading.Timer(0.05, lambda: store.let(B)).start()
    assert link.wait_any(transfers) == [transfers[1]]
    store.let(A)
    link.close()


def test_a_demand_overtakes_every_queued_prefetch() -> None:
    store = FakeStore([4])
    store.hold(A)
    link = ReaderLink(store, 1)
    prefetches = begin(link, store, A, B, C)
    wait_until(lambda: store.started == [A])
    demands = begin(link, store, D, demand=True)
    store.let(A)
    wait_all(link, prefetches + demands)
    assert store.started == [A, D, B, C]
    link.close()


def test_a_demand_overtakes_the_rest_of_a_prefetch_in_flight() -> None:
    store = FakeStore([4], pieces=4)
    store.hold(A)
    link = ReaderLink(store, 1)
    prefetches = begin(link, store, A)
    wait_until(lambda: store.started == [A])
    demands = begin(link, store, B, demand=True)
    store.let(A)
    wait_all(link, prefetches + demands)
    assert store.started == [A] + [B] * 4 + [A] * 3
    link.close()


def test_demands_and_prefetches_go_in_the_order_in_which_they_came() -> None:
    store = FakeStore([20])
    order = [ExpertId(0, number) for number in range(20)]
    random.Random(3).shuffle(order)
    store.hold(order[0])
    link = ReaderLink(store, 1)
    transfers = begin(link, store, order[0])
    wait_until(lambda: len(store.started) == 1)
    transfers += begin(link, store, *order[1:10]) + begin(link, store, *order[10:], demand=True)
    store.let(order[0])
    wait_all(link, transfers)
    assert store.started == [order[0], *order[10:], *order[1:10]]
    link.close()


def test_a_promoted_prefetch_overtakes_the_others() -> None:
    store = FakeStore([4], pieces=2)
    store.hold(A)
    link = ReaderLink(store, 1)
    transfers = begin(link, store, A, B, C, D)
    wait_until(lambda: store.started == [A])
    link.promote(transfers[3])
    assert transfers[3].priority is Priority.DEMAND
    link.promote(transfers[3])
    store.let(A)
    wait_all(link, transfers)
    assert store.started == [A, D, D, A, B, B, C, C]
    link.close()


def test_promoting_what_has_arrived_changes_nothing() -> None:
    store = FakeStore([4])
    link = ReaderLink(store, 1)
    transfers = begin(link, store, A)
    wait_all(link, transfers)
    link.promote(transfers[0])
    wait_all(link, begin(link, store, B, demand=True))
    assert store.started == [A, B]
    link.close()


def test_an_error_ends_its_transfer_and_no_other() -> None:
    store = FakeStore([4], pieces=3)
    store.faults[A] = OSError("disk gone")
    link = ReaderLink(store, 1)
    bad, good = begin(link, store, A, B, demand=True)
    wait_all(link, [bad, good])
    assert str(bad.error) == "disk gone"
    assert bad.done
    assert not bad.arrived()
    assert good.arrived()
    del store.faults[A]
    again = begin(link, store, A, demand=True)
    wait_all(link, again)
    assert again[0].arrived()
    link.close()


def test_an_error_is_told_only_when_no_read_writes_the_slot_any_more() -> None:
    """The next load into the slot must be its only writer."""
    store = FakeStore([4], 128, pieces=2)
    link = ReaderLink(store, 2)
    first_piece_may_end = threading.Event()
    slot = memory(store)
    pieces = store.pieces

    def slow_first_piece(expert: ExpertId, into: torch.Tensor) -> object:
        (nbytes, move), last = pieces(expert, into)
        return [(nbytes, lambda: (first_piece_may_end.wait(5), move())), last]

    store.pieces = slow_first_piece  # type: ignore[method-assign, assignment]
    store.faults[A] = OSError("disk gone")
    transfer = link.start(A, 0, slot, Priority.DEMAND)
    wait_until(lambda: transfer.error is not None)
    assert not transfer.done
    first_piece_may_end.set()
    assert link.wait_any([transfer]) == [transfer]
    assert holds(slot[:64], A, 64)
    link.close()


def test_pieces_of_one_record_are_read_at_once() -> None:
    store = FakeStore([4], pieces=3)
    store.hold(A)
    link = ReaderLink(store, 3)
    transfers = begin(link, store, A, demand=True)
    wait_until(lambda: store.started == [A] * 3)
    store.let(A)
    wait_all(link, transfers)
    link.close()


def test_close_drops_what_is_queued_waits_for_what_is_read_and_may_be_repeated() -> None:
    store = FakeStore([4])
    store.hold(A)
    link = ReaderLink(store, 1)
    running, queued = begin(link, store, A, B)
    wait_until(lambda: store.started == [A])
    threading.Timer(0.05, lambda: store.let(A)).start()
    link.close()
    assert running.arrived()
    assert not queued.done
    assert store.started == [A]
    link.close()


def test_a_simulated_bandwidth_slows_it_to_its_pace() -> None:
    store = FakeStore([4], 64_000, pieces=4)
    link = ReaderLink(store, 4, Throttle(1_000_000))
    started = time.perf_counter()
    wait_all(link, begin(link, store, A, B, demand=True))
    took = time.perf_counter() - started
    assert took >= 0.128
    link.close()


@pytest.mark.parametrize("seed", range(4))
def test_random_work_through_a_cache_reads_the_right_bytes(seed: int) -> None:
    """Thousands of loads, prefetches and promotions by four threads; every slot of a loan holds its complete record."""
    draw = random.Random(seed)
    layers, experts, nbytes = 4, 16, 1024
    store = FakeStore([experts] * layers, nbytes, pieces=3)
    link = ReaderLink(store, 4)
    slots = draw.choice([5, 16, 40])
    with SlotPool([SlotClass(nbytes, slots)], CPU) as pool:
        cache = ExpertCache(store, link, pool, BalancedLRU(layers, slots))
        for step in range(400):
            layer = step % layers
            following = (layer + 1) % layers
            cache.prefetch([ExpertId(following, number) for number in draw.sample(range(experts), 4)])
            requested = draw.sample(range(experts), draw.randint(1, 8))
            seen: list[int] = []
            for loan in cache.borrow(layer, requested):
                for number, slot in zip(loan.experts, loan.slots, strict=True):
                    assert holds(cache.region(layer).memory[slot], ExpertId(layer, number), nbytes)
                seen += loan.experts
            assert sorted(seen) == sorted(requested)
            cache.check_integrity()
        link.close()
        assert cache.counters.hits + cache.counters.misses > 400


def test_what_ends_a_thread_fails_one_transfer_and_the_threads_go_on() -> None:
    """Nobody waits for ever for a reader that is dead."""
    store = FakeStore([4], pieces=3)
    link = ReaderLink(store, 1)
    store.faults[A] = SystemExit("the reader is gone")  # type: ignore[assignment]
    failed, good = begin(link, store, A, B, demand=True)
    wait_all(link, [failed, good])
    assert "the reader is gone" in str(failed.error)
    assert isinstance(failed.error, RuntimeError)
    assert good.arrived()
    link.close()


def test_a_record_whose_reads_cannot_begin_is_a_transfer_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slot has an owner by then."""
    store = FakeStore([4])
    link = ReaderLink(store, 1)

    def fails(expert: ExpertId, slot: torch.Tensor) -> None:
        raise MemoryError

    monkeypatch.setattr(store, "pieces", fails)
    (failed,) = begin(link, store, A)
    assert link.wait_any([failed]) == [failed]
    assert isinstance(failed.error, MemoryError)
    monkeypatch.undo()
    wait_all(link, begin(link, store, A))
    assert link.bytes_moved == store.record_nbytes(A)
    link.close()
