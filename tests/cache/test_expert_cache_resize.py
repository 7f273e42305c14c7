"""A cache of another size: which slots are used, whose experts lose theirs, and what memory is given back."""

from __future__ import annotations

import mmap
import random

import pytest
import torch

from bench.support.policies.lru import GlobalLRU
from edgemoe.cache import ExpertCache, ExpertId, SlotClass, SlotPool
from tests.support.cache_fakes import FakeLink, FakeStore, holds
from tests.support.driven_cache import CPU, NBYTES, free_slots, ids, link_of, make, use


def roomy(slots: int, room: int, nbytes: int = NBYTES) -> ExpertCache:
    """A cache that uses `slots` of `room` slots."""
    store = FakeStore((8, 8), nbytes)
    pool = SlotPool([SlotClass(nbytes, slots)], CPU, [SlotClass(nbytes, room)])
    return ExpertCache(store, FakeLink(store), pool, GlobalLRU())


def resize(cache: ExpertCache, slots: int) -> None:
    cache.resize({cache.region(0): slots})
    cache.check_integrity()
    assert cache.pool.count == slots


def test_a_smaller_cache_keeps_what_was_used_last() -> None:
    cache = make(6)
    use(cache, 0, 1, 2, 3, 4, 5, 6)
    use(cache, 0, 2)
    resize(cache, 3)
    assert sorted(cache.residents(0)) == [2, 5, 6]
    assert len(use(cache, 0, 1, 2, 3)) >= 1
    assert len(cache.residents(0)) == 3


def test_a_larger_cache_has_free_slots_up_to_its_room() -> None:
    cache = roomy(2, 5)
    use(cache, 0, 1, 2)
    resize(cache, 5)
    assert sorted(cache.residents(0)) == [1, 2]
    assert free_slots(cache) == 3
    use(cache, 0, 3, 4, 5)
    assert sorted(cache.residents(0)) == [1, 2, 3, 4, 5]
    with pytest.raises(IndexError):
        cache.resize({cache.region(0): 6})


def test_what_has_not_begun_to_move_is_cancelled_and_what_moves_is_waited_for() -> None:
    cache = make(3)
    link = link_of(cache)
    assert cache.prefetch(ids(0, 1, 2, 3)) == 3
    link.choose = lambda transfers: transfers[0]
    link.queued.discard(ExpertId(0, 1))
    resize(cache, 1)
    assert cache.residents(0) in ([1], [])


class Left(BaseException):
    """What ends a wait."""


def test_one_that_is_left_while_it_waits_uses_the_slots_that_it_has_then(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(6)
    use(cache, 0, 1, 2)
    assert cache.prefetch(ids(0, 3, 4, 5, 6)) == 4
    link = link_of(cache)
    link.queued.clear()
    wait_any = link.wait_any
    monkeypatch.setattr(link, "wait_any", lambda transfers, seconds=None: [])

    def poll() -> None:
        raise Left

    cache.poll = poll
    with pytest.raises(Left):
        cache.resize({cache.region(0): 2})
    # Those of the two experts that were there are given back; four are being loaded.
    assert cache.pool.count == 4
    cache.check_integrity()
    monkeypatch.setattr(link, "wait_any", wait_any)
    cache.poll = lambda: None
    resize(cache, 2)


def test_the_memory_of_unused_slots_is_given_back_and_taken_again() -> None:
    nbytes = 8 * mmap.PAGESIZE
    cache = roomy(4, 6, nbytes)
    use_all(cache, nbytes, 1, 2, 3, 4)
    memory = cache.region(0).memory
    resize(cache, 1)
    assert sum(bool(memory[slot].any()) for slot in range(6)) == 1, "zeros are pages that the system has taken back"
    resize(cache, 6)
    use_all(cache, nbytes, 1, 2, 3, 4, 5, 6)


def use_all(cache: ExpertCache, nbytes: int, *experts: int) -> None:
    for loan in cache.borrow(0, experts):
        for number, slot in zip(loan.experts, loan.slots, strict=True):
            assert holds(cache.region(0).memory[slot], ExpertId(0, number), nbytes)


def test_a_cache_that_was_complete_lends_again_after_it_shrank_and_grew() -> None:
    cache = make(16)
    for layer in (0, 1):
        use(cache, layer, *range(8))
    assert cache.slots_of(0) is not None
    resize(cache, 15)
    assert cache.slots_of(0) is None
    resize(cache, 16)
    for layer in (0, 1):
        use(cache, layer, *range(8))
    slots = cache.slots_of(1)
    assert slots is not None
    assert all(
        holds(cache.region(1).memory[slot], ExpertId(1, number), NBYTES) for number, slot in enumerate(slots.tolist())
    )


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_whatever_is_asked_for_in_between(seed: int) -> None:
    draw = random.Random(seed)
    cache = roomy(4, 12)
    link = link_of(cache)
    link.choose = lambda transfers: draw.choice(list(transfers))
    for _ in range(300):
        layer, act = draw.randrange(2), draw.random()
        if act < 0.5:
            use(cache, layer, *draw.sample(range(8), draw.randint(1, 6)))
        elif act < 0.7:
            cache.prefetch(ids(layer, *draw.sample(range(8), 3)))
        elif act < 0.8:
            cache.fill(ids(layer, *range(8)))
        else:
            resize(cache, draw.randint(1, 12))
        cache.check_integrity()


def test_addresses_without_room_take_none() -> None:
    with SlotPool([SlotClass(64, 2)], torch.device("cpu"), [SlotClass(64, 1), SlotClass(128, 4)]) as pool:
        assert len(pool.regions[0].memory) == 2
        assert pool.count == 2
