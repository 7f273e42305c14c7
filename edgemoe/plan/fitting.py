"""Fills in the performance model's parameters from measured points, by least squares within bounds (scipy's TRF)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np

from edgemoe.plan.performance_model import Locality, MachineSpeed, ModelShape, PerformanceModel, Routing, Times
from edgemoe.plan.profile import ProfilePoint

MIN_POINTS = 8
"""Points without which a fit says nothing: MoESD finds that 10 to 13 can fail already."""
LOOSE = 5.0
"""How many times its roofline a parameter may be (MoESD, section 3.3)."""
KNEES, BASES = (0.3, 0.6, 0.9), (1.01, 1.1, 1.5)
"""Where a fit starts from: the model is not convex in lambda and s."""
OUTLIER = 0.1
"""Relative error from which a point pulls less than its square: other programs run too."""
_LINKED = 1e-9


def fit(shape: ModelShape, speed: MachineSpeed, points: Sequence[ProfilePoint], bulk_from: int = 0) -> PerformanceModel:
    """The model of `points`. `bulk_from` are the tokens from which products of another kind run; 0 where none do.

    Errors count relative to what was measured, since what is asked for are ratios. Raises ValueError for fewer than
    FEWEST_POINTS points.
    """
    if len(points) < MIN_POINTS:
        raise ValueError(f"{len(points)} points are too few for a fit: measure at least {MIN_POINTS}")
    if not any(point.total >= bulk_from for point in points):
        bulk_from = 0
    routing, locality = _routing(shape, points), _locality(shape, points)
    times = _times(shape, speed, points, routing, locality, bulk_from)
    return PerformanceModel(shape, speed, routing, locality, times)


def _routing(shape: ModelShape, points: Sequence[ProfilePoint]) -> Routing:
    if shape.top_k >= shape.experts:
        return Routing(shape.experts, 1.0, 1.0)

    def errors(x: Any) -> Any:
        routing = Routing(*x)
        found = [routing.activated(shape.top_k, point.batch, point.tokens) for point in points]
        return np.log(np.array(found) / [point.experts for point in points])

    return Routing(
        *_solve(errors, [0.95 * shape.experts, 0.8, 0.6], [shape.top_k * 1.001, 0, 0], [shape.experts, 1, 1])
    )


def _locality(shape: ModelShape, points: Sequence[ProfilePoint]) -> Locality:
    lean = [point for point in points if point.cache_share < 1 and point.misses]
    if not lean:
        return Locality(1.0, 1.0)

    def errors(x: Any) -> Any:
        locality = Locality(*x)
        found = [locality.hit_rate(point.cache_share, point.experts / shape.experts) for point in lean]
        return np.array(found) - [1 - point.misses / (shape.layers * point.experts) for point in lean]

    return Locality(*_solve(errors, [2.0, 1.0], [0, 0], [16, 16]))


def _times(
    shape: ModelShape,
    speed: MachineSpeed,
    points: Sequence[ProfilePoint],
    routing: Routing,
    locality: Locality,
    bulk_from: int,
) -> Times:
    drafted = [point for point in points if point.tokens > 1]
    draft = _line(drafted, [point.draft_seconds for point in drafted])
    reject = _line(drafted, [point.reject_seconds for point in drafted])

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
        for knee, base in product(KNEES, BASES)
    ]
    return times(min((_solved(errors, start, low, high) for start in starts), key=lambda found: float(found.cost)).x)


def _bounds(shape: ModelShape, speed: MachineSpeed, points: Sequence[ProfilePoint]) -> tuple[list[float], list[float]]:
    """For bias, k1, k2, k3, lambda, s, the exposed share, and the three of large passes.

    As in the paper: bias and k2 are at least the time of reading what they stand for, and a few times that at most.
    The bias may also be as long as the shortest pass: where a model is small, its many small operations are most of it.
    """
    longest, shortest = (choose(point.seconds for point in points) for choose in (max, min))
    dense = shape.dense_nbytes / speed.memory
    layer = shape.layers * shape.record_nbytes / speed.memory
    low = [dense, 0.0, layer, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0, 0.0]
    high = [max(LOOSE * dense, shortest), longest, LOOSE * layer, longest, 1.0, 2.0, 2.0, longest, longest, 2.0]
    return low, high


def _line(points: Sequence[ProfilePoint], seconds: Sequence[float]) -> tuple[float, float]:
    """A bias and what each sequence adds, neither below 0."""
    if not points:
        return 0.0, 0.0
    batches, measured = np.array([point.batch for point in points]), np.maximum(seconds, _LINKED)

    def errors(x: Any) -> Any:
        return np.log(np.maximum(x[0] + x[1] * batches, _LINKED) / measured)

    each = float(np.median(measured / batches))
    bias, slope = _solve(errors, [each / 2, each], [0, 0], [math.inf, math.inf])
    return bias, slope


def _solve(
    errors: Callable[[Any], Any], start: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> list[float]:
    return [float(value) for value in _solved(errors, start, low, high).x]


def _solved(errors: Callable[[Any], Any], start: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Any:
    from scipy.optimize import least_squares

    inside = np.clip(start, np.add(low, 1e-12), np.subtract(high, 1e-12))
    return least_squares(errors, inside, bounds=(low, high), x_scale="jac", loss="soft_l1", f_scale=OUTLIER)
