from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from profiles import CONDITIONS, known_profile

from edgemoe.profile_file import NAME, ForeignProfile, read, write
from edgemoe.state_folder import StateFolder


@pytest.fixture
def state(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path)


def test_a_profile_comes_back_as_it_was(state: StateFolder) -> None:
    assert read(state, CONDITIONS) is None
    write(state, known_profile())
    assert read(state, CONDITIONS) == known_profile()


@pytest.mark.parametrize(
    ("elsewhere", "said"),
    [
        ({"processor": "Slide Rule"}, "processor Abacus 9, not Slide Rule"),
        ({"cores": 64}, "cores 2, not 64"),
        ({"ram_gib": 8}, "GiB of RAM 24, not 8"),
        ({"device": "GPU 1"}, "device cpu, not GPU 1"),
        ({"torch": "2.14.0"}, "PyTorch 2.13.0, not 2.14.0"),
        ({"dtype": "float32"}, "dtype bfloat16, not float32"),
        ({"threads": 1}, "threads 2, not 1"),
        ({"link_gbps": 4.0}, "link the real one, not of 4 GB/s"),
        ({"cores": 4, "threads": 4}, "cores 2, not 4, threads 2, not 4"),
    ],
)
def test_a_profile_from_elsewhere_is_refused(state: StateFolder, elsewhere: dict[str, Any], said: str) -> None:
    write(state, known_profile())
    with pytest.raises(ForeignProfile) as refusal:
        read(state, replace(CONDITIONS, **elsewhere))
    assert str(refusal.value) == (
        f"the profile of 2026-01-31 was taken elsewhere or otherwise ({said}): take one for this with edgemoe profile"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"format": "edgemoe heat"},
        {"version": 2},
        {"times": {}},
        {"times": None},
        {"points": [{"batch": 1}]},
        {"points": 3},
        {"conditions": {"weather": "fine"}},
        {"speed": {"memory": "fast", "arithmetic": 1, "link": 1}},
        {"speed": {"memory": 1, "arithmetic": 1, "link": -1}},
        {"speed": {"memory": float("nan"), "arithmetic": 1, "link": 1}},
    ],
)
def test_a_file_that_is_not_sound_is_none(state: StateFolder, change: dict[str, Any]) -> None:
    assert state.path is not None
    (state.path / NAME).write_text(json.dumps(known_profile().to_dict() | change))
    assert read(state, CONDITIONS) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_so_is_one_that_is_no_profile_at_all(state: StateFolder, text: str) -> None:
    assert state.path is not None
    (state.path / NAME).write_text(text)
    assert read(state, CONDITIONS) is None
