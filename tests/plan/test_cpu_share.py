"""The CPU's share of missing experts: what the setting may be, where `auto` takes it from, and why it is off."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgemoe import Plan, PlanError
from edgemoe.checkpoint.blueprint import Blueprint, read_blueprint
from edgemoe.checkpoint.checkpoint import open_checkpoint
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.cli.options.values import cpu_share as option
from edgemoe.cli.wording import in_options
from edgemoe.config import EngineConfig
from edgemoe.experts.expert_ffn import FastExperts
from edgemoe.kernels.triton import availability
from edgemoe.plan.profile import ProfileConditions, write_profile
from edgemoe.planner import make_plan
from tests.support import pretend_card
from tests.support.checkpoints import Zoo
from tests.support.profiles import CARD, known_profile

Planned = Callable[..., Plan]


@pytest.fixture
def blueprint(zoo: Zoo) -> Blueprint:
    return read_blueprint(open_checkpoint(zoo("mixtral")))


@pytest.fixture
def planned(blueprint: Blueprint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """The plan for a card with slots for a quarter of the experts."""
    pretend_card.install(monkeypatch)
    monkeypatch.setattr(availability, "missing", lambda: "")

    def plan(share: Any, **settings: Any) -> Plan:
        given: dict[str, Any] = {
            "device": "cpu",
            "context": 256,
            "threads": 1,
            "expert_cache": 8,
            "state_folder": tmp_path,
        }
        return make_plan(blueprint, EngineConfig(cpu_share=share, **given | settings))

    return plan


def row(plan: Plan) -> tuple[str, str] | None:
    return next(((amount, why) for what, amount, why in plan.lines() if what == "CPU share"), None)


@pytest.mark.parametrize(("asked", "share"), [("35%", 0.35), (0.35, 0.35), ("0.35", 0.35), (1, 1.0), ("100 %", 1.0)])
def test_a_share_is_taken_as_asked_for(planned: Planned, asked: Any, share: float) -> None:
    plan = planned(asked)
    assert plan.cpu_share == pytest.approx(share)
    assert row(plan) == (
        f"{share:.0%}", "of the missing experts, as asked for; the last bits depend on what is resident"
    )  # fmt: skip


@pytest.mark.parametrize("asked", ["off", " OFF ", 0, "0%"])
def test_without_a_share_nothing_is_said(planned: Planned, asked: Any) -> None:
    plan = planned(asked)
    assert (plan.cpu_share, plan.cpu_share_note, row(plan)) == (0.0, "", None)


def test_it_is_off_unless_asked_for() -> None:
    assert EngineConfig().cpu_share == "off"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("half", "cpu_share='half' is no share of the missing experts: give auto, off, a share such as 35%"),
        (1.5, "cpu_share=1.5 is not from 0 to 1"),
        ("-10%", "cpu_share=-10% is not from 0 to 1"),
        ("nan", "cpu_share=nan is not from 0 to 1"),
        (True, "cpu_share=True is not possible"),
    ],
)
@pytest.mark.parametrize("card", [True, False])
def test_another_value_is_refused_with_the_option(
    blueprint: Blueprint, asked: Any, said: str, card: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if card:
        pretend_card.install(monkeypatch)
    with pytest.raises(PlanError) as refusal:
        make_plan(blueprint, EngineConfig(cpu_share=asked, device="cpu", context=256))
    assert said in str(refusal.value)
    assert "--cpu-share" in in_options(str(refusal.value))


def test_auto_is_what_the_profile_of_this_machine_has_measured(
    planned: Planned, blueprint: Blueprint, tmp_path: Path
) -> None:
    state, plan = StateFolder.of(blueprint.checkpoint, tmp_path), planned("auto")
    assert row(plan) == (
        "off", "not measured on this machine: take a profile with edgemoe profile and the same options"
    )  # fmt: skip
    here = ProfileConditions.of(plan)
    write_profile(state, replace(known_profile(here), card=CARD))
    plan = planned("auto")
    # 30 GB/s of the CPU and 20 GB/s of the link, at the same time.
    assert plan.cpu_share == pytest.approx(0.6)
    assert row(plan) is not None
    assert "as measured on 2026-01-31" in plan.cpu_share_note
    write_profile(state, replace(known_profile(here), card=replace(CARD, cpu=0.0, cpu_beside=0.0)))
    assert row(planned("auto")) == ("off", "as measured on 2026-01-31")
    write_profile(state, replace(known_profile(replace(here, device="another card")), card=CARD))
    plan = planned("auto")
    assert plan.cpu_share == 0
    assert "does not apply here (device another card" in plan.cpu_share_note


@pytest.mark.parametrize("asked", ["auto", 0.5])
@pytest.mark.parametrize(
    ("settings", "why"),
    [({"expert_cache": "100%"}, "every expert has a slot"), ({"host_tier": "file"}, "are not in RAM (host_tier=)")],
)
def test_it_is_off_where_the_cpu_has_nothing_to_compute_from(
    planned: Planned, asked: Any, settings: dict[str, Any], why: str
) -> None:
    amount, said = row(planned(asked, **settings)) or ("", "")
    assert amount == "off"
    assert why in said


def test_it_is_off_without_kernels_of_either_side(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastExperts, "fits", lambda moe: False)
    assert row(planned(0.5)) == ("off", "the CPU has no kernels for fp32")
    monkeypatch.setattr(availability, "missing", lambda: "Triton is not installed")
    assert row(planned(0.5)) == ("off", "Triton is not installed")


def test_it_is_off_without_a_card(blueprint: Blueprint) -> None:
    plan = make_plan(blueprint, EngineConfig(cpu_share=0.5, device="cpu", context=256, expert_cache=8))
    assert row(plan) == ("off", "without another device the CPU computes every expert")


@pytest.mark.parametrize(("typed", "meant"), [("auto", "auto"), (" OFF", "off"), ("35%", "35%"), ("0.35", "0.35")])
def test_the_option_takes_what_the_setting_takes(typed: str, meant: str) -> None:
    assert option(typed) == meant


def test_the_option_refuses_a_word() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="'much' is not a share; give auto, off, or a share"):
        option("much")
