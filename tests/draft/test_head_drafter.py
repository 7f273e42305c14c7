"""The drafter of a checkpoint's own head: which hidden states it reads, how deep it drafts, what it counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.support.engine_parts import runner_of, speculation_of
from bench.support.zoo_heads import imitating, make_with_head
from edgemoe import Completion, Engine, PlanError, Sampling
from edgemoe.draft.head_drafter import KINDS, MIN_TRIAL_ROWS, USUAL_DEPTH, HeadDrafter
from edgemoe.draft.pass_drafter import TRIES
from edgemoe.model.head_runner import AFTER, BEFORE, HeadInput, HeadOutput, HeadRunner
from edgemoe.model.model_runner import ModelRunner
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import Zoo, random_ids
from tests.support.crowd import assert_same_reply

SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "threads": 1, "state_folder": "none"}
GREEDY = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
SAMPLED = Sampling(max_tokens=24, temperature=0.9, seed=4, ignore_eos=True)
Right = Callable[..., Path]


def load(folder: Path, **options: Any) -> Engine:
    return Engine.load(folder, **SETTINGS | {"speculate": "mtp"} | options)


def drafter_of(engine: Engine) -> HeadDrafter:
    passes = speculation_of(engine)._passes
    assert isinstance(passes, HeadDrafter)
    return passes


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Right:
    """A checkpoint whose layers add nothing, so that its head, which passes the embedding on, is always right."""
    root, folders = tmp_path_factory.mktemp("right"), dict[str, Path]()

    def folder(kind: str | None = None) -> Path:
        """With `kind`, only where it reads that kind of hidden states: of the other one it adds a lot of noise."""
        if str(kind) not in folders:
            with quiet_transformers():
                made = imitating(make_with_head("mixtral", root / str(kind)), effect=0.0)
            folders[str(kind)] = made if kind is None else telling(made, kind)
        return folders[str(kind)]

    return folder


def telling(folder: Path, kind: str) -> Path:
    """Changes the checkpoint so that the sum of a state's first two values is 0 in `kind`, and is noise to the head.

    The last norm multiplies the first two values by 1 and 3.
    """
    path = folder / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 1] = -embedding[:, 0] / (3 if kind == "after" else 1)
    for key in ("model.norm.weight", "model.layers.4.shared_head.norm.weight"):
        tensors[key][:2] = torch.tensor([1.0, 3.0])
    tensors["model.layers.4.hnorm.weight"] = torch.ones(64)
    noise = 20 * torch.randn(64, generator=torch.Generator().manual_seed(5))
    # Values of the head's own states have the same property where the noise leaves them alone.
    noise[1] = -noise[0] / (3 if kind == "after" else 1)
    tensors["model.layers.4.eh_proj.weight"][:, 64:66] = noise[:, None]
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


# --- what it drafts --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["tree", "chain"])
@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_head_that_is_right_saves_most_passes(how: Sampling, shape: str, right: Right) -> None:
    """Chained tokens too: each cycle gives the drafts of a whole chain and one more token."""
    prompt = random_ids(24)
    with load(right(), speculate="off") as plain:
        expected = plain.generate(prompt, how)
    with load(right(), draft_shape=shape) as engine:
        reply = engine.generate(prompt, how)
        stats = engine.stats
    assert_same_reply(reply, expected)
    assert stats.tokens_per_cycle > 0.8 * (USUAL_DEPTH + 1)
    assert stats.cycles < 24 / 3


def test_what_was_drafted_is_counted_for_who_drafted_it(right: Right) -> None:
    prompt = random_ids(9) * 4
    with load(right(), speculate="ngram+mtp", draft_shape="chain") as engine:
        engine.generate(prompt, SAMPLED)
        engine.generate(prompt, GREEDY)
        stats = engine.stats
    assert stats.drafted_by.keys() == {"ngram", "mtp"}
    assert sum(stats.drafted_by.values()) == stats.drafted
    assert sum(stats.accepted_by.values()) == stats.accepted
    for who in ("ngram", "mtp"):
        assert 0 < stats.accepted_by[who] <= stats.drafted_by[who]


@pytest.mark.parametrize("speculate", ["mtp", "ngram"])
def test_a_drafter_that_is_alone_has_drafted_all(speculate: str, right: Right) -> None:
    with load(right(), speculate=speculate) as engine:
        engine.generate(random_ids(5) * 6, GREEDY)
        stats = engine.stats
    assert stats.drafted_by == {speculate: stats.drafted}
    assert stats.accepted_by == {speculate: stats.accepted}
    assert stats.accepted > 0


def test_no_draft_is_deeper_than_it_may_be(right: Right, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(right(), draft_nodes=64, draft_depth=32) as engine:
        speculation, depths = speculation_of(engine), list[int]()
        propose = speculation.propose

        def proposing(*arguments: Any, **named: Any) -> Any:
            proposal = propose(*arguments, **named)
            depths.extend(max(tree.depths) for tree in proposal.trees.values())
            return proposal

        monkeypatch.setattr(speculation, "propose", proposing)
        engine.generate(random_ids(24), GREEDY)
    assert max(depths) == USUAL_DEPTH


def test_a_depth_that_is_asked_for_bounds_it(right: Right) -> None:
    with load(right(), draft_depth=1, draft_shape="chain") as engine:
        reply = engine.generate(random_ids(24), GREEDY)
        stats = engine.stats
    assert len(reply.token_ids) == 24
    assert stats.drafted == stats.cycles
    assert stats.tokens_per_cycle <= 2


# --- which hidden states it reads ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_that_predicts_the_prompt_better_is_read(kind: str, right: Right) -> None:
    """And the passes of the model then give that kind alone."""
    with load(right(kind)) as engine:
        drafter = drafter_of(engine)
        engine.generate(random_ids(MIN_TRIAL_ROWS + 8), GREEDY)
        assert drafter._kind == KINDS[kind]
        assert runner_of(engine).head is drafter._head
        assert drafter._head.states.kind == KINDS[kind]
        cache = runner_of(engine).start(8)
        runner_of(engine).step(cache, [5, 6])
        assert cache.head is not None
        assert [each.shape for each in cache.head._hidden] == [(2, 1, 64)]
        assert engine.stats.accepted > 0.5 * engine.stats.cycles


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_states_are_of_the_kind_that_gives_more(kind: str, right: Right) -> None:
    """Both are tried in turn; from then on nearly every cycle takes the better one."""
    with load(right(kind)) as engine:
        drafter = drafter_of(engine)
        engine.generate(random_ids(24), Sampling(max_tokens=90, temperature=0.9, seed=1, ignore_eos=True))
        choice = drafter._chained
        assert min(choice._cycles.values()) >= TRIES
        assert choice.best == kind
        assert choice._tokens[kind] > 2


def test_a_prompt_that_is_too_short_to_tell_leaves_it_open(right: Right) -> None:
    """Until a longer one comes: what is read until then is after the norm."""
    with load(right("before")) as engine:
        drafter = drafter_of(engine)
        short, long = random_ids(MIN_TRIAL_ROWS - 4), random_ids(MIN_TRIAL_ROWS + 4, seed=1)
        engine.generate(short, Sampling(max_tokens=4, temperature=0.0, ignore_eos=True))
        assert drafter._kind is None
        engine.generate(long, Sampling(max_tokens=4, temperature=0.0, ignore_eos=True))
        assert drafter._kind == BEFORE
        kept = engine.generate(short, GREEDY)
        with load(right("before"), speculate="off") as plain:
            assert_same_reply(kept, plain.generate(short, GREEDY))


# --- long prompts ----------------------------------------------------------------------------------


def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the rows of each pass of the head."""
    head, rows = drafter_of(engine)._head, list[int]()
    run = head.run

    def running(inputs: Sequence[HeadInput]) -> list[HeadOutput]:
        rows.append(sum(len(item.tokens) for item in inputs))
        return run(inputs)

    monkeypatch.setattr(head, "run", running)
    return rows


