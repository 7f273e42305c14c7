"""Settings of an engine are checked before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemoe import CheckpointError, EdgeMoEError, Engine, EngineConfig, PlanError
from edgemoe.config import MAX_COUNT, chosen_config

WRONG: list[Any] = [b"auto", [1], {}, object(), float("nan"), 10**400, "x" * 5000, "a\0b"]


@pytest.mark.parametrize("name", [entry.name for entry in fields(EngineConfig)])
@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_no_setting_takes_what_is_none_of_its_types(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match=rf"^{name}=.* is not possible: give ") as refusal:
        EngineConfig(**{name: value})
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("name", "value", "give"),
    [
        ("threads", 0, "a whole number from 1 to 1024 or None"),
        ("threads", True, "a whole number from 1 to 1024 or None"),
        ("threads", 1.0, "a whole number from 1 to 1024 or None"),
        ("context", "512", "a whole number or None"),
        ("offline", 1, "True or False"),
        ("batch", 2.5, 'a text of at most 256 characters, such as "auto" or a whole number'),
        ("batch", None, 'a text of at most 256 characters, such as "auto" or a whole number'),
        ("expert_cache", True, 'a text of at most 256 characters, such as "auto" or a whole number'),
        ("link_gbps", "fast", "a number or None"),
        ("prefetch", "on", 'one of auto, off, such as "auto"'),
        ("file_reads", "mapped", 'one of auto, direct, cached, such as "auto"'),
        ("kv_share", 1.5, "a number from 0 to 1"),
        ("reader_threads", 0, "a whole number from 1 to 256"),
        ("reserve", -1, "a whole number of at least 0"),
        ("max_batch", MAX_COUNT + 1, "a whole number of at least 1"),
        ("draft_model", 5, "a text of at most 4096 characters or a path or None"),
    ],
)
def test_a_refusal_says_what_to_give(name: str, value: Any, give: str) -> None:
    with pytest.raises(PlanError) as refusal:
        Engine.plan_for(**{name: value})
    assert str(refusal.value) == f"{name}={value!r} is not possible: give {give}"


def test_numbers_of_numpy_and_paths_are_taken() -> None:
    config = EngineConfig(threads=np.int64(3), link_gbps=np.float32(0.5), state_folder=Path("x"))
    assert (config.threads, config.link_gbps, config.state_folder) == (3, 0.5, Path("x"))
    assert type(config.threads) is int


def test_an_unknown_setting_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="'colour' is no setting of an engine"):
        Engine.load(colour="red")


@pytest.mark.parametrize("config", [5, "auto", {}, []], ids=str)
def test_a_config_is_an_engine_config(config: Any) -> None:
    with pytest.raises(PlanError, match="^config must be an edgemoe.config.EngineConfig or None, not "):
        Engine.load(None, config)


def test_settings_by_name_take_the_place_of_those_of_a_config() -> None:
    assert chosen_config(EngineConfig(threads=2, context=64), {"threads": 3}) == EngineConfig(threads=3, context=64)


@pytest.mark.parametrize("model", [5, b"x", ["a"], "", "a\0b", object()], ids=repr)
@pytest.mark.parametrize("call", [Engine.load, Engine.plan_for], ids=["load", "plan_for"])
def test_a_model_is_a_text_or_a_path(model: Any, call: Callable[..., object]) -> None:
    with pytest.raises(CheckpointError, match="names no model: give a checkpoint's folder, .* as model="):
        call(model)


def test_a_progress_callback_can_be_called() -> None:
    with pytest.raises(EdgeMoEError, match="^on_progress=5 cannot be called: give a function, or None"):
        Engine.load(on_progress=5)  # type: ignore[arg-type]
