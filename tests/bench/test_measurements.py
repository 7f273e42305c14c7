"""Every measurement runs, small: its code is kept in step with the engine's. What it measures is judged elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import NAMES, load, measure
from bench.measurement import BaseSize, Measurement

SLOW = {
    "batch-memory", "batch-resume", "before-after", "faults", "interrupt", "larger-than-memory", "soak",
    "speedup-model", "start",
}  # fmt: skip
"""About ten seconds each: most of them start processes."""


@pytest.fixture(autouse=True, scope="module")
def _checkpoints_are_made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEMOE_BENCH_DIR", str(tmp_path_factory.mktemp("bench")))
        yield


@pytest.fixture(autouse=True)
def _threads_are_left_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def numbers(value: Any) -> Iterator[float]:
    """Every number in a measurement's value or detail."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, (int, float)):
        yield value


@pytest.mark.parametrize(
    "name",
    # `device` runs small in test_device.py, which looks into every section.
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES if name != "device"],
)
def test_a_measurement_runs_small(name: str) -> None:
    measurement = measure(name, small=True)
    assert isinstance(measurement, Measurement)
    assert measurement.name == name
    if "why" in measurement.detail and measurement.value is None:
        pytest.skip(f"{name}: {measurement.detail['why']}")
    assert measurement.value is not None, measurement.detail
    assert measurement.ok is None
    assert all(math.isfinite(number) for number in numbers([measurement.value, measurement.detail]))
    assert json.loads(measurement.to_json())["name"] == name


@pytest.mark.parametrize("name", NAMES)
def test_the_small_size_is_another_one_of_the_same_measurement(name: str) -> None:
    module = load(name)
    assert type(module.FULL) is type(module.SMALL) is module.Size
    assert issubclass(module.Size, BaseSize)
    assert (module.FULL.small, module.SMALL.small) == (False, True)


def test_a_small_run_leaves_the_pictures_of_the_documentation_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEMOE_BENCH_DIR", str(tmp_path))
    assert BaseSize(small=True).picture("curve") == tmp_path / "curve.svg"
    assert BaseSize().picture("curve").parent.name == "benchmarks"
