"""The order of prefetches, their victims, and the fate of wrong ones."""

from __future__ import annotations

import pytest

from edgemoe.cache import ExpertId
from edgemoe.prefetch import prefetcher as module
from edgemoe.prefetch.prefetcher import VICTIM_MISS_RATE
from edgemoe.prefetch.scorecard import PredictionTotals
from tests.support.instruments import Clock, FakeGauge
from tests.support.workbench import LAYERS, LIKELY, NBYTES, SURE, UNLIKELY, Bench, ids


@pytest.fixture
def bench() -> Bench:
    return Bench()


# --- order -----------------------------------------------------------------------------------------


def test_layers_go_in_their_order_and_the_likeliest_of_a_layer_first(bench: Bench) -> None:
    bench.predict(SURE, 2, 4)
    bench.predict(LIKELY, 0, 7, 1)
    bench.predict(SURE, 0, 9)
    bench.predict(LIKELY, 1, 3)
    assert bench.issue_all() == [*ids(0, 9, 7, 1), *ids(1, 3), *ids(2, 4)]


def test_layers_without_a_slot_of_their_size_hold_up_no_others() -> None:
    bench = Bench(slots=4, nbytes=(NBYTES, NBYTES, NBYTES, 2 * NBYTES))
    bench.predict(SURE, 0, 1, 2, 3)
    bench.predict(SURE, 1, 4)
    bench.predict(SURE, 2, 5)
    bench.predict(SURE, 3, 6, 7)
    assert bench.issue_all() == [*ids(0, 1, 2, 3), *ids(3, 6)], "3 small slots, and a large one"


def test_only_layers_behind_the_one_that_a_pass_is_in(bench: Bench) -> None:
    for layer in range(LAYERS):
        bench.predict(SURE, layer, layer)
    assert bench.issue_all(after=1) == [*ids(2, 2), *ids(3, 3)]


def test_bins_of_one_predictor_have_rates_of_their_own() -> None:
    bench = Bench()
    card = bench.prefetcher.register("binned", 3, prior=0.5)
    for _ in range(50):
        card.score({0: 0, 1: 1, 2: 2}, [1], [])
        card.score({2: 2}, [2], [])
    assert card.rate(0) < VICTIM_MISS_RATE / (VICTIM_MISS_RATE + 1) < card.rate(2) < card.rate(1)
    bench.prefetcher.add_prediction("binned", 0, {5: 0, 6: 2, 7: 1, 8: 2}, [])
    assert bench.issue_all() == ids(0, 7, 6, 8)


def test_of_two_predictors_the_surer_one_counts(bench: Bench) -> None:
    for first, second in ((SURE, UNLIKELY), (UNLIKELY, SURE)):
        bench.predict(LIKELY, 0, 1)
        bench.predict(first, 0, 2)
        bench.predict(second, 0, 2, 3)
        assert bench.prefetcher._probabilities[0] == pytest.approx(
            {ExpertId(0, 2): 0.9, ExpertId(0, 1): 0.5, ExpertId(0, 3): 0.9 if second == SURE else 0.1}
        )
        bench.prefetcher.drop()
    bench.predict(UNLIKELY, 0, 1, 2)
    bench.predict(LIKELY, 0, 2, 4)
    assert bench.issue_all() == ids(0, 2, 4)


def test_what_a_predictor_says_replaces_what_it_said(bench: Bench) -> None:
    bench.predict(SURE, 0, 1, 2)
    bench.predict(LIKELY, 0, 6)
    bench.predict(SURE, 0, 3)
    assert bench.issue_all() == ids(0, 3, 6)
    bench.prefetcher.enter_layer(0, [1, 3])
    assert bench.cards[SURE].totals == PredictionTotals(missing=2, right=1, wrong=0, bytes_useful=NBYTES)


# --- slots -----------------------------------------------------------------------------------------


def test_what_is_foretold_does_not_leave_for_what_is_wanted_later() -> None:
    bench = Bench(slots=2)
    bench.use(1, 0)
    bench.use(3, 0)
    bench.predict(SURE, 1, 0)
    assert bench.issue() == []
    bench.predict(SURE, 2, 5)
    assert bench.issue() == ids(2, 5)
    assert bench.cache.residents(1) == [0], "the other one was used more recently"
    bench.predict(SURE, 3, 7)
    assert bench.issue() == []


def test_what_is_not_likely_enough_is_not_kept_for() -> None:
    bench = Bench(slots=2)
    bench.use(1, 0)
    bench.use(3, 0)
    bench.predict(UNLIKELY, 1, 0)
    bench.predict(SURE, 2, 5)
    assert bench.issue() == ids(2, 5)
    assert bench.cache.residents(1) == []


def test_what_found_no_slot_is_tried_again() -> None:
    bench = Bench(slots=1)
    bench.use(3, 0)
    bench.predict(SURE, 0, 5)
    bench.predict(LIKELY, 0, 6)
    with bench.cache.lend(3, [0]):
        assert bench.issue() == []
    assert bench.issue() == ids(0, 5)


# --- passes ----------------------------------------------------------------------------------------


def test_a_prediction_is_settled_once_when_its_layer_is_reached(bench: Bench) -> None:
    bench.predict(SURE, 1, 1, 2, 3, resident=[3])
    bench.predict(LIKELY, 1, 2)
    bench.prefetcher.enter_layer(0, [1, 2, 3])
    assert bench.cards[SURE].totals == PredictionTotals()
    for _ in range(2):
        bench.prefetcher.enter_layer(1, [1, 3, 5])
    assert bench.cards[SURE].totals == PredictionTotals(missing=2, right=1, wrong=1)
    assert bench.cards[LIKELY].totals == PredictionTotals(missing=3, right=0, wrong=1)
    assert bench.cards[UNLIKELY].totals == PredictionTotals(), "it predicted nothing"


