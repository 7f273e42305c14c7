"""Plans for a card, on a stand-in for PyTorch's backend: what is free, what is left, and where experts wait."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from edgemoe import Engine, PlanError, planner, runtime
from edgemoe.cache import accelerator
from edgemoe.checkpoint.blueprint import NO_BF16, Blueprint, blueprint_for, read_blueprint
from edgemoe.checkpoint.checkpoint import open_checkpoint
from edgemoe.cli.doctor import model as doctor
from edgemoe.config import GIB, MIB, EngineConfig
from edgemoe.plan import machine
from edgemoe.plan.plan import Plan
from edgemoe.planner import LIBRARY_NBYTES, choose_device, make_plan
from edgemoe.runtime import Runtime
from tests.support.checkpoints import Zoo

CARD = torch.device("cuda:0")


class Card:
    """A card with 8 GiB, of which tests set how much is free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.ram, self.capability, self.calls = 8 * GIB, 64 * GIB, (8, 6), [""]
        fakes: dict[str, Callable[..., Any]] = {
            "available": lambda: True,
            "count": lambda: 1,
            "device_name": lambda device: "a card",
            "free_nbytes": lambda device: self.free,
            "multiplies_bf16": lambda device: self.capability >= accelerator.MIN_BF16_CAPABILITY,
            "synchronize": lambda device: self.calls.append("synchronize"),
            "release_unused": lambda: self.calls.append("release"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(accelerator, name, fake)
        monkeypatch.setattr(planner, "ram_free", lambda: self.ram)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


@pytest.fixture(scope="module")
def blueprint(zoo: Zoo) -> Blueprint:
    """4 layers of 8 experts, each 72 KiB."""
    return read_blueprint(open_checkpoint(zoo("mixtral")))


def plan_of(blueprint: Blueprint, **settings: Any) -> Plan:
    return make_plan(blueprint, EngineConfig(device="cuda", context=256, threads=1).changed(**settings))


def test_a_plan_leaves_room_for_the_libraries_of_the_device(blueprint: Blueprint, card: Card) -> None:
    plan = plan_of(blueprint, reserve=MIB, reserve_share=0.0)
    assert plan.reserve_nbytes == MIB + LIBRARY_NBYTES
    assert make_plan(blueprint, EngineConfig(device="cpu", reserve=MIB, reserve_share=0.0)).reserve_nbytes == MIB


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_card_is_chosen_by_every_name_of_it(name: str, card: Card) -> None:
    assert choose_device(name) == CARD


def test_a_card_that_is_not_there_is_refused(card: Card) -> None:
    with pytest.raises(PlanError, match=r"'cuda:1' is not there \(1 CUDA devices\)"):
        choose_device("cuda:1")


# --- where experts wait -----------------------------------------------------------------------------


def experts_row(plan: Plan) -> str:
    return next(why for what, _, why in plan.lines() if what == "experts")


def test_a_machine_with_little_free_ram_says_that_experts_stay_in_their_files(blueprint: Blueprint, card: Card) -> None:
    card.ram = 2 * MIB
    plan = plan_of(blueprint)
    assert plan.host_tier == "file"
    assert "free RAM does not hold them all (host_tier=)" in experts_row(plan)
    card.ram = 8 * GIB
    assert "host_tier" not in experts_row(make_plan(blueprint, EngineConfig(device="cpu", context=256)))


@pytest.mark.parametrize(("tier", "expected"), [("auto", "pinned"), ("ram", "pinned"), ("file", "file")])
def test_a_tier_is_taken_as_asked_for(tier: str, expected: str, blueprint: Blueprint, card: Card) -> None:
    assert plan_of(blueprint, host_tier=tier).host_tier == expected


def test_ram_that_grows_as_it_is_used_can_be_asked_for(blueprint: Blueprint, card: Card) -> None:
    """A virtual machine may say that it has less than it will get."""
    card.ram = 2 * MIB
    plan = plan_of(blueprint, host_tier="ram")
    assert plan.host_tier == "pageable"
    records = 32 * 72 * 1024
    staging = EngineConfig().staging_records * plan.slot_nbytes
    assert plan.pinned_nbytes - staging + plan.pageable_nbytes == records


def test_another_tier_is_refused(blueprint: Blueprint, card: Card) -> None:
    with pytest.raises(PlanError, match="host_tier 'disk' is not one of auto, ram, file"):
        plan_of(blueprint, host_tier="disk")


# --- the dtype --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((7, 5), "auto", "float16"),
        ((6, 1), "auto", "float16"),
        ((8, 0), "auto", "bfloat16"),
        ((12, 0), "auto", "bfloat16"),
        ((7, 5), "bfloat16", "bfloat16"),
        ((7, 5), "float32", "float32"),
    ],
)
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_card_without_bf16_runs_such_a_checkpoint_in_float16(
    device: str, capability: tuple[int, int], dtype: str, expected: str, zoo: Zoo, card: Card
) -> None:
    card.capability = capability
    config = EngineConfig(device=device, dtype=dtype, context=256)
    plan = make_plan(blueprint_for(zoo("mixtral", dtype=torch.bfloat16), config), config)
    assert plan.dtype == expected
    said = next(why for what, _, why in plan.lines() if what == "device")
    assert (NO_BF16 in said) == (plan.dtype_note == NO_BF16) == (expected == "float16")


