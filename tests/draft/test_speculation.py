"""Whatever drafts, and however: replies are those of plain decoding, token for token, and the numbers add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgemoe import Completion, Engine, Sampling
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.draft.affinity_file import prepare
from edgemoe.model.model_runner import ModelRunner
from tests.support.checkpoints import Zoo, random_ids
from tests.support.crowd import assert_same_reply, mixed_requests

TOKENS = 14
PROMPT = random_ids(7) * 3
"""Of more tokens than the windows, and with beginnings of what was there before."""
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    (PROMPT, {"logprobs": 2}),
    (PROMPT, {**SAMPLED, "seed": 5, "logprobs": 0}),
]
Baseline = Callable[[str], list[Completion]]


def ask(engine: Engine, number: int) -> Completion:
    prompt, settings = REQUESTS[number]
    return engine.generate(prompt, Sampling(max_tokens=TOKENS, ignore_eos=True, **settings))


def slots(folder: Path, cache: str) -> str | int:
    """Room for what a token uses and two more, in all layers together; for that in every layer; or for everything."""
    if cache == "all":
        return "100%"
    plan = Engine.plan_for(folder)
    return (plan.top_k + 2) * (plan.layers if cache == "more" else 1)


@pytest.fixture(scope="module")
def plain(zoo: Zoo) -> Baseline:
    """The replies to REQUESTS of a family's tiny checkpoint without speculation."""
    made: dict[str, list[Completion]] = {}

    def replies(family: str) -> list[Completion]:
        if family not in made:
            with Engine.load(zoo(family), threads=1, speculate="off", expert_cache="50%") as engine:
                made[family] = [ask(engine, number) for number in range(len(REQUESTS))]
                assert engine.stats.speculation == "off: asked for"
                assert engine.stats.drafted == engine.stats.cycles == 0
        return made[family]

    return replies


@pytest.mark.parametrize(
    ("family", "speculate", "rule", "shape", "cache"),
    [
        ("mixtral", "ngram", "reselect", "tree", "all"),
        ("mixtral", "ngram+self", "fewer", "chain", "few"),
        ("mixtral", "self", "affinity", "tree", "few"),
        ("gpt_oss", "ngram+self", "reselect", "tree", "few"),
        ("gpt_oss", "self", "fewer", "tree", "all"),
        ("gemma4", "self", "reselect", "tree", "more"),
        ("exaone_moe", "ngram+self", "affinity", "chain", "few"),
        ("phimoe", "self", "reselect", "tree", "few"),
        ("deepseek_v3", "self", "reselect", "tree", "all"),
        ("deepseek_v3", "ngram+self", "reselect", "chain", "few"),
        ("axk1", "ngram+self", "fewer", "tree", "more"),
    ],
)
def test_replies_are_those_of_plain_decoding(
    family: str, speculate: str, rule: str, shape: str, cache: str, zoo: Zoo, plain: Baseline
) -> None:
    folder = zoo(family)
    if rule == "affinity":
        prepare(open_blueprint(folder))
    options: dict[str, Any] = {"draft_rule": rule, "draft_shape": shape, "expert_cache": slots(folder, cache)}
    options["draft_depth"] = 4
    with Engine.load(folder, threads=1, speculate=speculate, **options) as engine:
        for number, expected in enumerate(plain(family)):
            before = engine.stats
            reply, after = ask(engine, number), engine.stats
            assert_same_reply(reply, expected)
            timings = reply.timings
            assert timings.cycles == after.cycles - before.cycles
            assert timings.drafted == after.drafted - before.drafted
            assert timings.accepted == after.accepted - before.accepted
            assert timings.accepted <= timings.drafted
            assert timings.cycles <= timings.drafted
            assert timings.generated_tokens == TOKENS
        stats = engine.stats
        assert engine._runtime is not None
        engine._runtime.cache.check_integrity()
    assert stats.speculation == engine_says(speculate, shape)
    assert stats.drafted > stats.accepted
    assert stats.accepted > 0 or "self" not in speculate
    assert stats.tokens_per_cycle == pytest.approx(1 + stats.accepted / stats.cycles)
    assert stats.verify_seconds > 0
    assert stats.draft_seconds > 0


