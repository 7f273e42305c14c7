"""How replies end while drafts are under way: at every limit exactly, by a cancel, by an error, by a close."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from edgemoe import CheckpointError, Completion, EdgeMoEError, Engine, Sampling
from edgemoe.draft.proposal import Proposal, StepReport, Verified
from edgemoe.draft.step_cost import StepCost
from edgemoe.experts.expert_layer import ExpertLayer
from edgemoe.model.draft_tree import DraftTree
from edgemoe.quiet import quiet_transformers
from edgemoe.request.request import Request
from tests.support.checkpoints import PROMPT, Running, Zoo, random_ids, running
from tests.support.crowd import Crowd, alone, assert_same_reply, completion, mixed_requests

SETTINGS: dict[str, Any] = {"ignore_eos": True, "temperature": 1.0, "seed": 11}


def load(folder: Path, **options: Any) -> Engine:
    """An engine that drafts with itself; with every expert resident it is right nearly always."""
    return Engine.load(folder, **{"threads": 1, "speculate": "self", "expert_cache": "100%", **options})


@pytest.fixture(scope="module")
def engine(talker: Path) -> Iterator[Engine]:
    """Shared: no test may close it."""
    with load(talker) as loaded:
        loaded.generate(PROMPT, Sampling(max_tokens=2))
        yield loaded


@pytest.fixture(scope="module")
def whole(talker: Path) -> Completion:
    """The reply to "abc" without drafts."""
    with load(talker, speculate="off") as plain:
        return plain.generate("abc", Sampling(**SETTINGS, max_tokens=40, logprobs=1))


# --- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_max_tokens_is_exact_in_the_middle_of_a_draft(count: int, engine: Engine, whole: Completion) -> None:
    before = engine.stats
    reply = engine.generate("abc", Sampling(**SETTINGS, max_tokens=count))
    assert reply.token_ids == whole.token_ids[:count]
    assert reply.finish_reason == "length"
    assert reply.timings.generated_tokens == count
    assert engine.stats.tokens_generated == before.tokens_generated + count
    # A last token that was drafted would cost a pass and save none.
    assert count == engine.stats.steps - before.steps + reply.timings.accepted


def test_the_context_is_exact_too(talker: Path, whole: Completion) -> None:
    for context in (5, 14):
        with load(talker, context=context) as small:
            reply = small.generate("abc", Sampling(**SETTINGS, max_tokens=40))
            assert reply.token_ids == whole.token_ids[: context - 3]
            assert reply.finish_reason == "length"
            assert small.stats.drafted > 0 or context < 7


def test_a_stop_text_in_a_draft_ends_the_reply_where_it_begins(engine: Engine, whole: Completion) -> None:
    """Some are found in what was drafted, some across two steps; what follows them in a draft is not there."""
    ended = 0
    for start, length in ((3, 1), (9, 1), (12, 3)):
        stop = whole.text[start : start + length]
        reply = engine.generate("abc", Sampling(**SETTINGS, max_tokens=40, stop=(stop,)))
        assert reply.text == whole.text[: whole.text.index(stop)]
        assert reply.finish_reason == "stop"
        assert reply.token_ids == whole.token_ids[: len(reply.token_ids)]
        assert reply.timings.generated_tokens == len(reply.token_ids)
        tokens = reply.timings.accepted + reply.timings.cycles
        ended += tokens > len(reply.token_ids) - 1
    assert ended, "one at least ended with what was drafted"


@pytest.mark.parametrize("end", [3, 6])
def test_an_end_token_in_a_draft_ends_the_reply(end: int, zoo: Zoo) -> None:
    """Nothing after it counts, its past is not kept, and the totals say what the reply says."""
    with load(zoo("gpt_oss"), speculate="off") as plain:
        free = plain.generate(PROMPT, Sampling(max_tokens=12, ignore_eos=True)).token_ids
    cut = free[: free.index(free[end]) + 1]
    with load(zoo("gpt_oss", eos_token_id=free[end])) as own:
        own.generate(PROMPT, Sampling(max_tokens=2, ignore_eos=True))
        before = own.stats
        reply = own.generate(PROMPT, Sampling(max_tokens=12))
        stats = own.stats
        assert (reply.token_ids, reply.finish_reason) == (cut, "stop")
        assert reply.timings.accepted == stats.accepted - before.accepted <= stats.drafted - before.drafted
        assert stats.tokens_generated - before.tokens_generated == len(cut)
        saved = len(cut) - (stats.steps - before.steps)
        assert saved <= reply.timings.accepted <= saved + 1
        again = own.generate([*PROMPT, *cut], Sampling(max_tokens=12 - len(cut), ignore_eos=True))
        assert again.token_ids == free[len(cut) :]


def test_chunks_are_a_token_each_and_their_numbers_only_grow(engine: Engine, whole: Completion) -> None:
    chunks = list(engine.stream("abc", Sampling(**SETTINGS, max_tokens=40, logprobs=1)))
    assert all(len(chunk.token_ids) == 1 for chunk in chunks)
    assert [chunk.finish_reason for chunk in chunks] == [None] * 39 + ["length"]
    assert_same_reply(Completion.from_chunks(chunks, whole.prompt_token_ids), whole)
    timings = [chunk.timings for chunk in chunks]
    for name in ("generated_tokens", "cycles", "drafted", "accepted", "generate_seconds", "hits", "misses"):
        values = [getattr(each, name) for each in timings]
        assert values == sorted(values)
    assert [each.generated_tokens for each in timings] == list(range(1, 41))
    assert timings[0].cycles == 0
    assert timings[-1].accepted > 20


# --- cancels, errors, close ------------------------------------------------------------------------


def test_a_cancel_ends_with_what_there_is(engine: Engine, whole: Completion) -> None:
    """Tokens of the step that is over are given, none is made after it, and the engine goes on."""
    for taken in (1, 4):
        before = engine.stats.steps
        stream = engine.stream("abc", Sampling(**SETTINGS, max_tokens=40))
        chunks = [next(stream) for _ in range(taken)]
        steps = engine.stats.steps
        engine.cancel()
        chunks += list(stream)
        tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
        assert chunks[-1].finish_reason == "cancelled"
        assert tokens == whole.token_ids[: len(tokens)]
        assert engine.stats.steps == steps > before
        assert taken <= len(tokens) < 40
    assert engine.generate("abc", Sampling(**SETTINGS, max_tokens=40)).token_ids == whole.token_ids


def test_a_stream_that_is_closed_leaves_the_others_alone(engine: Engine, whole: Completion) -> None:
    other = engine.stream("xyz", Sampling(**SETTINGS, max_tokens=40))
    stream = engine.stream("abc", Sampling(**SETTINGS, max_tokens=40))
    next(other)
    chunks = [next(stream) for _ in range(5)]
    other.close()
    chunks += list(stream)
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids


class Failing:
    """Lets the `nth` drafting of an expert layer raise, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nth: int, error: BaseException) -> None:
        self.left, draft = nth, ExpertLayer.draft

        def failing(layer: ExpertLayer, *args: torch.Tensor) -> torch.Tensor:
            self.left -= 1
            if self.left == 0:
                raise error
            return draft(layer, *args)

        monkeypatch.setattr(ExpertLayer, "draft", failing)


