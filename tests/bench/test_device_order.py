"""The model check of the device's order finds nothing in the engine, and each of these faults in a few schedules."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from bench.measurement import Measurement
from bench.no_card.device_order import SMALL, Size, run
from bench.no_card.stand_in.lanes import StandInStreams, TurnLink
from edgemoe.cache import ExpertCache, Loan
from edgemoe.experts.expert_layer import ExpertLayers
from edgemoe.experts.routing_override import RoutingOverride
from edgemoe.kernels.triton.availability import missing

Mutation = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def _triton_is_there() -> None:
    if reason := missing():
        pytest.skip(reason)


def flush_is_left_out_before_the_second_launch(patch: pytest.MonkeyPatch) -> None:
    from edgemoe.experts.grouped_layer import GroupedLayer

    original: Any = GroupedLayer._compute_as_they_arrive

    def compute(self: GroupedLayer, own: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.tools.table, "flush", lambda: None)
            original(self, own)

    patch.setattr(GroupedLayer, "_compute_as_they_arrive", compute)


def table_is_not_flushed_before_a_layer_begins(patch: pytest.MonkeyPatch) -> None:
    from edgemoe.experts.grouped_layer import GroupedLayer

    original: Any = GroupedLayer.compute

    def compute(self: GroupedLayer, *args: Any, **more: Any) -> torch.Tensor:
        flush = self.tools.table.flush
        calls: list[None] = []

        def all_but_the_first() -> None:
            if calls:
                flush()
            calls.append(None)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.tools.table, "flush", all_but_the_first)
            result: torch.Tensor = original(self, *args, **more)
            return result

    patch.setattr(GroupedLayer, "compute", compute)


def an_evicted_slot_is_written_before_its_last_use(patch: pytest.MonkeyPatch) -> None:
    original = StandInStreams.copy

    def copy(self: StandInStreams, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        return original(self, target, source, None)

    patch.setattr(StandInStreams, "copy", copy)


def the_table_has_a_record_before_the_device_waits_for_it(patch: pytest.MonkeyPatch) -> None:
    wait, release = StandInStreams.compute_after, TurnLink.released
    late: list[tuple[StandInStreams, Any]] = []

    def compute_after(self: StandInStreams, event: Any) -> None:
        late.append((self, event))

    def released(self: TurnLink, slots: Sequence[int]) -> None:
        for streams, event in late:
            # Not those of an earlier schedule.
            if streams is self._streams:
                wait(streams, event)
        late.clear()
        release(self, slots)

    patch.setattr(StandInStreams, "compute_after", compute_after)
    patch.setattr(TurnLink, "released", released)


def slots_are_released_before_the_kernels_that_read_them_are_queued(patch: pytest.MonkeyPatch) -> None:
    original = ExpertCache.borrow

    def borrow(self: ExpertCache, *args: Any) -> Generator[Loan, None, None]:
        link: Any = self._link
        loans = original(self, *args)
        try:
            loan = next(loans, None)
            while loan is not None:
                early = link._streams.mark()
                yield loan
                with pytest.MonkeyPatch.context() as inner:
                    inner.setattr(link._streams, "mark", partial(_same, early))
                    loan = next(loans, None)
        finally:
            loans.close()

    patch.setattr(ExpertCache, "borrow", borrow)


def _same(value: Any) -> Any:
    return value


def nothing_is_released_after_an_aborted_layer(patch: pytest.MonkeyPatch) -> None:
    from edgemoe.experts.grouped_layer import GroupedLayer

    original: Any = GroupedLayer._compute_as_they_arrive

    def compute(self: GroupedLayer, own: Any) -> None:
        cache: Any = self._cache
        try:
            original(self, own)
        except BaseException:
            # The next call, and no more.
            cache.released_all = partial(delattr, cache, "released_all")
            raise

    patch.setattr(GroupedLayer, "_compute_as_they_arrive", compute)


def nothing_is_released_after_an_aborted_draft(patch: pytest.MonkeyPatch) -> None:
    original = ExpertLayers.overriding

    @contextmanager
    def overriding(self: ExpertLayers, routing: RoutingOverride) -> Iterator[None]:
        assert self._cache is not None
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self._cache, "released_all", lambda: None)
            with original(self, routing):
                yield

    patch.setattr(ExpertLayers, "overriding", overriding)


def a_staging_buffer_is_filled_again_before_its_copy_has_ended(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StandInStreams, "block", lambda self, event: self._turns.pause())


MUTATIONS: list[Mutation] = [
    flush_is_left_out_before_the_second_launch,
    table_is_not_flushed_before_a_layer_begins,
    an_evicted_slot_is_written_before_its_last_use,
    the_table_has_a_record_before_the_device_waits_for_it,
    slots_are_released_before_the_kernels_that_read_them_are_queued,
    nothing_is_released_after_an_aborted_layer,
    nothing_is_released_after_an_aborted_draft,
    a_staging_buffer_is_filled_again_before_its_copy_has_ended,
]


def first_faulty(most: int) -> Measurement | None:
    """The measurement of the first few schedules among which there is a faulty one."""
    step = 20
    for first in range(0, most, step):
        measured = run(Size(small=True, schedules=step, first=first))
        if not measured.ok:
            return measured
    return None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.__name__)
def test_a_fault_is_found(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    # Imported before anything is replaced, so that Triton is set up as usual.
    assert run(Size(small=True, schedules=1)).value is not None
    mutation(monkeypatch)
    measured = first_faulty(400)
    assert measured is not None
    assert measured.detail["shortest_faulty"]["faults"]


def test_nothing_is_found_in_the_engine() -> None:
    measured = run(SMALL)
    assert measured.value == {"schedules": SMALL.schedules, "faulty": 0}, measured.detail
    # What is checked has happened.
    assert measured.detail["records_read"] > 10 * SMALL.schedules
    assert measured.detail["copies"] > 3 * SMALL.schedules
    assert measured.detail["aborted"] > SMALL.schedules // 4


def test_a_seed_always_gives_the_same_schedule() -> None:
    first, second = (run(Size(small=True, schedules=30, first=7)).detail for _ in range(2))
    kept = ("passes", "aborted", "copies", "records_read", "device_steps")
    assert [first[name] for name in kept] == [second[name] for name in kept]