def engine_says(speculate: str, shape: str) -> str:
    return f"{' and '.join(sorted(speculate.split('+')))}, always, {shape}s of at most 16 tokens"


@pytest.mark.parametrize(("family", "speculate"), [("minimax", "self"), ("deepseek_v32", "auto")])
def test_families_that_cannot_be_rewound_decode_plainly_and_say_why(
    family: str, speculate: str, zoo: Zoo, plain: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRunner, "_verified", lambda self, shape, to_the_bit=False: False)
    with Engine.load(zoo(family), threads=1, speculate=speculate, expert_cache="50%") as engine:
        for number in (0, 1):
            assert_same_reply(ask(engine, number), plain(family)[number])
        stats = engine.stats
    assert stats.speculation == "off: this family's cache has a state that cannot be rolled back"
    assert (stats.drafted, stats.cycles, stats.accepted, stats.tokens_per_cycle) == (0, 0, 0, 0)


def test_the_model_itself_with_all_experts_is_nearly_always_right(zoo: Zoo) -> None:
    """Greedy and sampled: who drafts with the noise of the draws to come drafts what is drawn."""
    with Engine.load(zoo("mixtral"), threads=1, speculate="self", draft_shape="chain", expert_cache="100%") as engine:
        # It fills the cache.
        engine.generate(random_ids(60, seed=9), Sampling(max_tokens=1))
        for settings in ({}, {"temperature": 1.0, "seed": 1}, {**SAMPLED, "seed": 2}):
            before = engine.stats
            reply = engine.generate(PROMPT, Sampling(max_tokens=20, ignore_eos=True, **settings))
            after = engine.stats
            assert after.accepted - before.accepted == after.drafted - before.drafted > 10
            assert len(reply.token_ids) == after.steps - before.steps + reply.timings.accepted