@pytest.mark.parametrize(
    ("nth", "error", "told"),
    [
        (1, RuntimeError("no luck"), EdgeMoEError),
        (7, RuntimeError("no luck"), EdgeMoEError),
        (10, OSError("no luck"), CheckpointError),
    ],
)
def test_an_error_in_a_drafting_pass_reaches_its_consumers_and_no_one_else(
    nth: int,
    error: Exception,
    told: type[Exception],
    engine: Engine,
    whole: Completion,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the first layer or in the middle of a pass: the engine works afterwards, drafts included."""
    streams = [engine.stream(prompt, Sampling(**SETTINGS, max_tokens=40)) for prompt in ("abc", "xyz")]
    for stream in streams:
        next(stream)
    failing = Failing(monkeypatch, nth, error)
    for stream in streams:
        with pytest.raises(told, match="no luck"):
            list(stream)
    assert failing.left <= 0
    before = engine.stats.accepted
    assert engine.generate("abc", Sampling(**SETTINGS, max_tokens=40)).token_ids == whole.token_ids
    assert engine.stats.accepted > before
    assert engine._runtime is not None
    engine._runtime.cache.check_integrity()


def test_an_error_in_a_verifying_pass_does_too(engine: Engine, whole: Completion) -> None:
    stream = engine.stream("abc", Sampling(**SETTINGS, max_tokens=40))
    next(stream)
    runner = engine._loop.runner.model
    run = runner.run_sampled

    def fail(inputs: Sequence[Any]) -> Any:
        logits = run(inputs)
        if any(item.tree_mask is not None for item in inputs) and engine._loop.speculation._passes is not None:
            raise RuntimeError("no luck")
        return logits

    runner.run_sampled = fail  # type: ignore[method-assign]
    try:
        with pytest.raises(EdgeMoEError, match="no luck"):
            list(stream)
    finally:
        runner.run_sampled = run  # type: ignore[method-assign]
    assert engine.generate("abc", Sampling(**SETTINGS, max_tokens=40)).token_ids == whole.token_ids


def test_closing_waits_for_the_draft_in_flight(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafting, outcome, draft = threading.Event(), [], ExpertLayer.draft

    def noting(layer: ExpertLayer, *args: torch.Tensor) -> torch.Tensor:
        drafting.set()
        return draft(layer, *args)

    monkeypatch.setattr(ExpertLayer, "draft", noting)
    own = load(talker)

    def generate() -> None:
        try:
            outcome.append(own.generate("abc", Sampling(max_tokens=450, ignore_eos=True)).finish_reason)
        except EdgeMoEError as error:
            outcome.append(str(error))

    worker = threading.Thread(target=generate)
    worker.start()
    assert drafting.wait(20)
    own.close()
    worker.join(20)
    assert not worker.is_alive()
    assert len(outcome) == 1
    assert outcome[0] == "cancelled" or "closed" in outcome[0]


# --- room and price --------------------------------------------------------------------------------


def test_who_loses_its_past_for_lack_of_room_is_computed_again(zoo: Zoo) -> None:
    """`Crowd` looks after every step: no draft makes pasts outgrow the room, nor a step its tokens."""
    with running(zoo("gpt_oss")) as own, quiet_transformers():
        crowd = Crowd(own, capacity=lambda size: 2 * size.nbytes(64) + 1, speculate="ngram+self", draft_depth=3)
        asked = [
            (random_ids(20, seed=5 + number), {"max_tokens": 50, "temperature": 1.0, "seed": number})
            for number in range(3)
        ]
        requests = [crowd.ask(prompt, **settings) for prompt, settings in asked]
        crowd.finish()
        for request, (prompt, settings) in zip(requests, asked, strict=True):
            assert_same_reply(completion(request), alone(own, prompt, **settings))
        totals = crowd.scheduler.totals
        assert totals.preemptions > 0
        assert totals.tokens_generated == 150
        assert crowd.speculation.totals.drafted > crowd.speculation.totals.accepted > 0


@pytest.mark.parametrize("step_tokens", [4, 12])
def test_drafts_take_what_a_step_has_left(step_tokens: int, zoo: Zoo) -> None:
    with running(zoo("mixtral"), slots=12) as own, quiet_transformers():
        crowd = Crowd(own, step_tokens=step_tokens, limit=4, speculate="ngram", draft_nodes=64, draft_depth=64)
        requests = [(random_ids(5, seed) * 6, {"max_tokens": 20}) for seed in range(4)]
        for prompt, settings in requests:
            crowd.ask(prompt, **settings)
        crowd.finish()
        for request, (prompt, settings) in zip(crowd.requests, requests, strict=True):
            assert_same_reply(completion(request), alone(own, prompt, **settings))
        assert (crowd.speculation.totals.drafted > 0) == (step_tokens > 4)


def test_no_step_drafts_more_than_there_is_room_for_logits(zoo: Zoo) -> None:
    with running(zoo("mixtral"), slots=12) as own, quiet_transformers():
        crowd = Crowd(own, limit=4, speculate="ngram", draft_nodes=64, draft_depth=64)
        crowd.scheduler._max_drafted = 9
        propose, drafted = crowd.speculation.propose, []

        def proposing(limits: Mapping[Request, int], *, mixed: bool = False) -> Proposal:
            proposal = propose(limits, mixed=mixed)
            drafted.append(sum(tree.drafted for tree in proposal.trees.values()))
            return proposal

        crowd.speculation.propose = proposing  # type: ignore[method-assign]
        for seed in range(4):
            crowd.ask(random_ids(5, seed) * 6, max_tokens=30)
        crowd.finish()
        assert 2 < max(drafted) <= 9
    with Engine.load(zoo("mixtral"), threads=1) as engine:
        row = engine._loop.runner.model.vocabulary * 2 * torch.float32.itemsize
        assert engine._loop.scheduler._max_drafted == engine.plan.workspace_nbytes // row


def test_mixed_requests_in_a_crowd_with_drafts(zoo: Zoo) -> None:
    """Prompts under way, newcomers and cancelled ones beside those that are drafted for."""
    requests = mixed_requests(10, 150, seed=7)
    with running(zoo("gpt_oss"), slots=12) as own, quiet_transformers():
        crowd = Crowd(own, limit=4, speculate="ngram+self", draft_shape="tree", draft_nodes=7)
        for number, (prompt, settings) in enumerate(requests):
            asked = crowd.ask(prompt, **settings)
            crowd.step()
            if number == 3:
                crowd.cancel(asked)
        crowd.finish()
        for number, (request, (prompt, settings)) in enumerate(zip(crowd.requests, requests, strict=True)):
            if number != 3:
                assert_same_reply(completion(request), alone(own, prompt, **settings))
        assert crowd.speculation.totals.accepted > 0
        own.cache.check_integrity()


@pytest.fixture
def own(zoo: Zoo) -> Iterator[Running]:
    with running(zoo("mixtral")) as loaded, quiet_transformers():
        yield loaded


@pytest.mark.parametrize(("share", "drafts"), [(0.001, True), (5.0, False)])
def test_what_is_priced_is_drafted_while_it_pays(
    share: float, drafts: bool, own: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`share` is what one more token costs of a step; n-grams are found from the first token on."""
    monkeypatch.setattr(StepCost, "token", property(lambda self: share * self.seconds))
    crowd = Crowd(own, speculate="auto")
    prompt = random_ids(5) * 6
    assert_same_reply(crowd.reply(prompt, max_tokens=25), alone(own, prompt, max_tokens=25))
    assert (crowd.speculation.totals.drafted > 0) == drafts
    assert crowd.speculation.reason == "ngram, while it pays, trees of at most 16 tokens"


def test_before_a_step_was_timed_nothing_is_worth_its_price(own: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's step, one that warms up, and one that is the first to be timed."""
    monkeypatch.setattr(StepCost, "token", property(lambda self: 0.001 * self.seconds))
    crowd = Crowd(own, speculate="auto")
    asked = crowd.ask(random_ids(5) * 6, max_tokens=25)
    for _ in range(3):
        crowd.step()
    assert crowd.speculation.totals.cycles == 0
    assert asked.generated == 3
    crowd.finish()
    assert crowd.speculation.totals.cycles > 0


@pytest.mark.parametrize(
    ("path", "made", "expected"),
    [
        ([0], 1, {1: False, 2: False}),
        ([0, 2], 2, {1: False, 2: True, 4: False}),
        ([0, 1, 3], 3, {1: True, 2: False, 3: True, 5: False}),
        ([0, 1, 3], 2, {1: True, 2: False, 3: True}),
        ([0, 1], 1, {1: True, 2: False}),
    ],
)
def test_only_what_the_model_was_asked_about_is_learnt_from(
    path: list[int], made: int, expected: dict[int, bool], own: Running
) -> None:
    """Not what lies below a wrong guess, nor what was drafted behind the reply's end: there, one fewer was made."""
    crowd = Crowd(own, speculate="self")
    speculation, asked = crowd.speculation, crowd.ask([5, 6])
    tree = DraftTree(9)
    for parent, token in ((0, 1), (0, 2), (1, 3), (2, 4), (3, 5)):
        tree.add(parent, token, 0.5)
    seen: dict[int, bool] = {}

    def saw(index: int, hit: bool) -> None:
        seen[index] = hit

    speculation._calibration.observe = saw  # type: ignore[method-assign]
    proposal = Proposal({asked: tree}, {asked: {node: node for node in range(1, 6)}})
    report = StepReport({asked: Verified(path, made)}, 1, 6, 0, 1.0, 0.0)
    speculation.learn(proposal, report)
    assert seen == expected
    totals = speculation.totals
    assert (totals.cycles, totals.drafted, totals.accepted) == (1, 5, len(path) - 1)


def test_how_far_a_draft_stands_out_is_measured_against_what_came_of_it(zoo: Zoo) -> None:
    with running(zoo("mixtral"), slots=5) as own, quiet_transformers():
        crowd = Crowd(own, speculate="self", draft_shape="chain", draft_depth=4)
        seen: list[bool] = []
        crowd.speculation._calibration.observe = lambda index, hit: seen.append(hit)  # type: ignore[method-assign]
        crowd.reply(random_ids(5), max_tokens=30, temperature=1.0)
        totals = crowd.speculation.totals
        assert seen.count(True) == totals.accepted
        assert 0 < totals.accepted < totals.drafted
        assert 0 < seen.count(False) <= totals.cycles, "a chain is wrong once"
