"""How requests leave a batch before their reply is whole: cancelled, forgotten, or with an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from edgemoe.model.kv_cache import SequenceCache
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import Running, Zoo, random_ids, running
from tests.support.crowd import Crowd, alone, assert_same_reply, budgeted, completion


@pytest.fixture
def own(zoo: Zoo) -> Iterator[Running]:
    with running(zoo("mixtral"), slots=12) as loaded, quiet_transformers():
        yield loaded


def test_cancelled_ones_end_with_what_they_have_whether_they_run_or_wait(own: Running) -> None:
    crowd = Crowd(own, limit=2)
    prompts = [[10 + number, 5, 6] for number in range(4)]
    requests = [crowd.ask(prompt, max_tokens=20) for prompt in prompts]
    for _ in range(3):
        crowd.step()
    crowd.loop.cancel(lambda request: not request.begun)
    later = crowd.ask(random_ids(5, seed=9), max_tokens=20)
    crowd.step()
    assert [request.finished for request in requests] == [False, False, True, True]
    crowd.loop.cancel(lambda request: True)
    crowd.step()
    assert all(request.finished for request in [*requests, later])
    replies = [completion(request) for request in [*requests, later]]
    assert {reply.finish_reason for reply in replies} == {"cancelled"}
    assert [len(reply.token_ids) for reply in replies] == [4, 4, 0, 0, 0]
    assert replies[0].token_ids == alone(own, prompts[0], max_tokens=20).token_ids[:4]
    assert crowd.scheduler.running == crowd.scheduler.waiting == 0
    assert_same_reply(crowd.reply(random_ids(5, 7)), alone(own, random_ids(5, 7)))


def test_a_preempted_one_has_begun_and_is_not_cancelled_with_those_that_wait(own: Running) -> None:
    crowd = Crowd(own, capacity=lambda size: 2 * size.nbytes(64) + 1)
    requests = [crowd.ask(random_ids(20, seed), max_tokens=60) for seed in range(2)]
    while not crowd.scheduler.totals.preemptions:
        crowd.step()
    crowd.loop.cancel(lambda request: not request.begun)
    crowd.finish()
    assert [completion(request).finish_reason for request in requests] == ["length", "length"]


def test_nobody_computes_for_those_that_nobody_waits_for(own: Running) -> None:
    crowd = Crowd(own, limit=2)
    running_one, stays, waiting_one = (
        crowd.ask([10 + number] * 3, max_tokens=count) for number, count in enumerate((500, 5, 500))
    )
    crowd.step()
    crowd.cancel(running_one, waiting_one)
    crowd.finish()
    assert completion(stays).finish_reason == "length"
    assert len(crowd.steps) <= 6
    assert crowd.scheduler.running == crowd.scheduler.waiting == 0


def test_a_step_that_fails_takes_only_those_with_it_that_were_part_of_it(own: Running) -> None:
    crowd = Crowd(own, limit=2)
    requests = [crowd.ask(random_ids(12, seed), max_tokens=4) for seed in range(4)]
    crowd.step()
    run = crowd.joint.run_sampled

    def fail(inputs: Any) -> Any:
        raise OSError("the link is down")

    crowd.joint.run_sampled = fail  # type: ignore[method-assign]
    crowd.step()
    crowd.joint.run_sampled = run  # type: ignore[method-assign]
    failed = [request for request in requests if isinstance(request.error, OSError)]
    assert len(failed) == 2
    assert crowd.scheduler.running == 0
    assert crowd.scheduler.kv.nbytes == 0, "what a failed step leaves in a past is of no use to others"
    crowd.finish()
    for request in requests:
        if request not in failed:
            prompt = request.tokens[: request.prompt_length]
            assert_same_reply(completion(request), alone(own, prompt, max_tokens=4))


def test_a_request_whose_beginning_fails_is_not_lost(own: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its consumer would wait for ever if nobody told it."""
    crowd = Crowd(own)
    asked = crowd.ask(random_ids(5))

    def fail(*arguments: object) -> SequenceCache:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(SequenceCache, "empty", fail)
        crowd.step()
    assert isinstance(asked.error, MemoryError)
    assert crowd.scheduler.running == crowd.scheduler.waiting == 0
    assert_same_reply(crowd.reply(random_ids(5)), alone(own, random_ids(5)))


def test_a_request_that_fails_after_it_got_its_place_gives_it_back(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no such sequence")

    with running(zoo("gpt_oss")) as own, quiet_transformers():
        crowd = Crowd(own)
        asked = crowd.ask(random_ids(20))
        # What an admission does last: the request runs already.
        monkeypatch.setattr(SequenceCache, "can_always_crop", fail)
        crowd.step()
        assert isinstance(asked.error, RuntimeError)
        assert crowd.steps == []
        assert crowd.scheduler.running == crowd.scheduler.waiting == crowd.scheduler.kv.nbytes == 0


def test_what_ends_the_computing_thread_goes_on_in_it_and_is_told_to_the_others(own: Running) -> None:
    crowd = Crowd(own, limit=2)
    requests = [crowd.ask([10 + number] * 3) for number in range(3)]

    def interrupt(inputs: Any) -> Any:
        raise KeyboardInterrupt

    run = crowd.joint.run_sampled
    crowd.joint.run_sampled = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        crowd.step()
    crowd.joint.run_sampled = run  # type: ignore[method-assign]
    assert [type(request.error) for request in requests] == [KeyboardInterrupt, KeyboardInterrupt, type(None)]
    crowd.finish()
    assert_same_reply(completion(requests[2]), alone(own, [12] * 3))


def test_a_lossy_reply_that_began_again_ends_within_its_prompt(own: Running) -> None:
    """What it has computed of its prompt by then is exact, and kept."""
    crowd = Crowd(own, step_tokens=16, speculate="ngram")
    crowd.loop.runner.budget = budgeted(own, 1, "sum", "truncate")
    prompt = [5, 6, 7, 8] * 15
    asked = crowd.ask(prompt, max_tokens=60)
    while not asked.lossy:
        crowd.step()
        assert not asked.finished
    # As a step that finds no memory does.
    crowd.scheduler._preempt(asked)
    crowd.loop._forget_departed()
    other = crowd.ask(random_ids(9), max_tokens=3)
    crowd.step()
    assert asked.cache is not None
    assert 0 < asked.cache.tokens < asked.prompt_length
    crowd.cancel(asked)
    crowd.finish()
    crowd.loop.runner.budget = None
    assert_same_reply(completion(other), alone(own, random_ids(9), max_tokens=3))
    assert_same_reply(crowd.reply(prompt), alone(own, prompt))
    assert crowd.scheduler.totals.tokens_shared > 0


def test_without_memory_for_it_a_finished_cache_is_not_kept(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cache: SequenceCache) -> None:
        raise MemoryError("no memory for a copy of the window's rows")

    with running(zoo("gpt_oss")) as own, quiet_transformers():
        crowd = Crowd(own)
        with monkeypatch.context() as patched:
            patched.setattr(SequenceCache, "trim", fail)
            assert_same_reply(crowd.reply(random_ids(20)), alone(own, random_ids(20)))
            crowd.scheduler.release()
        assert crowd.scheduler.kv.nbytes == 0
        assert_same_reply(crowd.reply(random_ids(20)), alone(own, random_ids(20)))