def test_what_is_said_of_a_reached_layer_is_brought_no_more(bench: Bench) -> None:
    bench.predict(SURE, 0, 1)
    bench.predict(SURE, 1, 2)
    bench.prefetcher.enter_layer(0, [5])
    assert bench.issue_all() == ids(1, 2)


def test_what_was_wrong_is_called_off_when_its_layer_is_reached(bench: Bench) -> None:
    """Prefetches that have started to move, or were requested, continue."""
    bench.predict(SURE, 0, 1, 2, 3)
    bench.predict(SURE, 1, 4)
    bench.prefetcher.issue()
    bench.link.queued = {*ids(0, 1, 2), *ids(1, 4)}
    bench.prefetcher.enter_layer(0, [1])
    assert bench.link.happened("cancel") == ids(0, 2)
    assert [bench.cache.holds(expert) for expert in ids(0, 1, 2, 3)] == [True, False, True]
    bench.prefetcher.drop()
    assert bench.link.happened("cancel") == [*ids(0, 2), *ids(1, 4)], "prefetches of an entered layer are settled"


def test_what_became_of_the_bytes_is_told_of_whom_they_were_brought_for(bench: Bench) -> None:
    bench.predict(SURE, 0, 1, 2, 3)
    bench.predict(LIKELY, 0, 3, 4)
    bench.prefetcher.issue()
    bench.link.finish(*ids(0, 1, 4))
    bench.link.queued = set(ids(0, 2))
    bench.use(0, 1, 3)
    sure, likely = (bench.cards[name].totals for name in (SURE, LIKELY))
    assert (sure.bytes_useful, sure.bytes_late, sure.bytes_wasted) == (NBYTES, NBYTES, 0), "2 was cancelled in time"
    assert (likely.bytes_useful, likely.bytes_late, likely.bytes_wasted) == (0, 0, NBYTES), "3 counts for the surer one"
    telemetry = sure.telemetry("forecast")
    assert (telemetry["forecast_bytes_useful"], telemetry["forecast_bytes_late"]) == (NBYTES, NBYTES)


def test_what_others_brought_is_not_called_off(bench: Bench) -> None:
    bench.cache.prefetch(ids(0, 2))
    bench.link.queued = set(ids(0, 2))
    bench.predict(SURE, 0, 2)
    bench.prefetcher.issue()
    bench.prefetcher.enter_layer(0, [])
    bench.prefetcher.drop()
    assert bench.link.happened("cancel") == []


def test_a_pass_that_is_not_made_is_forgotten(bench: Bench) -> None:
    bench.predict(SURE, 0, 1, 2)
    bench.predict(SURE, 1, *range(8))
    bench.prefetcher.issue()
    bench.link.queued = {*ids(0, 1), *ids(1, 0, 1)}
    bench.prefetcher.drop()
    assert bench.link.happened("cancel") == [*ids(0, 1), *ids(1, 0, 1)]
    assert bench.cache.holds(ExpertId(0, 2)), "it has started to move"
    assert bench.issue_all() == []
    bench.prefetcher.enter_layer(0, [1])
    assert bench.cards[SURE].totals == PredictionTotals(bytes_wasted=NBYTES)
    bench.cache.check_integrity()


# --- the time of a layer ---------------------------------------------------------------------------


def test_a_layer_takes_as_long_as_from_one_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(module, monkeypatch)
    bench = Bench(gauge=FakeGauge(bandwidth=NBYTES, busy=0.0))

    def seconds() -> float:
        """The time per layer, from the break-even of a link that loads one record per second."""
        bar = bench.prefetcher.break_even(1)
        return 0.25 / bar - 0.25

    def enter_layer(layer: int, after: float) -> None:
        clock.now += after
        bench.prefetcher.enter_layer(layer, [])

    enter_layer(0, 5.0)
    enter_layer(2, 0.3)
    assert bench.prefetcher.break_even(1) == 0.2, "no measurement across a skipped layer"
    enter_layer(3, 0.4)
    assert seconds() == pytest.approx(0.4)
    enter_layer(0, 0.9)
    assert seconds() == pytest.approx(0.4), "no measurement between passes"
    enter_layer(1, 0.2)
    assert seconds() == pytest.approx(0.4 + (0.2 - 0.4) / 16)
    for _ in range(100):
        enter_layer(0, 0.9)
        enter_layer(1, 0.2)
    assert seconds() == pytest.approx(0.2, rel=0.01)


def test_the_gauge_is_read_once_a_pass(bench: Bench) -> None:
    for _ in range(3):
        for layer in range(LAYERS):
            bench.prefetcher.enter_layer(layer, [])
    assert bench.gauge.readings == 3


# --- accuracy --------------------------------------------------------------------------------------


def loads(bench: Bench, passes: int, *, right: bool) -> int:
    """The number of loads over `passes` passes with one predicted expert each."""
    before = len(bench.prefetched())
    for _ in range(passes):
        bench.predict(SURE, 0, 1)
        bench.prefetcher.issue()
        bench.link.queued = set(ids(0, 1))
        bench.use(0, 1 if right else 2)
        bench.use(1, *range(4))
    return len(bench.prefetched()) - before


def test_a_predictor_that_is_wrong_is_silenced_and_heard_again_when_it_is_right() -> None:
    bench = Bench(slots=4)
    assert 5 <= loads(bench, 200, right=False) <= 60
    assert loads(bench, 50, right=False) == 0
    assert bench.cards[SURE].rate(0) < bench.prefetcher.break_even(1)
    loads(bench, 200, right=True)
    assert bench.cards[SURE].rate(0) > bench.prefetcher.break_even(1)
    assert loads(bench, 50, right=True) == 50
    bench.cache.check_integrity()
