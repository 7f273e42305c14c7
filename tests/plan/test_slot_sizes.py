"""Plans for layers whose records differ in size: slots of their sizes, and exact bytes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind

from bench.support.gguf_files import GgufMaker
from edgemoe import PlanError, planner
from edgemoe.cache import SlotClass
from edgemoe.checkpoint.blueprint import Blueprint, open_blueprint
from edgemoe.config import MIB, EngineConfig
from edgemoe.plan.plan import Plan
from edgemoe.planner import make_plan
from edgemoe.quiet import quiet_transformers
from edgemoe.sizes import format_bytes

RESERVE = 4 * MIB
SMALL, LARGE = 24, 24
"""Experts with records of either size."""


@pytest.fixture(scope="module")
def blueprint(tmp_path_factory: pytest.TempPathFactory) -> Blueprint:
    """4 layers of 12 experts; the records of the first two are larger."""
    folder = tmp_path_factory.mktemp("mixed")
    own = {f"blk.{layer}.ffn_down_exps.weight": Kind.Q8_0 for layer in (0, 1)}
    with quiet_transformers():
        return open_blueprint(GgufMaker.of_zoo("qwen3_moe", folder).write(folder / "model.gguf", Kind.Q4_0, own=own))


@pytest.fixture(scope="module")
def sizes(blueprint: Blueprint) -> tuple[int, int]:
    """Bytes of a small and of a large record."""
    large, _, _, small = (moe.layout.nbytes for moe in blueprint.experts_modules)
    assert small < 0.9 * large
    return small, large


def plan_with(blueprint: Blueprint, expert_cache: str | int, **settings: Any) -> Plan:
    fixed: dict[str, Any] = {"reserve": RESERVE, "reserve_share": 0.0, "prefill_workspace": MIB, "context": 64}
    fixed |= {"device": "cpu", "threads": 1, "batch": 1, "expert_cache": expert_cache}
    return make_plan(blueprint, EngineConfig(**fixed | settings))


class Ram:
    """Sets the free memory that the planner sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, blueprint: Blueprint) -> None:
        self._monkeypatch = monkeypatch
        self.leave(64 << 30, 0)
        plan = plan_with(blueprint, 1)
        self._rest = plan.total_nbytes - plan.cache_nbytes

    def leave(self, room: int, rest: int | None = None) -> None:
        """Leaves `room` bytes for the expert cache."""
        free = room + RESERVE + (self._rest if rest is None else rest)
        self._monkeypatch.setattr(planner, "ram_free", lambda: free)


@pytest.fixture
def ram(monkeypatch: pytest.MonkeyPatch, blueprint: Blueprint) -> Ram:
    return Ram(monkeypatch, blueprint)


@pytest.mark.parametrize(
    ("asked", "counts"),
    [("auto", (24, 24)), ("50%", (12, 12)), (20, (10, 10)), (2, (1, 1)), (1, (1,)), (99, (24, 24)), ("1MiB", (24, 24))],
)
def test_each_size_gets_the_same_share(
    asked: str | int, counts: tuple[int, ...], blueprint: Blueprint, sizes: tuple[int, int], ram: Ram
) -> None:
    plan, (small, large) = plan_with(blueprint, asked), sizes
    expected = sizes[-len(counts) :]
    assert plan.slot_classes == tuple(map(SlotClass, expected, counts))
    assert plan.slots == sum(counts)
    assert plan.cache_nbytes == sum(each.nbytes * each.count for each in plan.slot_classes)
    assert (plan.slot_nbytes, plan.record_nbytes) == (large, (small + large) / 2)
    assert plan.nbytes_per_token == plan.dense_nbytes + plan.top_k * 2 * (small + large)


def test_bytes_and_free_memory_are_never_exceeded(blueprint: Blueprint, sizes: tuple[int, int], ram: Ram) -> None:
    small, large = sizes
    whole = SMALL * small + LARGE * large
    for room in range(large, whole, 5000):
        ram.leave(64 << 30)
        given = plan_with(blueprint, f"{room}B")
        ram.leave(room)
        found = plan_with(blueprint, "auto")
        assert given.slot_classes == found.slot_classes
        assert room - large < found.cache_nbytes <= room
        with pytest.raises(PlanError, match="does not fit") as refusal:
            plan_with(blueprint, "100%")
        named = re.search(r"expert_cache=(\d+) or less", str(refusal.value))
        assert named is not None
        assert plan_with(blueprint, int(named[1])).slot_classes == found.slot_classes
    ram.leave(whole)
    assert plan_with(blueprint, "100%").slots == SMALL + LARGE


def test_room_for_less_than_the_largest_record_is_refused(
    blueprint: Blueprint, sizes: tuple[int, int], ram: Ram
) -> None:
    ram.leave(sizes[1] - 1)
    with pytest.raises(PlanError, match="too little"):
        plan_with(blueprint, "auto")
    ram.leave(64 << 30)
    with pytest.raises(PlanError, match=f"one takes {format_bytes(sizes[1])}: give at least that"):
        plan_with(blueprint, f"{sizes[1] - 1}B")


def test_sequences_and_slots_of_two_sizes_share_the_memory(
    blueprint: Blueprint, sizes: tuple[int, int], ram: Ram
) -> None:
    for room in range(sizes[1], SMALL * sizes[0] + LARGE * sizes[1], 5000):
        ram.leave(room)
        plan = plan_with(blueprint, "auto", batch="auto")
        assert plan.total_nbytes + plan.reserve_nbytes <= plan.device_free
        assert plan.slots >= 1


def test_the_sizes_of_the_slots_are_shown(blueprint: Blueprint, sizes: tuple[int, int], ram: Ram) -> None:
    small, large = map(format_bytes, sizes)
    plan = plan_with(blueprint, "50%")
    assert ("expert cache", format_bytes(plan.cache_nbytes)) in [row[:2] for row in plan.lines()]
    assert f"RAM, 24 slots of {small} to {large}, 50% of the experts" in [why for _, _, why in plan.lines()]
    assert json.loads(json.dumps(plan.to_dict()))["slot_classes"] == [
        {"nbytes": nbytes, "count": 12} for nbytes in sizes
    ]


def test_records_in_ram_are_counted_by_their_own_sizes(
    blueprint: Blueprint, sizes: tuple[int, int], ram: Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, config = planner._records_nbytes(blueprint), EngineConfig()
    assert records == SMALL * sizes[0] + LARGE * sizes[1]
    tiered = planner._host_tier(plan_with(blueprint, "50%"), records, config)
    assert (tiered.host_tier, tiered.pinned_nbytes, tiered.pageable_nbytes) == ("pinned", records, 0)
    monkeypatch.setattr(planner, "ram_free", lambda: 2 * records)
    small = replace(config, reserve=0, staging_records=2, pinned_share=0.25)
    tiered = planner._host_tier(tiered, records, small)
    assert tiered.host_tier == "pageable"
    assert tiered.pinned_nbytes + tiered.pageable_nbytes == records + 2 * sizes[1]
