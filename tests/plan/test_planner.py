"""The plan's arithmetic, its settings, and refusals whose advice works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from edgemoe import Engine, PlanError, planner
from edgemoe.checkpoint.blueprint import Blueprint, read_blueprint
from edgemoe.checkpoint.checkpoint import open_checkpoint
from edgemoe.config import MIB, EngineConfig
from edgemoe.plan.plan import Plan
from edgemoe.planner import choose_device, make_plan
from edgemoe.sizes import format_bytes, parse_bytes
from tests.support.checkpoints import Zoo


@pytest.fixture(scope="module")
def blueprint(zoo: Zoo) -> Blueprint:
    """4 layers of 8 experts, each 72 KiB."""
    return read_blueprint(open_checkpoint(zoo("mixtral")))


@pytest.fixture
def ram(monkeypatch: pytest.MonkeyPatch) -> Ram:
    return Ram(monkeypatch)


class Ram:
    """Sets the free memory that the planner sees, since the machine's own varies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.set(64 << 30)

    def set(self, free: int) -> None:
        self._monkeypatch.setattr(planner, "ram_free", lambda: free)

    def leave_room_for(self, slots: int, blueprint: Blueprint) -> None:
        """Leaves memory for `slots` slots and half of one, beside everything else in the plan."""
        plan = make_plan(blueprint, CONFIG)
        rest = plan.total_nbytes - plan.cache_nbytes
        self.set(rest + CONFIG.reserve + slots * plan.slot_nbytes + plan.slot_nbytes // 2)


CONFIG = EngineConfig(
    device="cpu", reserve=4 * MIB, reserve_share=0.0, prefill_workspace=MIB, context=256, threads=1, batch=1
)
"""Room for one sequence, so that sizes are exact."""


def changed(**settings: Any) -> EngineConfig:
    return EngineConfig(**{**vars(CONFIG), **settings})


def plan_with(blueprint: Blueprint, expert_cache: str | int) -> Plan:
    return make_plan(blueprint, changed(expert_cache=expert_cache))


@pytest.mark.parametrize(
    ("asked", "slots"),
    [
        ("auto", 32),
        ("AUTO ", 32),
        (1, 1),
        (5, 5),
        ("5", 5),
        (32, 32),
        (1000, 32),
        ("100%", 32),
        ("50%", 16),
        ("12.5 %", 4),
        ("200%", 32),
        ("72KiB", 1),
        ("143KiB", 1),
        ("144KiB", 2),
        ("0.5MiB", 7),
        ("1MB", 13),
        ("6GiB", 32),
    ],
)
def test_forms_of_the_expert_cache(asked: str | int, slots: int, blueprint: Blueprint, ram: Ram) -> None:
    plan = plan_with(blueprint, asked)
    assert plan.slots == slots
    assert plan.cache_nbytes == slots * plan.slot_nbytes == slots * 72 * 1024


@pytest.mark.parametrize("asked", ["", "lots", "5.5", "%", "x%", "nan%", "inf%", "6 parsecs", "GiB", "--5", "1e3", "²"])
def test_another_form_is_refused_with_the_valid_ones(asked: str, blueprint: Blueprint, ram: Ram) -> None:
    with pytest.raises(PlanError, match="expert_cache=") as refusal:
        plan_with(blueprint, asked)
    assert all(form in str(refusal.value) for form in ('"6GiB"', '"40%"', '"96"', '"auto"'))


@pytest.mark.parametrize("asked", [0, -3, "0", "-3", "0%", "1%", "71KiB", "10B"])
def test_a_cache_without_room_for_an_expert_is_refused_with_the_minimum(
    asked: str | int, blueprint: Blueprint, ram: Ram
) -> None:
    with pytest.raises(PlanError, match=r"expert_cache=.* 72\.0 KiB: give at least that, or 1 slot"):
        plan_with(blueprint, asked)


@pytest.mark.parametrize("room", [1, 5, 31])
@pytest.mark.parametrize("asked", [32, "100%", "6GiB"])
def test_a_cache_that_does_not_fit_is_refused_with_a_number_that_does(
    room: int, asked: str | int, blueprint: Blueprint, ram: Ram
) -> None:
    ram.leave_room_for(room, blueprint)
    with pytest.raises(PlanError, match="does not fit") as refusal:
        plan_with(blueprint, asked)
    named = re.search(r"expert_cache=(\d+) or less", str(refusal.value))
    assert named is not None
    assert int(named[1]) == room
    assert plan_with(blueprint, room).slots == room
    assert plan_with(blueprint, "auto").slots == room
    with pytest.raises(PlanError):
        plan_with(blueprint, room + 1)


def test_where_not_one_expert_fits_the_missing_bytes_are_named_and_suffice(blueprint: Blueprint, ram: Ram) -> None:
    ram.leave_room_for(1, blueprint)
    needed = make_plan(blueprint, CONFIG)
    free = needed.device_free
    ram.set(free - 3 * MIB)
    with pytest.raises(PlanError, match="free that much memory") as refusal:
        plan_with(blueprint, "auto")
    named = re.search(r"([\d.]+ [KM]iB) too little", str(refusal.value))
    assert named is not None
    short = parse_bytes(named[1])
    ram.set(free - 3 * MIB + short + MIB // 10)
    assert plan_with(blueprint, "auto").slots >= 1


def test_where_the_context_leaves_no_room_for_experts_a_smaller_one_is_advised(blueprint: Blueprint, ram: Ram) -> None:
    large, small = changed(context=512), changed(context=32)
    ram.set(make_plan(blueprint, small).total_nbytes - 32 * 72 * 1024 + CONFIG.reserve + 100 * 1024)
    with pytest.raises(PlanError, match="give a smaller context="):
        make_plan(blueprint, large)
    assert make_plan(blueprint, small).slots == 1


def test_the_numbers_add_up(blueprint: Blueprint, ram: Ram) -> None:
    plan = plan_with(blueprint, 5)
    parts = plan.dense_nbytes + plan.kv_nbytes + plan.workspace_nbytes + plan.cache_nbytes
    assert plan.total_nbytes == parts
    assert (plan.layers, plan.experts, plan.top_k, plan.slot_nbytes) == (4, 32, 2, 72 * 1024)
    assert plan.kv_nbytes == 256 * 4 * 2 * 2 * 16 * 4
    assert plan.file_nbytes == 32 * 72 * 1024
    stored = blueprint.checkpoint.nbytes
    assert plan.dense_nbytes + plan.file_nbytes == stored + 8 * 4 * 2, "and the rotary frequencies, twice"
    assert (plan.pinned_nbytes, plan.pageable_nbytes, plan.host_tier) == (0, 0, "file")


def test_the_same_plan_is_used_by_the_run(zoo: Zoo) -> None:
    planned = Engine.plan_for(zoo("mixtral"), expert_cache=5, context=64, threads=1)
    with Engine.load(zoo("mixtral"), expert_cache=5, context=64, threads=1) as engine:
        ignored = {"device_free", "reserve_nbytes"}
        used = engine.plan.to_dict()
        assert {k: v for k, v in used.items() if k not in ignored} == {
            k: v for k, v in planned.to_dict().items() if k not in ignored
        }


@pytest.mark.parametrize("context", [2, 512])
def test_a_context_within_the_models_is_taken_as_it_is(context: int, blueprint: Blueprint, ram: Ram) -> None:
    assert make_plan(blueprint, EngineConfig(device="cpu", context=context)).context == context


def test_a_context_is_refused_with_the_limit(blueprint: Blueprint, ram: Ram) -> None:
    with pytest.raises(PlanError, match=r"513 tokens exceeds the model's 512: lower context="):
        make_plan(blueprint, EngineConfig(device="cpu", context=513))
    for context in (1, 0, -5):
        with pytest.raises(PlanError, match=r"give at least 2 as context="):
            make_plan(blueprint, EngineConfig(device="cpu", context=context))


def test_the_default_context_is_the_models_up_to_a_limit(zoo: Zoo, ram: Ram) -> None:
    long = read_blueprint(open_checkpoint(zoo("mixtral", max_position_embeddings=100_000)))
    assert make_plan(long, EngineConfig(device="cpu")).context == 8192
    short = read_blueprint(open_checkpoint(zoo("mixtral")))
    assert make_plan(short, EngineConfig(device="cpu")).context == 512


def test_the_default_context_shrinks_before_it_crowds_out_experts(zoo: Zoo, ram: Ram) -> None:
    long = read_blueprint(open_checkpoint(zoo("mixtral", max_position_embeddings=100_000)))
    ram.set(24 * MIB)
    plan = make_plan(long, EngineConfig(device="cpu", reserve=MIB, prefill_workspace=MIB, batch=1))
    assert plan.context == 2048
    assert plan.kv_nbytes <= 24 * MIB // 8


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", "meta", "cuda:99", ""])
def test_a_device_that_cannot_be_used_is_refused_by_name(name: str) -> None:
    with pytest.raises(PlanError, match=f"device {name!r}.*device="):
        choose_device(name)


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("gbps", [-1.0, float("nan")])
def test_a_simulated_link_must_have_a_bandwidth(gbps: float, zoo: Zoo) -> None:
    with pytest.raises(PlanError, match="link_gbps="):
        Engine.plan_for(zoo("mixtral"), link_gbps=gbps)


def test_a_simulation_is_always_shown(zoo: Zoo) -> None:
    plan = Engine.plan_for(zoo("mixtral"), link_gbps=2.5)
    assert plan.simulation is not None
    assert "2.5 GB/s" in plan.simulation
    assert any("simulated" in " ".join(row) for row in plan.lines())
    assert Engine.plan_for(zoo("mixtral")).simulation is None


def test_a_plan_is_json_and_rows_for_people(zoo: Zoo) -> None:
    folder: Path = zoo("mixtral")
    plan = Engine.plan_for(folder, expert_cache="50%", threads=3)
    as_json = json.loads(json.dumps(plan.to_dict()))
    assert as_json["slots"] == 16
    assert as_json["total_nbytes"] == plan.total_nbytes
    assert as_json["model"] == str(folder)
    rows = {what: (amount, why) for what, amount, why in plan.lines()}
    assert rows["expert cache"][0] == format_bytes(plan.cache_nbytes)
    assert "16 slots" in rows["expert cache"][1]
    assert "50%" in rows["expert cache"][1]
    assert rows["total"][0] == format_bytes(plan.total_nbytes)
    assert "3 threads" in rows["device"][1]


def test_files_are_read_past_the_page_cache_only_when_it_could_not_hold_them(blueprint: Blueprint, ram: Ram) -> None:
    assert not plan_with(blueprint, 5).direct_reads
    ram.leave_room_for(6, blueprint)
    tight = changed(expert_cache=5, reserve=0)
    assert make_plan(blueprint, tight).direct_reads == (6 * 72 * 1024 + CONFIG.reserve < 32 * 72 * 1024)


# --- several sequences ------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["", "many", "0", 0, -1, "-4", "3.0", "1e2", "²"])
def test_an_invalid_batch_is_refused_with_the_valid_forms(asked: Any, blueprint: Blueprint, ram: Ram) -> None:
    with pytest.raises(PlanError, match=r"give a number of sequences from 1, or auto, as batch=") as refusal:
        make_plan(blueprint, changed(batch=asked))
    assert repr(asked) in str(refusal.value)


@pytest.mark.parametrize(
    ("asked", "most"), [("auto", 256), (" AUTO", 256), (1, 1), ("1", 1), (" 7 ", 7), (64, 64), (1000, 1000)]
)
def test_forms_of_the_batch(asked: str | int, most: int, blueprint: Blueprint, ram: Ram) -> None:
    assert make_plan(blueprint, changed(batch=asked)).batch == most


@pytest.mark.parametrize("expert_cache", ["auto", "100%", 5])
def test_memory_for_sequences_grows_with_the_given_batch(
    expert_cache: str | int, blueprint: Blueprint, ram: Ram
) -> None:
    """With plenty of memory, it is that of `batch` sequences of the whole context."""
    one = make_plan(blueprint, changed(expert_cache=expert_cache)).kv_nbytes
    for batch in (1, 2, 9, 100):
        plan = make_plan(blueprint, changed(batch=batch, expert_cache=expert_cache))
        assert plan.kv_nbytes == batch * one == batch * plan.kv.nbytes(256)


@pytest.mark.parametrize("expert_cache", ["auto", 5, "100%"])
@pytest.mark.parametrize("room", [1, 5, 31, 33, 60])
@pytest.mark.parametrize("batch", ["auto", 3])
def test_a_larger_batch_never_makes_a_plan_fail(
    batch: str | int, room: int, expert_cache: str | int, blueprint: Blueprint, ram: Ram
) -> None:
    """What fits with one sequence fits with many: given slots all stay, and of automatic ones at least one."""
    ram.leave_room_for(room, blueprint)
    single = changed(expert_cache=expert_cache)
    try:
        alone = make_plan(blueprint, single)
    except PlanError:
        with pytest.raises(PlanError, match="does not fit"):
            make_plan(blueprint, changed(batch=batch, expert_cache=expert_cache))
        return
    plan = make_plan(blueprint, changed(batch=batch, expert_cache=expert_cache))
    assert plan.total_nbytes + plan.reserve_nbytes <= plan.device_free
    assert plan.kv_nbytes >= alone.kv_nbytes
    assert plan.slots >= 1
    assert plan.cache_nbytes == plan.slots * plan.slot_nbytes
    if expert_cache != "auto":
        assert plan.slots == alone.slots
    elif plan.slots < plan.experts:
        given_up = (alone.slots - plan.slots) * plan.slot_nbytes
        more = plan.kv_nbytes - alone.kv_nbytes
        assert more <= CONFIG.kv_share * plan.device_free
        assert given_up - plan.slot_nbytes < more, "no more slots than the sequences take"


def test_a_batch_is_shown_with_the_sequences_that_fit(blueprint: Blueprint, ram: Ram) -> None:
    def kv_row(plan: Plan) -> tuple[str, str]:
        return next((amount, why) for what, amount, why in plan.lines() if what == "KV cache")

    assert kv_row(make_plan(blueprint, CONFIG)) == ("256.0 KiB", "RAM, one sequence of 256 tokens")
    amount, why = kv_row(make_plan(blueprint, changed(batch=8)))
    assert (amount, why) == ("2.0 MiB", "RAM, up to 8 sequences, 8 of them with 256 tokens")
    ram.leave_room_for(20, blueprint)
    plan = make_plan(blueprint, changed(batch="auto"))
    whole = plan.kv_nbytes // plan.kv.nbytes(256)
    assert kv_row(plan)[1] == f"RAM, up to 256 sequences, {whole} of them with 256 tokens"


def test_the_batch_is_what_the_engine_decodes_together(zoo: Zoo) -> None:
    with Engine.load(zoo("mixtral"), expert_cache=5, threads=1, batch=3) as engine:
        assert (engine.plan.batch, engine.stats.batch, engine.stats.batch_reason) == (3, 3, "as asked for")
    with Engine.load(zoo("mixtral"), expert_cache=5, threads=1) as engine:
        assert (engine.plan.batch, engine.stats.batch, engine.stats.batch_reason) == (256, 4, "not measured yet")


def test_states_of_drafted_tokens_are_in_the_plan(zoo: Zoo, ram: Ram, blueprint: Blueprint) -> None:
    hybrid = read_blueprint(open_checkpoint(zoo("qwen3_next")))
    plan = make_plan(hybrid, changed(draft_nodes=10))
    assert plan.kept_states == 4 * (10 + 2)
    assert plan.kept_states_nbytes == plan.kept_states * plan.kv.state_nbytes > 0
    off = make_plan(hybrid, changed(speculate="off"))
    assert (off.kept_states_nbytes, off.total_nbytes) == (0, plan.total_nbytes - plan.kept_states_nbytes)
    assert next(why for what, _, why in plan.lines() if what == "kept states").startswith("RAM, 48 of 18.0 KiB")
    ram.set(24 * MIB)
    assert make_plan(hybrid, changed(draft_nodes=64)).kept_states == int(24 * MIB * 0.03) // plan.kv.state_nbytes
    rows = make_plan(blueprint, CONFIG)
    assert (rows.kept_states, rows.kept_states_nbytes) == (None, 0)