@pytest.mark.parametrize("device", ["cpu", "cuda:7", "nonsense"])
def test_no_other_device_changes_the_dtype(device: str, zoo: Zoo, card: Card) -> None:
    card.capability = (7, 5)
    found = blueprint_for(zoo("mixtral", dtype=torch.bfloat16), EngineConfig(device=device))
    assert (found.dtype, found.dtype_note) == (torch.bfloat16, "")


def test_a_float32_checkpoint_stays_one(zoo: Zoo, card: Card) -> None:
    card.capability = (7, 5)
    assert blueprint_for(zoo("mixtral"), EngineConfig(device="cuda")).dtype is torch.float32


def test_the_doctor_says_it_too(zoo: Zoo, card: Card) -> None:
    card.capability = (7, 5)
    check, _ = doctor._planned("model", str(zoo("mixtral", dtype=torch.bfloat16)), Engine)
    assert "in float16: the checkpoint is in bfloat16, which this device cannot multiply (--dtype)" in check.found


# --- loading and closing ----------------------------------------------------------------------------


def test_memory_that_is_gone_since_the_plan_is_refused_with_what_to_lower(
    blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(blueprint, EngineConfig(device="cpu", context=256, threads=1))

    def refuse(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB.\nMore lines")

    monkeypatch.setattr(runtime, "SlotPool", refuse)
    with pytest.raises(
        PlanError, match=r"Tried to allocate 6\.00 GiB\.\): .* expert_cache= than 32 .* context= than 256"
    ):
        Runtime(blueprint, plan, EngineConfig(device="cpu"), lambda progress: None)


def test_closing_gives_back_what_pytorch_keeps_once_the_device_is_done(blueprint: Blueprint, card: Card) -> None:
    plan = make_plan(blueprint, EngineConfig(device="cpu", context=256, threads=1))
    loaded = Runtime(blueprint, plan, EngineConfig(device="cpu", state_folder="none"), lambda progress: None)
    card.calls.clear()
    loaded._plan = replace(plan, device="cuda:0")
    loaded.close()
    gc.collect()
    assert card.calls == ["synchronize", "release"]


def test_the_speed_of_copies_is_measured_from_page_locked_memory(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pageable memory is copied at half of it, and records are not."""
    locked: list[int] = []
    while_copying: list[list[int]] = []

    def lock(memory: torch.Tensor) -> bool:
        locked.append(memory.numel())
        return True

    def timed(action: Callable[[], object], device: torch.device) -> float:
        while_copying.append(list(locked))
        return 2.0

    monkeypatch.setattr(accelerator, "lock_host", lock)
    monkeypatch.setattr(accelerator, "unlock_host", lambda memory: locked.remove(memory.numel()))
    monkeypatch.setattr(accelerator, "is_accelerator", lambda device: True)
    monkeypatch.setattr(machine, "_fastest", timed)
    assert machine.copy_speed(4096, torch.device("cpu")) == 2048
    assert while_copying == [[4096]]
    assert locked == []
