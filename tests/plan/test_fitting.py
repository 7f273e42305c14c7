from __future__ import annotations

from statistics import fmean

import pytest

from edgemoe.measure.profiler import LEAN_SHARE
from edgemoe.plan.fitting import MIN_POINTS, fit
from edgemoe.plan.moesd import tokens_per_cycle
from edgemoe.plan.performance_model import PerformanceModel
from tests.support.profiles import known_model, points_of

UNSEEN = [(batch, depth) for batch in (1, 3, 6, 12, 24, 48, 64) for depth in (2, 5, 7)]


def error(found: PerformanceModel, true: PerformanceModel, share: float) -> float:
    """The mean relative error of predicted speed-ups, at shapes that were not measured."""
    errors = []
    for batch, depth in UNSEEN:
        gains = []
        for model in (found, true):
            rates = [true.hit_rate(share, batch, tokens) for tokens in (1, depth + 1)]
            gains.append(model.speedup(batch, depth, tokens_per_cycle(0.7, depth), *rates))
        errors.append(abs(gains[0] / gains[1] - 1))
    return fmean(errors)


@pytest.mark.parametrize("share", [1.0, LEAN_SHARE, 0.6])
def test_a_fit_to_points_of_a_model_recovers_the_model(share: float) -> None:
    true = known_model()
    found = fit(true.shape, true.speed, points_of(true), true.times.bulk_from)
    assert error(found, true, share) < 0.03
    assert found.activated(5, 3) == pytest.approx(true.activated(5, 3), rel=0.02)
    assert found.hit_rate(0.5, 5, 3) == pytest.approx(true.hit_rate(0.5, 5, 3), abs=0.02)


def test_noise_is_averaged_and_outliers_pull_little() -> None:
    true = known_model()
    points = points_of(true, noise=0.08)
    points[5] = type(points[5])(**{**vars(points[5]), "seconds": 10 * points[5].seconds})
    found = fit(true.shape, true.speed, points, true.times.bulk_from)
    assert error(found, true, 1.0) < 0.12


def test_parameters_stay_within_the_papers_bounds() -> None:
    true = known_model()
    times = fit(true.shape, true.speed, points_of(true, noise=0.2, seed=3), true.times.bulk_from).times
    layer = true.shape.layers * true.shape.record_nbytes / true.speed.memory
    assert layer <= times.expert <= 5 * layer
    assert 0.2 <= times.knee <= 1
    assert 1 <= times.base <= 2
    assert times.bias >= true.shape.dense_nbytes / true.speed.memory
    assert min(vars(times).values()) >= 0


def test_without_points_of_bulk_passes_none_are_fitted() -> None:
    true = known_model(bulk_from=0)
    points = [point for point in points_of(true) if point.total < 129]
    assert fit(true.shape, true.speed, points, bulk_from=129).times.bulk_from == 0


def test_without_misses_the_fit_has_no_locality() -> None:
    true = known_model()
    points = [point for point in points_of(true) if point.cache_share == 1]
    found = fit(true.shape, true.speed, points, true.times.bulk_from)
    assert found.hit_rate(0.25, 4) == pytest.approx(0.25)


def test_too_few_points_are_refused() -> None:
    true = known_model()
    with pytest.raises(ValueError, match=f"3 points are too few for a fit: measure at least {MIN_POINTS}"):
        fit(true.shape, true.speed, points_of(true)[:3])
