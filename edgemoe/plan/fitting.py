"""Fits the parameters of the performance model to measured points, by bounded least squares (scipy's TRF)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np

from edgemoe.plan.performance_model import Locality, MachineSpeed, ModelShape, PerformanceModel, Routing, Times
from edgemoe.plan.profile import ProfilePoint

MIN_POINTS = 8
"""Minimum number of points for a fit. MoESD reports fits that fail with 10 to 13 points."""
MAX_ROOFLINE_FACTOR = 5.0
"""Upper bound of a parameter, in multiples of its roofline time (MoESD, section 3.3)."""
START_KNEES, START_BASES = (0.3, 0.6, 0.9), (1.01, 1.1, 1.5)
"""Starting values of lambda and s, in all pairs: the model is not convex in them."""
OUTLIER_ERROR = 0.1
"""Relative error above which a point counts less than its square (soft L1): other programs may have disturbed it."""
_MIN_SECONDS = 1e-9
"""Keeps logarithms of measured times finite."""


def fit(shape: ModelShape, speed: MachineSpeed, points: Sequence[ProfilePoint], bulk_from: int = 0) -> PerformanceModel:
    """Fits the performance model to `points`.

    `bulk_from` is the number of tokens from which a pass runs full matrix products instead of kernels; 0 where no
    pass does. Errors are relative to the measured times, since callers ask the model for ratios. Raises ValueError
    for fewer than `MIN_POINTS` points.
    """
    if len(points) < MIN_POINTS:
        raise ValueError(f"{len(points)} points are too few for a fit: measure at least {MIN_POINTS}")
    if not any(point.total >= bulk_from for point in points):
        bulk_from = 0
    routing, locality = _fit_routing(shape, points), _fit_locality(shape, points)
    times = _fit_times(shape, speed, points, routing, locality, bulk_from)
    return PerformanceModel(shape, speed, routing, locality, times)


def _fit_routing(shape: ModelShape, points: Sequence[ProfilePoint]) -> Routing:
    if shape.top_k >= shape.experts:
        return Routing(shape.experts, 1.0, 1.0)

    def errors(x: Any) -> Any:
        routing = Routing(*x)
        found = [routing.activated(shape.top_k, point.batch, point.tokens) for point in points]
        return np.log(np.array(found) / [point.experts for point in points])

    return Routing(
        *_solve(errors, [0.95 * shape.experts, 0.8, 0.6], [shape.top_k * 1.001, 0, 0], [shape.experts, 1, 1])
    )


def _fit_locality(shape: ModelShape, points: Sequence[ProfilePoint]) -> Locality:
    missing = [point for point in points if point.cache_share < 1 and point.misses]
    if not missing:
        return Locality(1.0, 1.0)

    def errors(x: Any) -> Any:
        locality = Locality(*x)
        found = [locality.hit_rate(point.cache_share, point.experts / shape.experts) for point in missing]
        return np.array(found) - [1 - point.misses / (shape.layers * point.experts) for point in missing]

    return Locality(*_solve(errors, [2.0, 1.0], [0, 0], [16, 16]))


def _fit_times(
    shape: ModelShape,
    speed: MachineSpeed,
    points: Sequence[ProfilePoint],
    routing: Routing,
    locality: Locality,
    bulk_from: int,
) -> Times:
    drafted = [point for point in points if point.tokens > 1]
    draft = _fit_line(drafted, [point.draft_seconds for point in drafted])
    reject = _fit_line(drafted, [point.reject_seconds for point in drafted])

    def times(x: Any) -> Times:
        bias, token, expert, load, knee, base, exposed, *bulk = map(float, x)
        return Times(bias, token, expert, load, knee, base, *draft, *reject, exposed, bulk_from, *bulk)

    def errors(x: Any) -> Any:
        model = PerformanceModel(shape, speed, routing, locality, times(x))
        found = [model.pass_seconds(point.total, point.experts, point.misses) for point in points]
        return np.log(np.array(found) / [point.seconds for point in points])

    low, high = _bounds(shape, speed, points)
    shortest = min(point.seconds for point in points)
    starts = [
        [low[0] + shortest / 4, shortest / 8, 1.5 * low[2], shortest / 8, knee, base, 0.5, shortest, shortest / 16, 0.5]
        for knee, base in product(START_KNEES, START_BASES)
    ]
    fits = (_least_squares(errors, start, low, high) for start in starts)
    return times(min(fits, key=lambda found: float(found.cost)).x)


def _bounds(shape: ModelShape, speed: MachineSpeed, points: Sequence[ProfilePoint]) -> tuple[list[float], list[float]]:
    """Lower and upper bounds of bias, k1, k2, k3, lambda, s, the exposed share, and the three of bulk passes.

    As in the paper, the bounds of bias and k2 are the time to read their weights once, and a few times that. The bias
    may also reach the shortest pass: the many small operations of a small model take most of its time.
    """
    longest, shortest = (choose(point.seconds for point in points) for choose in (max, min))
    dense = shape.dense_nbytes / speed.memory
    layer = shape.layers * shape.record_nbytes / speed.memory
    low = [dense, 0.0, layer, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0, 0.0]
    max_dense, max_layer = MAX_ROOFLINE_FACTOR * dense, MAX_ROOFLINE_FACTOR * layer
    high = [max(max_dense, shortest), longest, max_layer, longest, 1.0, 2.0, 2.0, longest, longest, 2.0]
    return low, high


def _fit_line(points: Sequence[ProfilePoint], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds as a linear function of the batch: intercept and slope, neither below 0."""
    if not points:
        return 0.0, 0.0
    batches, measured = np.array([point.batch for point in points]), np.maximum(seconds, _MIN_SECONDS)

    def errors(x: Any) -> Any:
        return np.log(np.maximum(x[0] + x[1] * batches, _MIN_SECONDS) / measured)

    each = float(np.median(measured / batches))
    bias, slope = _solve(errors, [each / 2, each], [0, 0], [math.inf, math.inf])
    return bias, slope


def _solve(
    errors: Callable[[Any], Any], start: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> list[float]:
    return [float(value) for value in _least_squares(errors, start, low, high).x]


def _least_squares(
    errors: Callable[[Any], Any], start: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> Any:
    from scipy.optimize import least_squares

    inside = np.clip(start, np.add(low, 1e-12), np.subtract(high, 1e-12))
    return least_squares(errors, inside, bounds=(low, high), x_scale="jac", loss="soft_l1", f_scale=OUTLIER_ERROR)
