"""Replies with a checkpoint's own draft head are those without it, whatever becomes of a sequence's past."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.support.engine_parts import runner_of
from bench.support.zoo_heads import imitating, make_with_head
from edgemoe import Completion, Engine, Sampling
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.plan.kv_size import measure_kv
from edgemoe.quiet import quiet_transformers
from edgemoe.scheduler.kv_budget import KvBudget
from tests.support.checkpoints import random_ids
from tests.support.crowd import assert_same_reply, mixed_requests

FAMILIES = ["mixtral", "gpt_oss", "deepseek_v3", "glm4_moe"]
"""Rows; windows of 6 tokens; sequences that do not share passes; and groups of experts."""
SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "threads": 1, "state_folder": "none"}
Asked = tuple[list[int], Sampling]
REQUESTS: list[Asked] = [
    (random_ids(24), Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)),
    (random_ids(7) * 3, Sampling(max_tokens=24, temperature=0.9, seed=3, ignore_eos=True)),
    (random_ids(3, seed=4), Sampling(max_tokens=20, temperature=0.8, top_k=30, seed=5, ignore_eos=True)),
]
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Checkpoints whose head is right now and then, in which every token still depends on all others."""
    root, folders = tmp_path_factory.mktemp("heads"), dict[str, Path]()

    def folder(family: str) -> Path:
        if family not in folders:
            with quiet_transformers():
                folders[family] = imitating(make_with_head(family, root / family), effect=0.3)
        return folders[family]

    return folder


@pytest.fixture(scope="module")
def plainly(made: Made) -> Callable[..., list[Completion]]:
    """Replies without drafts, one by one, each from an empty cache."""
    known = dict[str, Completion]()

    def replies(family: str, asked: Sequence[Asked]) -> list[Completion]:
        keys = [repr((family, *each)) for each in asked]
        missing = {key: each for key, each in zip(keys, asked, strict=True) if key not in known}
        if missing:
            with load(made(family), speculate="off", prefetch="off") as engine:
                known.update({key: engine.generate(*each) for key, each in missing.items()})
        return [known[key] for key in keys]

    return replies


def load(folder: Path, **options: Any) -> Engine:
    return Engine.load(folder, **SETTINGS | {"speculate": "mtp"} | options)


def together(engine: Engine, asked: Sequence[Asked]) -> list[Completion]:
    found = dict(engine.generate_batch(asked))
    replies = [found[place] for place in range(len(asked))]
    for reply in replies:
        assert isinstance(reply, Completion), reply
    return replies  # type: ignore[return-value]


def assert_same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_same_reply(one, other)


# --- families, drafters and caches -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("speculate", "slots"), [("mtp", 5), ("ngram+mtp", "100%"), ("auto", "50%")], ids=["mtp", "ngram+mtp", "auto"]
)
def test_replies_are_those_without_drafts(
    family: str, speculate: str, slots: int | str, made: Made, plainly: Callable[..., list[Completion]]
) -> None:
    """Greedy and sampled, one by one and three at once, with few slots and with enough."""
    expected = plainly(family, REQUESTS)
    with load(made(family), speculate=speculate, expert_cache=slots, batch=3) as engine:
        assert "mtp" in engine.stats.speculation
        assert runner_of(engine).head is not None
        assert_same([engine.generate(*each) for each in REQUESTS], expected)
        assert_same(together(engine, REQUESTS), expected)
        stats = engine.stats
        assert sum(stats.drafted_by.values()) == stats.drafted
        assert sum(stats.accepted_by.values()) == stats.accepted
        if speculate != "auto":
            assert 0 < stats.accepted_by["mtp"] < stats.drafted_by["mtp"]


@pytest.mark.parametrize("options", [{"experts": "int8"}, {"dense": "int8"}, {"draft_shape": "chain"}])
def test_packed_weights_and_chains(options: dict[str, str], made: Made) -> None:
    """What is quantised as it is read is so in the head, too."""
    packed = {name: value for name, value in options.items() if name != "draft_shape"}
    with load(made("mixtral"), speculate="off", **packed) as plain:
        expected = [plain.generate(*each) for each in REQUESTS]
    with load(made("mixtral"), **options) as engine:
        assert_same([engine.generate(*each) for each in REQUESTS], expected)
        assert engine.stats.accepted > 0


