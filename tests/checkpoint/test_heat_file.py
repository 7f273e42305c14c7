"""Heat between runs: written on close, read on start, and used for the order of filling."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgemoe import Engine, Sampling
from edgemoe.cache import EvictionPolicy, ExpertId
from edgemoe.checkpoint.checkpoint import open_checkpoint
from edgemoe.checkpoint.heat_file import MAX_NBYTES, NAME, read, write
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.prefetch.fill import fill_order
from tests.support.checkpoints import Zoo

EXPERTS = (3, 5)
HEAT = {ExpertId(0, 2): 1.5, ExpertId(1, 4): 0.25, ExpertId(1, 0): 0.0, ExpertId(0, 0): -2.0}


@pytest.fixture
def state(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / "state")


def put(state: StateFolder, content: object) -> None:
    state.write(NAME, content if isinstance(content, bytes) else json.dumps(content).encode())


def kept(**changes: Any) -> dict[str, Any]:
    """The content of a valid file, with changes."""
    heat = [[0, 2, 1.5], [1, 4, 0.25]]
    return {"format": "edgemoe heat", "version": 1, "experts": [3, 5], "heat": heat} | changes


# --- the file ------------------------------------------------------------------------------------


def test_heat_comes_back_as_it_was(state: StateFolder) -> None:
    assert read(state, EXPERTS) == {}
    write(state, EXPERTS, HEAT)
    assert read(state, EXPERTS) == HEAT
    write(state, EXPERTS, {ExpertId(0, 1): 3.0})
    assert read(state, EXPERTS) == {ExpertId(0, 1): 3.0}, "the latest alone"


def test_every_value_comes_back_to_six_digits(state: StateFolder) -> None:
    draw = random.Random(0)
    heat = {ExpertId(0, number): draw.uniform(0, 1) * 10 ** draw.randint(-30, 30) for number in range(400)}
    write(state, [400], heat)
    back = read(state, [400])
    assert back.keys() == heat.keys()
    assert all(math.isclose(back[expert], heat[expert], rel_tol=1e-5) for expert in heat)


def test_whole_numbers_are_heat_too(state: StateFolder) -> None:
    write(state, EXPERTS, {ExpertId(0, 0): 7})
    assert read(state, EXPERTS) == {ExpertId(0, 0): 7.0}


def test_it_is_small(state: StateFolder) -> None:
    """Even for the largest known models, with 60 layers of 384 experts."""
    write(state, [384] * 60, {ExpertId(layer, number): 1 / 3 for layer in range(60) for number in range(384)})
    assert state.path is not None
    assert (state.path / NAME).stat().st_size < 1 << 20


def test_unknown_heat_is_not_written(state: StateFolder) -> None:
    write(state, EXPERTS, {})
    write(state, EXPERTS, {ExpertId(0, 0): math.nan, ExpertId(0, 1): math.inf})
    assert state.path is not None
    assert not state.path.exists()
    write(state, EXPERTS, HEAT)
    write(state, EXPERTS, {})
    assert read(state, EXPERTS) == HEAT, "an engine that learnt nothing takes nothing away"


def test_a_valid_file_by_hand(state: StateFolder) -> None:
    put(state, kept())
    assert read(state, EXPERTS) == {ExpertId(0, 2): 1.5, ExpertId(1, 4): 0.25}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"null", b"[]", b"12", b"[" * 100_000, b"\x00" * 100,
        kept(format="other"), kept(version=2), kept(version="1"), kept(experts=[3]), kept(experts=[5, 3]),
        kept(experts=None), kept(heat=None), kept(heat={}), kept(heat=[[0, 2]]), kept(heat=[[0, 2, "hot"]]),
        kept(heat=[[0, 3, 1.0]]), kept(heat=[[2, 0, 1.0]]), kept(heat=[[-1, 0, 1.0]]), kept(heat=[[0, -1, 1.0]]),
        kept(heat=[[0, 1.0, 1.0]]), kept(heat=[[0, 2, math.nan]]), kept(heat=[[0, 2, math.inf]]),
        kept(heat=[[0, 2, None]]), kept(heat=[[0, 2, 1.0, 1.0]]), kept(heat=[[0, 2, 1.0], 5]),
        json.dumps(kept()).encode()[:-5], json.dumps(kept()).encode() + b"}",
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(content: object, state: StateFolder) -> None:
    put(state, content)
    assert read(state, EXPERTS) == {}
    write(state, EXPERTS, HEAT)
    assert read(state, EXPERTS) == HEAT


def test_a_file_that_is_much_too_large_is_not_even_read(state: StateFolder) -> None:
    put(state, json.dumps(kept()).encode() + b" " * MAX_NBYTES)
    assert read(state, EXPERTS) == {}


def test_where_nothing_can_be_kept_writing_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (None, tmp_path / "file" / "state", Path("a\0b")):
        write(StateFolder(path), EXPERTS, HEAT)
        assert read(StateFolder(path), EXPERTS) == {}


# --- the order of filling ------------------------------------------------------------------------


def heat(**layers: Mapping[int, float]) -> dict[ExpertId, float]:
    return {
        ExpertId(int(layer[1:]), number): value for layer, known in layers.items() for number, value in known.items()
    }


def test_the_hottest_of_each_layer_come_first() -> None:
    known = heat(l0={0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}, l1={0: 8, 1: 6, 2: 9, 3: 7})
    assert fill_order([4, 4], 4, known) == [(0, 1), (0, 3), (1, 2), (1, 0)]
    assert fill_order([4, 4], 5, known) == [(0, 1), (0, 3), (0, 2), (1, 2), (1, 0)]
    assert fill_order([4, 4], 99, known) == [(0, 1), (0, 3), (0, 2), (0, 0), (1, 2), (1, 0), (1, 3), (1, 1)]


def test_heat_changes_no_layers_share() -> None:
    draw = random.Random(1)
    for slots in range(14):
        known = {
            ExpertId(layer, number): draw.random() * 10**layer
            for layer, count in enumerate((4, 1, 7))
            for number in range(count)
            if draw.random() < 0.6
        }
        plain, warm = (fill_order([4, 1, 7], slots, each) for each in (None, known))
        assert [layer for layer, _ in warm] == [layer for layer, _ in plain]
        assert len(set(warm)) == len(warm) == min(slots, 12)


def test_heat_of_some_layers_leaves_the_others_as_they_were() -> None:
    assert fill_order([3, 3, 3], 6, heat(l1={2: 0.1, 1: 0.2})) == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 0), (2, 1)]


def test_experts_with_heat_come_before_those_without_and_equals_by_number() -> None:
    assert fill_order([5], 5, heat(l0={4: 0.0, 2: -1.0, 1: 0.0})) == [(0, 1), (0, 4), (0, 2), (0, 0), (0, 3)]
    assert fill_order([3], 2, {}) == fill_order([3], 2, None) == fill_order([3], 2) == [(0, 0), (0, 1)]


# --- the engine ----------------------------------------------------------------------------------


def load(folder: Path, state_folder: Path, slots: int = 4) -> Engine:
    return Engine.load(folder, expert_cache=slots, threads=1, state_folder=state_folder)


def residents(engine: Engine) -> set[ExpertId]:
    """The resident experts once all slots are filled."""
    cache, end = engine._loaded().cache, time.monotonic() + 20
    while True:
        there = {ExpertId(layer, n) for layer in range(engine.plan.layers) for n in cache.residents(layer)}
        if len(there) == engine.plan.slots:
            return there
        assert time.monotonic() < end, "the slots are not filled"
        time.sleep(0.001)


def test_an_engine_starts_with_what_was_hot_and_tells_its_policy(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = zoo("mixtral")
    state = StateFolder.of(open_checkpoint(folder), tmp_path)
    with load(folder, tmp_path) as cold:
        layers, count = cold.plan.layers, cold.plan.experts // cold.plan.layers
        assert residents(cold) == {ExpertId(*expert) for expert in fill_order([count] * layers, 4)}
    hot = {ExpertId(layer, count - 1 - place): 2.0 - place for layer in range(layers) for place in range(2)}
    write(state, [count] * layers, hot)
    told: list[Mapping[ExpertId, float]] = []
    for kind in (EvictionPolicy, *EvictionPolicy.__subclasses__()):
        monkeypatch.setattr(kind, "warm", lambda self, heat: told.append(heat))
    with load(folder, tmp_path, 2 * layers) as warm:
        assert residents(warm) == set(hot)
    assert told == [hot]


def test_a_close_writes_what_the_policy_tells(zoo: Zoo, tmp_path: Path) -> None:
    folder = zoo("mixtral")
    state = StateFolder.of(open_checkpoint(folder), tmp_path)
    engine = load(folder, tmp_path)
    experts = engine._loaded().cache.store.experts
    telling = {ExpertId(1, 2): 0.5}
    engine._loaded().cache._policy.heat = lambda: telling  # type: ignore[method-assign]
    engine.generate([5, 6, 7], Sampling(max_tokens=2))
    assert read(state, experts) == {}, "not before it is closed"
    engine.close()
    assert read(state, experts) == telling
    telling[ExpertId(1, 1)] = 0.25
    engine.close()
    assert read(state, experts) == {ExpertId(1, 2): 0.5}, "and once"


def test_a_load_that_fails_writes_nothing(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (EvictionPolicy, *EvictionPolicy.__subclasses__()):
        monkeypatch.setattr(kind, "heat", lambda self: {ExpertId(0, 0): 1.0})

    def refuse(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine.load(zoo("mixtral"), expert_cache=4, threads=1, state_folder=tmp_path, on_progress=refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_changes_nothing_about_a_load(zoo: Zoo, tmp_path: Path) -> None:
    folder = zoo("mixtral")
    put(StateFolder.of(open_checkpoint(folder), tmp_path), b'{"format": "edgemoe heat"')
    with load(folder, tmp_path) as engine:
        assert len(engine.generate([5, 6, 7], Sampling(max_tokens=2, ignore_eos=True)).token_ids) == 2