@pytest.mark.parametrize("chunk", [16, 99, 1000])
def test_a_long_prompt_is_read_in_parts(chunk: int, right: Right, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_ids(100)
    with load(right(), draft_shape="chain") as engine:
        drafter = drafter_of(engine)
        monkeypatch.setattr(drafter, "_chunk", chunk)
        rows = watched(engine, monkeypatch)
        reply = engine.generate(prompt, GREEDY)
        # Both kinds are tried on a part of the prompt first.
        trial = min(99, chunk)
        assert rows[:2] == [trial, trial]
        assert max(rows) <= chunk
        read = rows[2 : 2 + -(-100 // chunk)]
        assert sum(read) == 100
        assert engine.stats.tokens_per_cycle > 0.8 * (USUAL_DEPTH + 1)
    with load(right(), speculate="off") as plain:
        assert_same_reply(reply, plain.generate(prompt, GREEDY))


def test_drafts_do_not_depend_on_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that attends: what it drafts after a prompt in parts is what it drafts after the whole."""
    with quiet_transformers():
        folder = imitating(make_with_head("gpt_oss", tmp_path / "model"), effect=0.3)
    found = []
    for chunk in (17, 1000):
        with load(folder, draft_shape="chain") as engine:
            drafter = drafter_of(engine)
            monkeypatch.setattr(drafter, "_chunk", chunk)
            # Which kind is read is the same in both.
            drafter._kind = AFTER
            monkeypatch.setattr(drafter._chained, "next", lambda: "after")
            reply = engine.generate(random_ids(100), GREEDY)
            found.append((reply.token_ids, engine.stats.drafted, engine.stats.accepted))
    assert found[0] == found[1]
    assert found[0][2] > 0


# --- what goes wrong -------------------------------------------------------------------------------


def test_a_pass_of_the_head_that_fails_spoils_no_later_request(right: Right, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_ids(24)
    with load(right(), speculate="off") as plain:
        expected = plain.generate(prompt, SAMPLED)
    with load(right()) as engine:
        head = drafter_of(engine)._head
        run = head.run
        for failing in (1, 3, 4, 9):
            count = 0

            def fails(inputs: Sequence[HeadInput]) -> list[HeadOutput]:
                nonlocal count
                count += 1
                if count == failing:  # noqa: B023
                    raise RuntimeError("no luck")
                return run(inputs)

            accepted = engine.stats.accepted
            with monkeypatch.context() as patch:
                patch.setattr(head, "run", fails)
                with pytest.raises(Exception, match="no luck"):
                    engine.generate(prompt, SAMPLED)
            assert_same_reply(engine.generate(prompt, SAMPLED), expected)
            assert engine.stats.accepted > accepted + 10


def test_a_step_that_fails_after_drafting_spoils_no_later_request(
    right: Right, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_ids(24)
    with load(right(), speculate="off") as plain:
        expected = plain.generate(prompt, SAMPLED)
    with load(right()) as engine:
        runner = runner_of(engine)
        run, count = runner.run_sampled, 0

        def fails(inputs: Any) -> Any:
            nonlocal count
            count += 1
            if count == 4:
                raise RuntimeError("no luck")
            return run(inputs)

        with monkeypatch.context() as patch:
            patch.setattr(runner, "run_sampled", fails)
            with pytest.raises(Exception, match="no luck"):
                engine.generate(prompt, SAMPLED)
        assert_same_reply(engine.generate(prompt, SAMPLED), expected)


# --- settings --------------------------------------------------------------------------------------


def test_without_a_head_it_is_refused_with_what_to_do(zoo: Zoo) -> None:
    with pytest.raises(PlanError, match="the checkpoint has no draft head: give auto as speculate="):
        load(zoo("mixtral"))
    with load(zoo("mixtral"), speculate="auto") as engine:
        assert engine.stats.speculation == "ngram, while it pays, trees of at most 16 tokens"


@pytest.mark.parametrize("speculate", ["mtp+self", "mtp+model", "ngram+mtp+self"])
def test_with_another_drafter_that_runs_passes_it_is_refused(speculate: str, right: Right) -> None:
    with pytest.raises(PlanError, match="cannot draft together: give one of them as speculate="):
        load(right(), speculate=speculate)


def test_auto_drafts_with_it_where_there_is_one(right: Right) -> None:
    with load(right(), speculate="auto") as engine:
        assert engine.stats.speculation == "mtp and ngram, while it pays, trees of at most 16 tokens"
        assert isinstance(speculation_of(engine)._passes, HeadDrafter)


@pytest.mark.parametrize("speculate", ["off", "ngram", "auto+self", "self"])
def test_where_it_is_not_asked_for_it_is_not_loaded(speculate: str, right: Right) -> None:
    with load(right(), speculate=speculate) as engine:
        assert runner_of(engine).head is None
        assert not hasattr(runner_of(engine).sequential.model, "draft_head")


def test_a_family_that_takes_nothing_back_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a head, and drafts could not be verified. No tested family is such a one."""
    lost = "this family's cache has a state that cannot be rolled back"
    monkeypatch.setattr(ModelRunner, "_probe_verification", lambda runner: ("", lost))
    with quiet_transformers():
        folder = make_with_head("qwen3_next", tmp_path / "model")
    with load(folder) as engine:
        reply = engine.generate(random_ids(24), Sampling(max_tokens=4, ignore_eos=True))
        assert isinstance(reply, Completion)
        assert "state that cannot be rolled back" in engine.stats.speculation
        assert engine.stats.drafted == 0


def test_a_head_that_cannot_be_run_says_so(tmp_path: Path, right: Right) -> None:
    """Its rows depend on what shares their pass, as a stand-in has it: seen when the engine is loaded."""
    shutil.copytree(right(), tmp_path / "copy")
    with pytest.MonkeyPatch.context() as patch:
        forward = HeadRunner._forward

        def mixed(self: HeadRunner, inputs: Sequence[HeadInput], *arguments: Any, **named: Any) -> torch.Tensor:
            rows = sum(len(item.tokens) for item in inputs)
            return forward(self, inputs, *arguments, **named).roll(rows, -1)

        patch.setattr(HeadRunner, "_forward", mixed)
        with load(tmp_path / "copy") as engine:
            why = "the head gives other logits for several rows than for one"
            assert engine.stats.speculation == f"off: {why}"
            assert runner_of(engine).head_refusal == why
    with load(tmp_path / "copy", speculate="ngram+mtp") as engine:
        assert "not mtp" not in engine.stats.speculation
