from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgemoe import CheckpointError, Engine, PlanError
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.config import EngineConfig
from edgemoe.demo import demo_folder
from edgemoe.draft.step_cost import PRIOR_SHARING, PRIOR_TOKEN_COST
from edgemoe.measure import profiler
from edgemoe.measure.text_passes import PROMPT, PassReading, task_texts
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.sequential_runner import MIN_THREADED_WORK
from edgemoe.plan.fitting import MIN_POINTS
from edgemoe.plan.prediction import predict
from edgemoe.plan.profile import ProfileConditions, read_profile, write_profile
from edgemoe.plan.profile_plot import draw
from edgemoe.results import Progress
from tests.support.checkpoints import Zoo
from tests.support.profiles import CONDITIONS, known_profile


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a profile consist of a few small passes, which take a second."""
    monkeypatch.setattr(profiler, "SEQUENCES", 4)
    monkeypatch.setattr(profiler, "SHAPES", ((1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (4, 1), (4, 3)))
    monkeypatch.setattr(profiler, "LEAN_SHAPES", ((1, 1), (1, 3), (4, 3)))
    monkeypatch.setattr(profiler, "ROUNDS", 1)
    monkeypatch.setattr(profiler, "READINGS", (2, 2))


def test_a_profile_is_measured_fitted_kept_and_drawn(quick: None, tmp_path: Path) -> None:
    made = profiler.take_profile(open_blueprint(None), EngineConfig(device="cpu", link_gbps=4.0))
    shapes = [(point.batch, point.tokens, point.cache_share == 1) for point in made.points]
    assert sorted(shapes) == sorted(
        [(*shape, True) for shape in profiler.SHAPES] + [(*shape, False) for shape in profiler.LEAN_SHAPES]
    )
    for point in made.points:
        assert point.seconds > 0
        assert 4 <= point.experts <= min(32, 4 * point.total)
        assert (point.misses > 0) == (point.cache_share < 1)
        assert (point.draft_seconds > 0) == (point.tokens > 1)
    assert made.model.shape.experts == 32
    assert made.model.speed.link == 4e9
    assert made.conditions.link_gbps == 4
    # One pass over two tokens takes from a tenth to ten times as long as two passes.
    assert 0.1 < made.model.target_efficiency(1, 2) < 10
    write_profile(StateFolder(tmp_path), made)
    assert read_profile(StateFolder(tmp_path), made.conditions) == made
    draw(made, tmp_path / "profile.svg")
    assert (tmp_path / "profile.svg").read_text("utf-8").count("<path") > 10


def test_a_family_that_cannot_take_drafts_back_is_refused(
    quick: None, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No tested family is such a one.
    monkeypatch.setattr(ModelRunner, "_probe_verification", lambda runner: ("", "its state is lost"))
    with pytest.raises(PlanError, match="cannot take drafts back"):
        profiler.take_profile(open_blueprint(zoo("jamba")), EngineConfig(device="cpu"))


def test_a_model_without_room_for_texts_is_refused(quick: None, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="has a context of 64 tokens: a profile needs texts of at least 96"):
        profiler.take_profile(open_blueprint(zoo("mixtral", max_position_embeddings=64)), EngineConfig(device="cpu"))
    monkeypatch.setattr(profiler, "SEQUENCES", 2)
    with pytest.raises(
        PlanError, match="room for 2 sequences of 288 tokens, of which a profile needs 4: give a smaller"
    ):
        profiler.take_profile(open_blueprint(None), EngineConfig(device="cpu"))


def test_where_time_runs_short_the_larger_half_is_left_out(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "TIME_BUDGET", 0.0)
    monkeypatch.setattr(profiler, "ROUNDS", 3)
    with profiler.profiling_run(open_blueprint(None), EngineConfig(device="cpu"), lambda progress: None) as at:
        points = profiler.measure(at, profiler.SHAPES)
    assert [(point.batch, point.tokens) for point in points] == [(1, 1), (1, 2), (2, 1)]


def test_however_short_time_is_there_are_points_enough_for_a_fit(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "TIME_BUDGET", 0.0)
    made = profiler.take_profile(open_blueprint(None), EngineConfig(device="cpu", link_gbps=4.0))
    lean = [(point.batch, point.tokens) for point in made.points if point.cache_share < 1]
    assert (len(made.points), lean) == (MIN_POINTS, [(1, 1)])


def test_too_few_kinds_of_passes_are_refused_before_measuring(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "measure", lambda *of: pytest.fail("it measures"))
    with pytest.raises(
        PlanError, match="with 1 slot has 7 kinds of passes to measure, of which a profile needs 8: give expert_cache="
    ):
        profiler.take_profile(open_blueprint(None), EngineConfig(device="cpu", expert_cache=1))


def test_passes_wait_for_the_slots_to_be_filled(quick: None) -> None:
    told: list[Progress] = []
    # 13.5 MiB over 10 MB/s.
    with profiler.profiling_run(open_blueprint(None), EngineConfig(device="cpu", link_gbps=0.01), told.append) as at:
        assert at.runtime.cache.prefetching == 0
        assert len(at.runtime.cache.residents(0)) == 32
    filling = [each for each in told if each.stage == "experts"]
    assert len(filling) > 3
    assert filling[-1].done == filling[-1].total
    assert [each.done for each in filling] == sorted(each.done for each in filling)


def test_the_wait_for_a_stalled_link_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        """A cache with two prefetches, of which one never arrives."""

        store = SimpleNamespace(mean_nbytes=10)
        left = iter([2, 2])

        @property
        def prefetching(self) -> int:
            return next(self.left, 1)

    monkeypatch.setattr(profiler, "FILL_TIMEOUT", 0.2)
    told: list[Progress] = []
    cache: Any = Stuck()
    profiler.await_fill(cache, told.append)
    assert told == [Progress("experts", 10, 20)]


@pytest.mark.parametrize("reads", ["direct", "cached"])
def test_a_profile_holds_for_one_source_of_missing_experts(quick: None, reads: str) -> None:
    """Even if all experts were resident in the first half."""
    made = profiler.take_profile(open_blueprint(None), EngineConfig(device="cpu", link_gbps=4.0, file_reads=reads))
    assert max(point.cache_share for point in made.points) == 1
    assert (made.conditions.direct_reads, made.conditions.host_tier) == (reads == "direct", "file")
    plan = Engine.plan_for(None, device="cpu", expert_cache="50%", threads=made.conditions.threads, link_gbps=4.0)
    same, other = (
        ProfileConditions.of(replace(plan, direct_reads=direct)) for direct in (reads == "direct", reads != "direct")
    )
    assert made.conditions.difference(same) is None
    assert (made.conditions.difference(other) or "").startswith("reads ")


def test_with_few_slots_experts_are_read_as_with_all_of_the_plan() -> None:
    """If any are missing there: with fewer slots, more free RAM for the page cache could change the choice."""
    config, plan = EngineConfig(), Engine.plan_for(None, device="cpu")
    for direct, reads in ((True, "direct"), (False, "cached")):
        found = profiler.lean_config(config, replace(plan, slots=plan.experts - 1, direct_reads=direct), 5)
        assert (found.file_reads, found.expert_cache) == (reads, 5)
    assert profiler.lean_config(config, plan, 5) == replace(config, expert_cache=5)


def test_a_file_that_is_gone_is_a_checkpoint_error(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*of: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(profiler, "measure", fail)
    with pytest.raises(CheckpointError, match=r"edgemoe-demo cannot be read any more \(gone\): fetch it again"):
        profiler.take_profile(open_blueprint(None), EngineConfig(device="cpu"))


def test_no_model_is_left_behind_by_a_failure(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*of: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(profiler, "measure", fail)
    with pytest.raises(KeyboardInterrupt):
        profiler.take_profile(open_blueprint(None), EngineConfig(device="cpu"))


def test_a_pass_continues_its_text_and_rolls_wrong_tokens_back(quick: None) -> None:
    with profiler.profiling_run(open_blueprint(None), EngineConfig(device="cpu"), lambda progress: None) as at:
        readers = at.passes._readers
        at.passes.run(0, 2, 1)
        assert [each.cache.tokens if each.cache else 0 for each in readers] == [PROMPT + 1, PROMPT + 1, 0, 0]
        at.passes.run(1, 2, 4)
        assert [each.cache.tokens if each.cache else 0 for each in readers] == [PROMPT + 1, PROMPT + 5, PROMPT + 4, 0]
        at.passes.run(0, 2, 4, right=[0, 2])
        assert [each.cache.tokens if each.cache else 0 for each in readers[:2]] == [PROMPT + 2, PROMPT + 8]
        # The KV cache holds the text, as if it had been run token by token.
        cache, text = readers[1].cache, readers[1].text
        assert cache is not None
        other = at.runner.start(len(text))
        expected = at.runner.step(other, text[: cache.tokens + 1])
        assert at.runner.sequential.agree(expected, at.runner.step(cache, [text[cache.tokens]]))


def test_bulk_passes_begin_where_the_runner_leaves_its_kernels(quick: None) -> None:
    with profiler.profiling_run(open_blueprint(None), EngineConfig(device="cpu"), lambda progress: None) as at:
        plain = at.runner.sequential
        if plain.bulk_from == 0:
            pytest.skip("this CPU has no kernels")

        def by_kernels(tokens: int) -> bool:
            small = tokens * plain._nbytes_per_token < MIN_THREADED_WORK
            return small or tokens <= plain._few_tokens or plain._spread_thin(tokens)

        assert [by_kernels(plain.bulk_from + more) for more in (-1, 0)] == [True, False]


def test_a_text_that_ends_begins_again(quick: None) -> None:
    with profiler.profiling_run(open_blueprint(None), EngineConfig(device="cpu"), lambda progress: None) as at:
        tokens = [at.passes.run(0, 1, 100) and at.passes._readers[0].cache.tokens for _ in range(4)]  # type: ignore[union-attr]
    assert tokens == [PROMPT + 100, PROMPT + 200, PROMPT + 100, PROMPT + 200]


def test_texts_are_different_conversations_of_the_same_length() -> None:
    from edgemoe.checkpoint.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(open_blueprint(None).checkpoint)
    texts = task_texts(tokenizer, 9, 100, 1024)
    assert {len(text) for text in texts} == {100}
    assert len({tuple(text) for text in texts}) == 9
    assert task_texts(tokenizer, 9, 100, 1024) == texts != task_texts(tokenizer, 9, 100, 1024, seed=50)
    ids = task_texts(None, 2, 100, 7)
    assert {token for text in ids for token in text} == set(range(7))


def test_a_point_is_the_middle_half_of_its_readings() -> None:
    plan = Engine.plan_for(None, device="cpu", speculate="off")
    readings = [PassReading(seconds, 12, seconds, 0.1, 0.2) for seconds in (1, 2, 3, 100)]
    found = profiler.point(plan, 2, 3, readings)
    assert (found.batch, found.tokens, found.seconds, found.misses) == (2, 3, 2.5, 2.5)
    assert (found.experts, found.cache_share) == (2, 1)


def test_the_plan_tells_what_a_profile_of_this_machine_predicts(tmp_path: Path) -> None:
    blueprint = open_blueprint(None)
    plan = Engine.plan_for(None, device="cpu", state_folder=tmp_path)
    assert plan.predicted is None
    state = StateFolder.of(blueprint.checkpoint, tmp_path)
    write_profile(state, known_profile(ProfileConditions.of(plan)))
    found = Engine.plan_for(None, device="cpu", state_folder=tmp_path)
    assert found.predicted == predict(state, plan)
    assert found.predicted is not None
    model = known_profile().model
    assert found.predicted.plain == pytest.approx(1 / model.step_seconds(1))
    assert found.predicted.drafted >= max(
        model.tokens_per_second(1, 1.0, depth, sum(0.7**each for each in range(depth + 1))) for depth in (1, 4, 8)
    )
    said = next(why for what, _, why in found.lines() if what == "predicted")
    assert said.startswith("one sequence; ")
    assert said.endswith("; from the profile of 2026-01-31")
    assert found.to_dict()["predicted"]["taken"] == "2026-01-31"


def test_the_plan_says_why_a_foreign_profile_predicts_nothing(tmp_path: Path) -> None:
    write_profile(StateFolder.of(open_blueprint(demo_folder()).checkpoint, tmp_path), known_profile(CONDITIONS))
    plan = Engine.plan_for(demo_folder(), device="cpu", state_folder=tmp_path)
    row = next(row for row in plan.lines() if row[0] == "predicted")
    assert row[1] == "nothing"
    assert "processor Abacus 9, not " in row[2]
    assert row[2].endswith("take one with edgemoe profile and the same options")


@pytest.mark.parametrize("foreign", [False, True])
def test_drafts_are_priced_by_a_profile_of_this_machine_alone(tmp_path: Path, foreign: bool) -> None:
    """Until the cost is measured, so that a wrong guess does not waste the first seconds of a run."""
    settings: dict[str, Any] = {"device": "cpu", "state_folder": tmp_path, "expert_cache": "50%"}
    conditions = CONDITIONS if foreign else ProfileConditions.of(Engine.plan_for(None, **settings))
    write_profile(StateFolder.of(open_blueprint(None).checkpoint, tmp_path), known_profile(conditions))
    with Engine.load(None, **settings) as engine:
        plain = engine._loop.speculation._costs.of(3)
        plain.observe(1.0)
        plain.observe(1.0)
        model = known_profile().model
        unprofiled = PRIOR_TOKEN_COST / 3 ** (1 + PRIOR_SHARING)
        expected = unprofiled if foreign else model.token_cost(3, model.hit_rate(0.5, 3))
        assert plain.token == pytest.approx(expected)


def test_what_is_measured_is_told_all_the_way(quick: None) -> None:
    told: list[profiler.ProfileProgress] = []
    profiler.take_profile(open_blueprint(None), EngineConfig(device="cpu", link_gbps=4.0), told.append)
    shares = [each.done for each in told]
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[-1] < 1
    activities = [each.activity for each in told]
    assert "4 x 3 tokens, 100% of the experts" in activities
    assert "1 x 3 tokens, 35% of the experts" in activities
    assert activities[-1] == "fitting"


def test_what_is_raised_while_it_is_told_ends_the_measurement(quick: None) -> None:
    def stop(progress: profiler.ProfileProgress) -> None:
        if "tokens" in progress.activity:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profiler.take_profile(open_blueprint(None), EngineConfig(device="cpu"), stop)


def reading(seconds: float) -> PassReading:
    return PassReading(seconds, 24, 0, 0.0, 0.0)


def test_one_disturbed_pass_decides_nothing() -> None:
    plan = Engine.plan_for(None, device="cpu")
    for seconds in ([1.0, 1.1, 50.0], [1.0, 50.0, 1.1, 1.2, 1.05], [1.1] * 7 + [50.0]):
        assert 1.0 <= profiler.point(plan, 1, 1, [reading(each) for each in seconds]).seconds <= 1.15
    assert profiler.spread([reading(each) for each in (1.0, 2.0, 3.0, 4.0, 5.0)]) == pytest.approx(2 / 3)
    assert profiler.spread([reading(1.0), reading(9.0)]) == 0


def test_shapes_whose_times_differ_have_more_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[int, int]] = []

    def turn(at: object, turn: int, batch: int, tokens: int) -> list[PassReading]:
        turns.append((batch, tokens))
        seconds = (1.0, 1.0, 1.0) if tokens == 1 else (1.0, 2.0, 9.0)
        return [reading(each) for each in seconds]

    monkeypatch.setattr(profiler, "_turn", turn)
    at: Any = SimpleNamespace(plan=Engine.plan_for(None, device="cpu"), sequences=4)
    steady, varying = profiler.measure(at, [(1, 1), (1, 2)])
    assert (turns.count((1, 1)), turns.count((1, 2))) == (profiler.ROUNDS, profiler.MAX_ROUNDS)
    assert steady.spread == 0
    assert varying.spread > profiler.MAX_SPREAD