@pytest.mark.parametrize("speculate", ["mtp", "ngram+mtp"])
def test_mixed_requests_at_once(speculate: str, made: Made, plainly: Callable[..., list[Completion]]) -> None:
    """More than the batch has places for: they come and go beside each other's drafts."""
    asked = [(prompt, Sampling(**settings)) for prompt, settings in mixed_requests(8, 40, seed=2)]
    with load(made("gpt_oss"), speculate=speculate, batch=3) as engine:
        assert_same(together(engine, asked), plainly("gpt_oss", asked))
        assert engine.stats.accepted > 0


# --- what becomes of the past ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_prompts_with_a_common_beginning_share_it(
    family: str, made: Made, plainly: Callable[..., list[Completion]]
) -> None:
    """Copied from a request that runs, cut from one that is over, and asked again."""
    common = random_ids(30, seed=8)
    how = Sampling(max_tokens=12, temperature=0.7, seed=2, ignore_eos=True)
    asked = [([*common, *random_ids(count, seed=count)], how) for count in (1, 4, 9)]
    expected = plainly(family, asked)
    with load(made(family), batch=3) as engine:
        assert_same(together(engine, asked), expected)
        assert_same([engine.generate(*each) for each in asked], expected)
        assert engine.stats.prefix_tokens > 0
        before = engine.stats
        assert_same([engine.generate(*asked[0])], expected[:1])
        assert engine.stats.prefix_tokens > before.prefix_tokens, "asked again, its past is there"
        assert engine.stats.drafted > before.drafted, "and its head's"


def test_a_conversation_goes_on_with_its_past(made: Made, plainly: Callable[..., list[Completion]]) -> None:
    """Three turns, each with what was said before; the head's past is as long as the model's."""
    how = Sampling(max_tokens=12, temperature=0.9, seed=6, ignore_eos=True)
    said = random_ids(20, seed=9)
    with load(made("mixtral")) as engine:
        for turn in range(3):
            before = engine.stats
            reply = engine.generate(said, how)
            (expected,) = plainly("mixtral", [(said, how)])
            assert_same_reply(reply, expected)
            assert engine.stats.drafted > before.drafted
            if turn:
                assert engine.stats.prefix_tokens - before.prefix_tokens >= len(said) - 12
            said = [*said, *reply.token_ids, *random_ids(5, seed=turn)]
        kept = engine._loop.scheduler._prefixes.kept
        for each in kept:
            own = each.cache.head
            assert own is not None
            assert own.rows + own.waiting == each.cache.tokens


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_who_loses_its_past_for_lack_of_room_is_computed_again(
    family: str, made: Made, plainly: Callable[..., list[Completion]]
) -> None:
    """Room for two that have not grown, as keys, values and hidden states are counted."""
    asked = [
        (random_ids(20, seed=5 + number), Sampling(max_tokens=50, temperature=1.0, seed=number, ignore_eos=True))
        for number in range(3)
    ]
    expected = plainly(family, asked)
    size = measure_kv(open_blueprint(made(family), "float32", head=True))
    assert size.nbytes(64) > measure_kv(open_blueprint(made(family), "float32")).nbytes(64)
    with load(made(family), batch=3) as engine:
        engine._loop.scheduler.kv = KvBudget(size, 2 * size.nbytes(64) + 1)
        engine._loop.scheduler._prefixes._budget = engine._loop.scheduler.kv
        assert_same(together(engine, asked), expected)
        assert engine.stats.preemptions > 0
        assert engine.stats.accepted > 0


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_request_that_is_cancelled_leaves_nothing_behind(
    family: str, made: Made, plainly: Callable[..., list[Completion]]
) -> None:
    """In the middle of drafts; the same prompt and those beside it then get their replies."""
    expected = plainly(family, REQUESTS)
    long = Sampling(max_tokens=100, temperature=0.0, ignore_eos=True)
    with load(made(family), batch=3) as engine:
        stream = engine.stream(REQUESTS[0][0], long)
        for _ in range(3):
            next(stream)
        stream.close()
        assert engine.stats.drafted > 0
        assert_same(together(engine, REQUESTS), expected)
        assert_same([engine.generate(*each) for each in REQUESTS], expected)
