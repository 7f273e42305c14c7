from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from edgemoe import Engine, Plan
from edgemoe.checkpoint.checkpoint import open_checkpoint
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.demo import DEMO_NAME, demo_folder
from edgemoe.plan.machine import Gpu
from edgemoe.plan.profile import NAME, VERSION, ForeignProfile, ProfileConditions, read_profile, write_profile
from tests.support.profiles import CARD, CONDITIONS, known_profile

GIB12 = 12 * (1 << 30) - (200 << 20)
"""As a driver says it: less than what is printed on the box."""
NOTHING_MISSING = replace(CONDITIONS, direct_reads=None, host_tier=None)


@pytest.fixture
def state(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path)


def write_raw(state: StateFolder, kept: dict[str, Any]) -> None:
    assert state.path is not None
    (state.path / NAME).write_text(json.dumps(kept))


def test_a_profile_comes_back_as_it_was(state: StateFolder) -> None:
    assert read_profile(state, CONDITIONS) is None
    write_profile(state, known_profile())
    assert read_profile(state, CONDITIONS) == known_profile()


@pytest.mark.parametrize(
    ("elsewhere", "said"),
    [
        ({"processor": "Slide Rule"}, "processor Abacus 9, not Slide Rule"),
        ({"cores": 64}, "cores 2, not 64"),
        ({"ram_gib": 8}, "GiB of RAM 24, not 8"),
        ({"device": "GPU 1"}, "device cpu, not GPU 1"),
        ({"device": "GPU 1", "device_gib": 12}, "device cpu, not GPU 1, GiB of the device's memory 0, not 12"),
        ({"torch": "2.14.0"}, "PyTorch 2.13.0, not 2.14.0"),
        ({"dtype": "float32"}, "dtype bfloat16, not float32"),
        ({"threads": 1}, "threads 2, not 1"),
        ({"link_gbps": 4.0}, "link the real one, not of 4 GB/s"),
        ({"direct_reads": True}, "reads through the page cache, not past the page cache"),
        ({"direct_reads": None, "host_tier": "pinned"}, "experts in their files, not in pinned RAM"),
        ({"cores": 4, "threads": 4}, "cores 2, not 4, threads 2, not 4"),
    ],
)
def test_a_profile_from_elsewhere_is_refused(state: StateFolder, elsewhere: dict[str, Any], said: str) -> None:
    write_profile(state, known_profile())
    with pytest.raises(ForeignProfile) as refusal:
        read_profile(state, replace(CONDITIONS, **elsewhere))
    assert str(refusal.value) == (
        f"the profile of 2026-01-31 does not apply here ({said}): take one with edgemoe profile and the same options"
    )


def test_where_experts_cannot_be_missing_their_source_does_not_matter(state: StateFolder) -> None:
    for kept, here in ((CONDITIONS, NOTHING_MISSING), (NOTHING_MISSING, CONDITIONS)):
        write_profile(state, known_profile(kept))
        assert read_profile(state, here) == known_profile(kept)


def test_conditions_have_the_source_of_missing_experts_where_some_can_be_missing() -> None:
    full = replace(Engine.plan_for(None, device="cpu"), direct_reads=True)
    few = replace(full, slots=full.experts - 1)

    def way(plan: Plan) -> tuple[bool | None, str | None]:
        conditions = ProfileConditions.of(plan)
        return conditions.direct_reads, conditions.host_tier

    assert way(few) == (True, "file")
    assert way(replace(few, direct_reads=False)) == (False, "file")
    assert way(replace(few, host_tier="pinned")) == (None, "pinned")
    assert way(full) == (None, None)


def test_a_card_of_the_same_name_with_less_memory_is_another(state: StateFolder) -> None:
    card = replace(CONDITIONS, device="Abacus 9", device_gib=12)
    write_profile(state, replace(known_profile(card), card=CARD))
    assert read_profile(state, card) == replace(known_profile(card), card=CARD)
    with pytest.raises(ForeignProfile, match=r"\(GiB of the device's memory 12, not 8\)"):
        read_profile(state, replace(card, device_gib=8))


