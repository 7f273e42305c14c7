"""A second checkpoint drafts: whatever its weights and the width of its vocabulary, replies are those without it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.support.byte_tokenizer import with_tokenizer
from edgemoe import Completion, Engine, Sampling
from edgemoe.draft.pass_drafter import ModelDrafter
from edgemoe.errors import CheckpointError
from tests.support.checkpoints import Zoo, random_ids
from tests.support.crowd import assert_same_reply, mixed_requests

FAMILY, TOKENS = "mixtral", 24
REQUESTS: list[tuple[list[int], Sampling]] = [
    (random_ids(7) * 3, Sampling(max_tokens=TOKENS, ignore_eos=True)),
    (random_ids(19), Sampling(max_tokens=TOKENS, ignore_eos=True, temperature=1.0, seed=3)),
    (random_ids(9, seed=4), Sampling(max_tokens=TOKENS, ignore_eos=True, temperature=0.8, top_k=30, top_p=0.9, seed=5)),
]
Drafts = dict[str, Any]


@pytest.fixture(scope="module")
def spoken(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny checkpoint with a tokenizer, which is what must be the same in both."""
    root, made = tmp_path_factory.mktemp("spoken"), {}

    def folder(**how: Any) -> Path:
        name = "-".join(f"{key}{value}" for key, value in how.items()) or "plain"
        if name not in made:
            made[name] = Path(shutil.copytree(zoo(FAMILY, **how), root / name))
            with_tokenizer(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def expected(spoken: Callable[..., Path]) -> list[Completion]:
    with load(spoken(), speculate="off") as engine:
        return [engine.generate(*request) for request in REQUESTS]


def load(folder: Path, **options: Any) -> Engine:
    return Engine.load(folder, threads=1, state_folder="none", **{"expert_cache": "60%"} | options)


def drafter_of(engine: Engine) -> ModelDrafter:
    passes = engine._loop.speculation._passes
    assert isinstance(passes, ModelDrafter)
    return passes


@pytest.mark.parametrize("drafts", [{"speculate": "model"}, {"speculate": "model", "draft_shape": "chain"}])
@pytest.mark.parametrize(
    "how", [{}, {"seed": 1}, {"vocab_size": 300}, {"vocab_size": 128}], ids=["itself", "other", "wider", "narrower"]
)
def test_replies_are_those_without_it(
    how: dict[str, int], drafts: Drafts, spoken: Callable[..., Path], expected: list[Completion]
) -> None:
    with load(spoken(), draft_model=spoken(**how), **drafts) as engine:
        for request, reply in zip(REQUESTS, expected, strict=True):
            assert_same_reply(engine.generate(*request), reply)
        stats, passes = engine.stats, drafter_of(engine)
        assert stats.cycles > 0
        assert passes._caches == {}, "what is over holds no room"
        if not how:
            assert stats.accepted > 0.9 * stats.cycles, "it drafts what it will say itself, noise included"


def test_both_drafters_in_one_chain_have_their_share(spoken: Callable[..., Path], expected: list[Completion]) -> None:
    """N-grams that are rather wrong do not fill the chain before the model, which is right here, has its turn."""
    own = {"draft_model": spoken(), "draft_shape": "chain"}
    accepted = []
    for speculate in ("model", "ngram+model"):
        with load(spoken(), speculate=speculate, **own) as engine:
            for request, reply in zip(REQUESTS, expected, strict=True):
                assert_same_reply(engine.generate(*request), reply)
            accepted.append(engine.stats.tokens_per_cycle)
    assert accepted[1] > 0.8 * accepted[0]


@pytest.mark.parametrize("speculate", ["model", "ngram+model", "auto"])
def test_several_requests_at_once(speculate: str, spoken: Callable[..., Path]) -> None:
    requests = [(prompt, Sampling(**settings)) for prompt, settings in mixed_requests(6, 40, seed=2)]
    with load(spoken(), speculate="off") as engine:
        alone = [engine.generate(*request) for request in requests]
    with load(spoken(), speculate=speculate, draft_model=spoken(seed=1), batch=4) as engine:
        replies = dict(engine.generate_batch(requests))
        assert drafter_of(engine)._caches == {}
    for number, reply in enumerate(alone):
        found = replies[number]
        assert isinstance(found, Completion)
        assert_same_reply(found, reply)


def test_without_room_for_its_past_nothing_is_drafted(spoken: Callable[..., Path], expected: list[Completion]) -> None:
    with load(spoken(), speculate="model", draft_model=spoken()) as engine:
        drafter_of(engine)._room_nbytes = 0
        assert_same_reply(engine.generate(*REQUESTS[0]), expected[0])
        assert engine.stats.drafted == 0


def test_a_pass_that_fails_spoils_no_later_one(
    spoken: Callable[..., Path], expected: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(spoken(), speculate="model", draft_model=spoken()) as engine:
        passes = drafter_of(engine)
        with monkeypatch.context() as patch:

            def fail(requests: Any) -> None:
                raise MemoryError("no luck")

            patch.setattr(passes, "_catch_up", fail)
            with pytest.raises(Exception, match="no luck"):
                engine.generate(*REQUESTS[0])
        assert_same_reply(engine.generate(*REQUESTS[0]), expected[0])
        assert engine.stats.accepted > 0


def test_another_tokenizer_is_refused(zoo: Zoo, spoken: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"has another vocabulary .* draft_model="):
        load(spoken(), speculate="model", draft_model=zoo(FAMILY, vocab_size=300))
