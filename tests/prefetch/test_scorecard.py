"""Hit rates and totals by hand."""

from __future__ import annotations

import random

import pytest

from edgemoe.prefetch.scorecard import MIN_RATE, PredictionTotals, Scorecard


def settled(card: Scorecard, number: int, *outcomes: bool) -> None:
    """Scores one prediction in bin `number` per outcome."""
    for outcome in outcomes:
        card.score({0: number}, [0] if outcome else [1], [])


def test_every_bin_starts_at_the_prior() -> None:
    card = Scorecard(3, prior=0.4)
    assert [card.rate(number) for number in range(3)] == pytest.approx([0.4] * 3)


def test_the_prior_counts_as_so_many_outcomes() -> None:
    card = Scorecard(2, prior=0.5, weight=4, memory=1e12)
    settled(card, 0, True)
    assert card.rate(0) == pytest.approx((1 + 4 * 0.5) / (1 + 4))
    settled(card, 0, False, False)
    assert card.rate(0) == pytest.approx((1 + 4 * 0.5) / (3 + 4))
    assert card.rate(1) == 0.5, "bins are independent"


def test_old_outcomes_fade() -> None:
    card = Scorecard(1, prior=0.5, weight=2, memory=4)
    settled(card, 0, True, True, False)
    right, seen = 0.75 * (0.75 * 1 + 1), 0.75 * (0.75 * 1 + 1) + 1
    assert card.rate(0) == pytest.approx((right + 1) / (seen + 2))
    settled(card, 0, *[False] * 100)
    assert card.rate(0) == pytest.approx(1 / (4 + 2)), "four outcomes count, and the prior"
    settled(card, 0, *[True] * 100)
    assert card.rate(0) == pytest.approx((4 + 1) / (4 + 2))


@pytest.mark.parametrize("chance", [0.1, 0.6, 0.95])
def test_a_rate_becomes_how_often_it_was_right(chance: float) -> None:
    draw = random.Random(3)
    card = Scorecard(1, prior=0.4)
    settled(card, 0, *[draw.random() < chance for _ in range(4000)])
    assert card.rate(0) == pytest.approx(chance, abs=0.07)


def test_what_was_resident_already_says_nothing() -> None:
    card = Scorecard(1, prior=0.9)
    card.score({3: 0, 4: 0}, [3, 4, 5], [3, 4, 5])
    assert card.rate(0) == pytest.approx(0.9)
    assert card.totals == PredictionTotals()


def test_totals_by_hand() -> None:
    """Predicted are 1 to 5: 1 is resident, 2 and 3 are requested. 6 and 7 are requested too, and 7 is resident."""
    card = Scorecard(2, prior=0.9)
    card.score({1: 0, 2: 0, 3: 1, 4: 1, 5: 0}, [1, 2, 3, 6, 7], [1, 7])
    assert card.totals == PredictionTotals(missing=3, right=2, wrong=2)
    assert (card.totals.recall, card.totals.precision) == pytest.approx((2 / 3, 0.5))
    assert card.rate(0) == pytest.approx((511 / 512 + 7.2) / (1 + 511 / 512 + 8)), "right, then wrong"
    card.score({8: 0}, [8], [])
    assert card.totals == PredictionTotals(missing=4, right=3, wrong=2)


def test_what_is_unlikely_feeds_the_rates_and_is_not_called_named() -> None:
    card = Scorecard(2, prior=MIN_RATE, weight=8, memory=1e12)
    settled(card, 0, False)
    assert card.totals == PredictionTotals(missing=1, wrong=1), "exactly at the bar"
    assert card.rate(0) < MIN_RATE
    card.score({2: 0, 3: 1}, [2, 3], [])
    assert card.totals == PredictionTotals(missing=3, right=1, wrong=1)
    assert card.rate(0) == pytest.approx((1 + 8 * MIN_RATE) / (2 + 8))
    settled(card, 0, *[False] * 9)
    known, rate = card.totals.wrong, card.rate(0)
    settled(card, 0, *[False] * 9)
    assert (card.totals.wrong, card.rate(0) < rate) == (known, True)


def test_rates_before_anything_was_settled_are_nothing() -> None:
    assert (PredictionTotals().recall, PredictionTotals().precision) == (0.0, 0.0)