def test_conditions_have_the_cards_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(Engine.plan_for(None, device="cpu"), device="cuda:1")
    monkeypatch.setattr("edgemoe.cache.accelerator.device_name", lambda device: {"cuda:1": "Abacus 9"}[device])
    monkeypatch.setattr(
        "edgemoe.plan.machine.gpus", lambda: [Gpu(0, "Other", 5 << 30, 0), Gpu(1, "Abacus 9", GIB12, 0)]
    )
    conditions = ProfileConditions.of(plan)
    assert (conditions.device, conditions.device_gib) == ("Abacus 9", 12)
    monkeypatch.setattr("edgemoe.plan.machine.gpus", list)
    assert ProfileConditions.of(plan).device_gib == 0


def test_the_cpus_share_of_missing_experts_is_that_of_both_speeds() -> None:
    assert CARD.cpu_share == pytest.approx(30 / 50)
    assert replace(CARD, cpu_beside=0.0).cpu_share == 0


def test_a_profile_of_an_older_version_is_ignored(state: StateFolder) -> None:
    older = known_profile().to_dict() | {"version": 1}
    for name in ("direct_reads", "host_tier"):
        del older["conditions"][name]
    write_raw(state, older)
    assert read_profile(state, CONDITIONS) is None
    write_raw(state, older | {"version": VERSION})
    with pytest.raises(ForeignProfile, match="is damaged"):
        read_profile(state, CONDITIONS)


@pytest.mark.parametrize("change", [{"format": "edgemoe heat"}, {"version": VERSION + 1}])
def test_a_profile_of_another_format_is_ignored(state: StateFolder, change: dict[str, Any]) -> None:
    write_raw(state, known_profile().to_dict() | change)
    assert read_profile(state, CONDITIONS) is None


@pytest.mark.parametrize(
    "change",
    [
        {"times": {}},
        {"times": None},
        {"points": [{"batch": 1}]},
        {"points": 3},
        {"card": {"pcie": 1}},
        {"card": {**asdict(CARD), "vram": -1}},
        {"card": 3},
        {"conditions": {"weather": "fine"}},
        {"speed": {"memory": "fast", "arithmetic": 1, "link": 1}},
        {"speed": {"memory": 1, "arithmetic": 1, "link": -1}},
        {"speed": {"memory": float("nan"), "arithmetic": 1, "link": 1}},
        {"speed": {"memory": 1, "arithmetic": 1, "link": 10**400}},
        {"speed": {"memory": 0, "arithmetic": 1, "link": 1}},
        {"speed": {"memory": 1, "arithmetic": 1, "link": 0}},
        {"routing": {"experts": 8, "among": 1e18, "within": 1}},
        {"routing": {"experts": 8, "among": 10**18, "within": 1}},
        {"conditions": {**asdict(CONDITIONS), "link_gbps": "fast"}},
        {"conditions": {**asdict(CONDITIONS), "cores": [4]}},
    ],
)
def test_a_damaged_profile_is_not_used_and_the_plan_says_so(state: StateFolder, change: dict[str, Any]) -> None:
    write_raw(state, known_profile().to_dict() | change)
    with pytest.raises(ForeignProfile, match=r"is damaged .* and is not used: take one with edgemoe profile"):
        read_profile(state, CONDITIONS)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", "[1" + "0" * 5000 + "]"])
def test_a_file_that_is_no_json_is_damaged(state: StateFolder, text: str) -> None:
    assert state.path is not None
    (state.path / NAME).write_text(text, encoding="latin-1")
    with pytest.raises(ForeignProfile, match="is damaged"):
        read_profile(state, CONDITIONS)


def test_a_file_that_holds_something_else_is_ignored(state: StateFolder) -> None:
    assert state.path is not None
    (state.path / NAME).write_text("[]")
    assert read_profile(state, CONDITIONS) is None


def test_a_plan_says_that_the_profile_is_damaged(tmp_path: Path) -> None:
    plan = Engine.plan_for(None, device="cpu", state_folder=str(tmp_path))
    assert plan.predicted is None
    folder = StateFolder.of(open_checkpoint(demo_folder(), name=DEMO_NAME), tmp_path).path
    assert folder is not None
    folder.mkdir(parents=True)
    (folder / NAME).write_text("{")
    told = Engine.plan_for(None, device="cpu", state_folder=str(tmp_path)).predicted
    assert told is not None
    assert "is damaged" in told.refused
