"""Which prefetches pay, and how many are in flight."""

from __future__ import annotations

import pytest

from edgemoe.prefetch.prefetcher import MAX_IN_FLIGHT, VICTIM_MISS_RATE
from tests.support.instruments import FakeGauge
from tests.support.workbench import LAYERS, LIKELY, NBYTES, SURE, UNLIKELY, Bench, ids, paced


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("bandwidth", "busy", "expected"),
    [
        (100.0, 0.0, [0.25 / 1.25] * 3),
        (100.0, 1.0, [1.25 / 2.25] * 3),
        (1.0, 0.0, [0.25 / (0.25 + 0.1), 0.25 / (0.25 + 0.2), 0.25 / (0.25 + 0.3)]),
        (4.0, 0.5, [0.75 / (0.75 + 0.4), 0.75 / (0.75 + 0.8), 0.75 / (0.75 + 1)]),
    ],
    ids=["idle", "busy", "slow", "slow-and-busy"],
)
def test_what_is_worth_bringing_by_hand(
    bandwidth: float, busy: float, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer takes 0.1 s, in which the link loads a tenth of `bandwidth` records."""
    assert VICTIM_MISS_RATE == 0.25
    bench = paced(bandwidth, busy, 0.1, monkeypatch)
    assert [bench.prefetcher.break_even(distance) for distance in (1, 2, 3)] == pytest.approx(expected)


def test_in_a_pass_only_what_the_link_would_have_idled_for_is_saved() -> None:
    bench = Bench(gauge=FakeGauge(0.0, 0.5))
    assert bench.prefetcher.break_even(1, in_pass=False) == pytest.approx(0.75 / 1.75)
    assert bench.prefetcher.break_even(1, in_pass=True) == pytest.approx(0.75 / 1.25)
    bench.predict(LIKELY, 1, 1)
    bench.predict(SURE, 2, 2)
    assert bench.issue_all(after=0) == ids(2, 2)
    assert bench.issue_all() == ids(1, 1)
    busy = Bench(gauge=FakeGauge(0.0, 1.0))
    assert busy.prefetcher.break_even(1, in_pass=True) == 1.0


def test_a_link_of_unknown_speed_is_taken_for_fast_enough() -> None:
    bench = Bench(gauge=FakeGauge(0.0, 0.25))
    assert bench.prefetcher.break_even(1) == pytest.approx(0.5 / 1.5)


def test_what_nobody_waits_for_is_hardly_worth_bringing() -> None:
    assert Bench(gauge=FakeGauge(0.0, 0.0, wait_share=0.5)).prefetcher.break_even(1) == pytest.approx(0.25 / 0.75)
    bench = Bench(gauge=FakeGauge(0.0, 0.0, wait_share=0.0))
    assert bench.prefetcher.break_even(1) == 1.0
    bench.predict(SURE, 0, 1)
    assert bench.issue_all() == []


def test_what_a_missing_expert_costs_is_its_time_on_the_link_as_far_as_it_is_waited_for() -> None:
    bench = Bench(gauge=FakeGauge(bandwidth=4 * NBYTES, busy=0.3, wait_share=0.5))
    assert bench.prefetcher.load_seconds == pytest.approx(0.125)
    assert bench.prefetcher.link_busy == 0.3
    assert Bench().prefetcher.load_seconds == 0


def test_nothing_is_brought_that_is_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bars of the next layers are 0.71, 0.56 and less, so that 0.5 is enough from the third on."""
    bench = paced(1.0, 0.0, 0.1, monkeypatch)
    for layer in range(LAYERS):
        bench.predict(LIKELY, layer, 5)
    assert bench.issue_all() == [*ids(2, 5), *ids(3, 5)]
    bench.predict(UNLIKELY, 3, 7)
    assert bench.issue_all() == []


def test_the_bar_is_met_by_what_is_just_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(gauge=FakeGauge(0.0, 0.25))
    bench.prefetcher.register("just", 1, prior=bench.prefetcher.break_even(1))
    bench.prefetcher.register("less", 1, prior=bench.prefetcher.break_even(1) - 0.01)
    bench.predict("just", 0, 1)
    bench.predict("less", 0, 2)
    assert bench.issue_all() == ids(0, 1)


# --- how many at a time ----------------------------------------------------------------------------


def test_no_more_than_a_few_are_on_the_way(bench: Bench) -> None:
    bench.predict(SURE, 0, *range(8))
    bench.predict(SURE, 1, *range(8))
    for _ in range(3):
        bench.prefetcher.issue()
    assert bench.prefetched() == ids(0, *range(MAX_IN_FLIGHT))
    bench.link.finish(*ids(0, 1, 3))
    bench.prefetcher.issue()
    assert bench.prefetched() == ids(0, *range(MAX_IN_FLIGHT + 2))
    assert bench.cache.prefetching == MAX_IN_FLIGHT


def test_what_others_put_on_the_link_counts_and_what_a_pass_waits_for_does_not(bench: Bench) -> None:
    bench.cache.prefetch(ids(3, *range(MAX_IN_FLIGHT)))
    bench.predict(SURE, 0, 1)
    bench.prefetcher.issue()
    assert bench.prefetched() == ids(3, *range(MAX_IN_FLIGHT))
    list(bench.cache.borrow(3, [0], meanwhile=bench.prefetcher.issue))
    assert bench.prefetched()[-1:] == ids(0, 1)


@pytest.mark.parametrize(("records", "expected"), [(0.3, [1, 1, 1]), (1.3, [1, 2, 3]), (2.5, [2, 4, 4]), (9, [4] * 3)])
def test_no_more_than_arrive_in_time(records: float, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The link loads `records` records while a pass advances by a layer."""
    for distance, count in enumerate(expected, start=1):
        bench = paced(records * 10, 0.0, 0.1, monkeypatch)
        bench.predict(SURE, distance - 1, *range(8))
        bench.prefetcher.issue()
        assert bench.prefetched() == ids(distance - 1, *range(count))


def test_what_is_there_or_coming_is_not_brought_and_takes_no_place(bench: Bench) -> None:
    bench.use(0, 1, 2)
    bench.cache.prefetch(ids(0, 3))
    bench.predict(SURE, 0, 1, 2, 3, 4, 5)
    bench.prefetcher.issue()
    assert bench.prefetched() == [*ids(0, 3), *ids(0, 4, 5)]
