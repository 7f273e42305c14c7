"""Rates start at their priors, follow the outcomes, and forget old ones."""

from __future__ import annotations

import random

import pytest

from edgemoe.prefetch.calibration import CalibratedRates


def test_a_bin_begins_at_its_prior() -> None:
    rates = CalibratedRates([0.1, 0.5, 0.9])
    assert len(rates) == 3
    assert [rates.rate(number) for number in range(3)] == [0.1, 0.5, 0.9]


@pytest.mark.parametrize(("came_true", "expected"), [(True, (4 * 0.5 + 1) / 5), (False, 4 * 0.5 / 5)])
def test_the_prior_counts_as_so_many_outcomes(came_true: bool, expected: float) -> None:
    rates = CalibratedRates([0.5], weight=4.0)
    rates.observe(0, came_true)
    assert rates.rate(0) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_rate_becomes_what_is_seen_and_no_other_does(share: float) -> None:
    draw, rates = random.Random(3), CalibratedRates([0.5, 0.3])
    for _ in range(2000):
        rates.observe(0, draw.random() < share)
    assert rates.rate(0) == pytest.approx(share, abs=0.08)
    assert rates.rate(1) == 0.3


def test_old_outcomes_fade() -> None:
    rates = CalibratedRates([0.5], memory=20)
    for _ in range(500):
        rates.observe(0, True)
    high = rates.rate(0)
    assert high == pytest.approx((20 + 2) / 24)
    for _ in range(60):
        rates.observe(0, False)
    assert rates.rate(0) < 0.15 < high


def test_a_rate_stays_a_share() -> None:
    draw, rates = random.Random(4), CalibratedRates([0.0, 1.0], weight=1.0, memory=3)
    for _ in range(200):
        rates.observe(draw.randrange(2), draw.random() < 0.5)
        assert all(0 <= rates.rate(number) <= 1 for number in range(2))