def test_a_seed_draws_the_same_whatever_drafts(talker: Path) -> None:
    """Seeds that are different draw differently, so that this is no accident."""
    settings = [Sampling(max_tokens=16, ignore_eos=True, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    found: list[list[tuple[int, ...]]] = []
    for options in ({"speculate": "off"}, {"speculate": "self"}, {"speculate": "ngram+self", "draft_nodes": 3}):
        with Engine.load(talker, threads=1, expert_cache="60%", **options) as engine:
            found.append([engine.generate("abcabcab", each).token_ids for each in settings])
    assert found[0] == found[1] == found[2]
    assert found[0][0] == found[0][1] != found[0][2]


def test_what_was_said_before_is_drafted_for_whoever_is_told_it_again(talker: Path) -> None:
    sampling = Sampling(max_tokens=40, temperature=0.8, seed=3, ignore_eos=True)
    with Engine.load(talker, dtype="float32", speculate="ngram") as engine:
        first, again = (engine.generate([5, 9, 200, 31, 7], sampling) for _ in range(2))
        speculation = engine._loop.speculation
        assert len(speculation._ngrams.replies) >= 40
    assert first.token_ids == again.token_ids
    assert again.timings.cycles < first.timings.generated_tokens / 4
    assert again.timings.accepted > 3 * first.timings.accepted
    assert len(speculation._ngrams.replies) == 0, "a closed engine remembers nothing"


# --- several at once -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speculate", "options"),
    [
        ("ngram+self", {"expert_cache": 8, "batch": 5}),
        ("self", {"expert_cache": "100%", "batch": 3, "draft_shape": "chain"}),
        ("ngram", {"expert_cache": 8, "batch": 12, "draft_nodes": 40, "draft_depth": 20}),
    ],
)
def test_many_requests_at_once_get_what_they_get_without_drafts(
    speculate: str, options: dict[str, Any], talker: Path, many: list[Completion]
) -> None:
    """They differ in all that a request may say, stop texts and logprobs included."""
    with Engine.load(talker, threads=1, speculate=speculate, **options) as engine:
        replies = dict(engine.generate_batch(mixed()))
        stats = engine.stats
    for number, expected in enumerate(many):
        reply = replies[number]
        assert isinstance(reply, Completion)
        assert_same_reply(reply, expected)
    timings = [reply.timings for reply in replies.values() if isinstance(reply, Completion)]
    assert stats.drafted == sum(each.drafted for each in timings) > stats.accepted
    assert stats.accepted == sum(each.accepted for each in timings)
    assert stats.cycles == sum(each.cycles for each in timings) > 0
    assert stats.tokens_generated == sum(each.generated_tokens for each in timings)


def mixed() -> list[tuple[list[int], Sampling]]:
    return [(prompt, Sampling(**settings)) for prompt, settings in mixed_requests(9, 40, seed=3)]


@pytest.fixture(scope="module")
def many(talker: Path) -> list[Completion]:
    with Engine.load(talker, threads=1, speculate="off", expert_cache=8, batch=1) as engine:
        return [engine.generate(prompt, settings) for prompt, settings in mixed()]


def test_latents_at_once_side_by_side(zoo: Zoo, plain: Baseline) -> None:
    """Where sequences are not packed, each has a tree in a pass of its own and they meet at the experts."""
    requests = [(prompt, Sampling(max_tokens=TOKENS, ignore_eos=True, **settings)) for prompt, settings in REQUESTS]
    with Engine.load(zoo("deepseek_v3"), threads=1, speculate="ngram+self", expert_cache=9, batch=4) as engine:
        replies = dict(engine.generate_batch(requests))
        assert engine.stats.accepted > 0
    for number, expected in enumerate(plain("deepseek_v3")):
        reply = replies[number]
        assert isinstance(reply, Completion)
        assert_same_reply(reply, expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_beginnings_are_shared_with_what_drafts_have_left(family: str, zoo: Zoo) -> None:
    """A conversation goes on from pasts that were drafted upon, cut and copied."""
    settings = Sampling(max_tokens=13, ignore_eos=True)
    asked: list[list[Completion]] = []
    for speculate in ("off", "ngram+self"):
        replies: list[Completion] = []
        with Engine.load(zoo(family), threads=1, speculate=speculate, expert_cache="50%") as engine:
            text = [*PROMPT]
            for turn in range(2):
                replies.append(engine.generate(text, settings))
                replies.append(engine.generate([*text, *replies[-1].token_ids[:5], 77], settings))
                text += [*replies[-2].token_ids, *random_ids(3, seed=turn)]
            assert sum(reply.timings.shared_tokens for reply in replies) > 40
            assert (engine.stats.accepted > 0) == (speculate != "off")
        asked.append(replies)
    for found, expected in zip(asked[1], asked[0], strict=True):
        assert_same_reply(found, expected)


def test_where_positions_are_scaled_anew_no_draft_reaches_across(zoo: Zoo) -> None:
    """Long positions are scaled otherwise, for all tokens of the pass that reaches them."""
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0 + place / 8 for place in range(8)]}
    rope |= {"short_mscale": 1.0, "long_mscale": 1.2}
    folder = zoo("phimoe", rope_parameters=rope)
    replies: list[list[Completion]] = []
    for speculate in ("off", "self"):
        with Engine.load(folder, threads=1, speculate=speculate, expert_cache="100%") as engine:
            requests = [(random_ids(15, seed), Sampling(max_tokens=20, ignore_eos=True, logprobs=0)) for seed in (1, 2)]
            replies.append([engine.generate(*request) for request in requests])
            assert (engine.stats.accepted > 10) == (speculate == "self")
    for found, expected in zip(*replies, strict=True):
        assert_same_reply(found, expected)
