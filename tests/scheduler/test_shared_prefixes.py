"""What has been computed for one request is not computed again for the next: headers, turns, retries, undone turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemoe import Engine, Sampling
from edgemoe.quiet import quiet_transformers
from edgemoe.scheduler.scheduler import MAX_CACHED_PREFIXES, MIN_AWAITED_PREFIX, MIN_PREFIX
from tests.support.checkpoints import Running, Zoo, random_ids, running
from tests.support.crowd import Crowd, alone, assert_same_reply, completion

KINDS = ["mixtral", "gpt_oss", "nemotron_h", "minimax"]
"""Rows only; windows of 6 tokens; recurrent states, in transformers' cache and in one of the family's own."""
HEADER = random_ids(MIN_AWAITED_PREFIX + 22, seed=50)


@pytest.fixture(params=KINDS)
def own(request: pytest.FixtureRequest, zoo: Zoo) -> Iterator[Running]:
    with running(zoo(request.param)) as loaded, quiet_transformers():
        yield loaded


def prompt_tokens_computed(crowd: Crowd) -> int:
    """Tokens that went through the model, less those that were generated and went through it to get the next."""
    return crowd.computed - sum(max(0, request.generated - 1) for request in crowd.requests)


def test_a_header_of_several_requests_is_computed_once(own: Running) -> None:
    """They come together, so that the others wait for the first to have computed it."""
    crowd = Crowd(own, step_tokens=256)
    prompts = [[*HEADER, *random_ids(10 + seed, seed)] for seed in range(5)]
    requests = [crowd.ask(prompt, max_tokens=4) for prompt in prompts]
    crowd.finish()
    rest = sum(len(prompt) - len(HEADER) for prompt in prompts)
    assert prompt_tokens_computed(crowd) == len(HEADER) + rest
    assert crowd.scheduler.totals.tokens_shared == 4 * len(HEADER)
    assert sorted(request.shared_tokens for request in requests) == [0, *[len(HEADER)] * 4]
    for request, prompt in zip(requests, prompts, strict=True):
        assert completion(request).timings.shared_tokens == request.shared_tokens
        assert_same_reply(completion(request), alone(own, prompt, max_tokens=4))


def test_of_a_header_that_takes_many_steps_little_is_computed_twice(own: Running) -> None:
    """The others may begin when less is left of it than is worth waiting for."""
    crowd = Crowd(own, step_tokens=48)
    header = random_ids(300, seed=52)
    for seed in range(4):
        crowd.ask([*header, *random_ids(10, seed)], max_tokens=1)
    crowd.finish()
    assert crowd.scheduler.totals.tokens_shared > 3 * (len(header) - MIN_AWAITED_PREFIX)


def test_a_header_is_still_there_when_the_next_requests_come_later(own: Running) -> None:
    crowd = Crowd(own)
    for seed in range(2):
        crowd.ask([*HEADER, *random_ids(10, seed)], max_tokens=2)
    crowd.finish()
    before = crowd.computed
    prompt = [*HEADER, *random_ids(10, seed=2)]
    assert_same_reply(crowd.reply(prompt, max_tokens=2), alone(own, prompt, max_tokens=2))
    assert crowd.computed - before == 10 + 1


def test_requests_of_two_headers_share_each_with_its_own(own: Running) -> None:
    crowd = Crowd(own, limit=3, step_tokens=256)
    other = random_ids(MIN_AWAITED_PREFIX + 5, seed=51)
    prompts = [[*(HEADER, other)[seed % 2], *random_ids(5, seed)] for seed in range(8)]
    requests = [crowd.ask(prompt, max_tokens=3) for prompt in prompts]
    crowd.finish()
    assert prompt_tokens_computed(crowd) == len(HEADER) + len(other) + 8 * 5
    for request, prompt in zip(requests, prompts, strict=True):
        assert_same_reply(completion(request), alone(own, prompt, max_tokens=3))


def test_a_conversation_so_far_is_not_computed_again(own: Running) -> None:
    """Every turn costs its own tokens and the last one of the reply before, which no pass has seen yet."""
    crowd = Crowd(own)
    talk: list[int] = []
    for turn in range(4):
        said = random_ids(15, seed=turn)
        talk += said
        before = crowd.computed
        reply = crowd.reply(talk, max_tokens=6)
        assert crowd.computed - before == len(said) + (1 if turn else 0) + 5
        assert_same_reply(reply, alone(own, talk, max_tokens=6))
        talk += reply.token_ids


@pytest.mark.parametrize("turns", [1, 3])
def test_asking_again_computes_one_token_of_the_prompt(turns: int, own: Running) -> None:
    crowd = Crowd(own)
    talk: list[int] = []
    for turn in range(turns):
        talk += random_ids(15, seed=turn)
        if turn < turns - 1:
            talk += crowd.reply(talk, max_tokens=6).token_ids
    expected = alone(own, talk, max_tokens=6)
    assert_same_reply(crowd.reply(talk, max_tokens=6), expected)
    for _ in range(2):
        before = crowd.computed
        assert_same_reply(crowd.reply(talk, max_tokens=6), expected)
        assert crowd.computed - before == 1 + 5


def test_after_an_undone_turn_the_turns_before_it_are_still_there(own: Running) -> None:
    crowd = Crowd(own)
    talk = random_ids(20)
    talk += crowd.reply(talk, max_tokens=6).token_ids
    crowd.reply([*talk, *random_ids(12, seed=1)], max_tokens=6)
    instead = [*talk, *random_ids(9, seed=2)]
    before = crowd.computed
    assert_same_reply(crowd.reply(instead, max_tokens=6), alone(own, instead, max_tokens=6))
    assert crowd.computed - before <= 1 + 9 + 5


def test_two_conversations_in_turns_both_stay(own: Running) -> None:
    """They begin alike, with the same system prompt: neither may take what the other will go on from."""
    crowd = Crowd(own)
    system = random_ids(30, seed=60)
    talks = [[*system, *random_ids(40, seed=61)], [*system, *random_ids(40, seed=62)]]
    for turn in range(3):
        for talk in talks:
            said = random_ids(10, seed=turn)
            talk += said
            before = crowd.computed
            reply = crowd.reply(talk, max_tokens=4)
            if turn:
                assert crowd.computed - before == 1 + len(said) + 3
            assert_same_reply(reply, alone(own, talk, max_tokens=4))
            talk += reply.token_ids


def test_nobody_waits_for_a_beginning_that_is_short(zoo: Zoo) -> None:
    """A step costs more than the tokens that waiting would save."""
    with running(zoo("mixtral")) as own, quiet_transformers():
        crowd = Crowd(own, step_tokens=64)
        for seed in range(3):
            crowd.ask([*random_ids(MIN_AWAITED_PREFIX - 1, seed=9), *random_ids(50, seed)], max_tokens=1)
        crowd.step()
        assert crowd.scheduler.running == 3


def test_a_beginning_of_a_few_tokens_is_not_looked_after(zoo: Zoo) -> None:
    with running(zoo("mixtral")) as own, quiet_transformers():
        crowd = Crowd(own)
        for length, shared in ((MIN_PREFIX - 1, 0), (MIN_PREFIX, MIN_PREFIX)):
            header = random_ids(length, seed=length)
            for seed in range(2):
                asked = crowd.ask([*header, 3 + seed, 5], max_tokens=3)
                crowd.finish()
            assert asked.shared_tokens == shared


def test_a_short_prompt_is_one_step_where_a_copy_of_its_past_would_be_of_no_use(own: Running) -> None:
    crowd = Crowd(own)
    crowd.reply(random_ids(MIN_PREFIX), max_tokens=2)
    assert crowd.steps == [[MIN_PREFIX], [1]]


def test_a_prompt_of_a_family_that_goes_whole_shares_nothing(zoo: Zoo) -> None:
    with running(zoo("jamba")) as own, quiet_transformers():
        crowd = Crowd(own, in_chunks=False)
        for seed in range(2):
            prompt = [*HEADER, *random_ids(5, seed)]
            assert_same_reply(crowd.reply(prompt, max_tokens=2), alone(own, prompt, max_tokens=2))
        assert crowd.scheduler.totals.tokens_shared == 0


def test_only_the_latest_are_kept(zoo: Zoo) -> None:
    with running(zoo("mixtral")) as own, quiet_transformers():
        crowd = Crowd(own)
        prompts = [random_ids(20, seed) for seed in range(MAX_CACHED_PREFIXES + 1)]
        for prompt in prompts:
            crowd.reply(prompt, max_tokens=2)
        for prompt, shared in ((prompts[-1], 19), (prompts[1], 19), (prompts[0], 0)):
            asked = crowd.ask(prompt, max_tokens=2)
            crowd.finish()
            assert asked.shared_tokens == shared


def test_what_is_kept_holds_no_more_memory_than_it_is_charged_with(zoo: Zoo) -> None:
    """A reply of one token ends where the window's rows are still views of the whole prompt's."""
    with running(zoo("gpt_oss")) as own, quiet_transformers():
        crowd = Crowd(own, step_tokens=200)
        for seed in range(2):
            crowd.ask(random_ids(60, seed), max_tokens=1)
        crowd.finish()
        assert crowd.steps == [[60, 60]]
        held = {
            rows.untyped_storage().data_ptr(): rows.untyped_storage().nbytes()
            for kept in crowd.scheduler._prefixes.kept
            for layer in kept.cache.kv.layers
            for rows in (layer.keys, layer.values)
        }
        assert len(held) == 2 * 2 * 4, "keys and values of both in four layers"
        assert sum(held.values()) <= crowd.scheduler.kv.nbytes


def test_an_engine_tells_how_much_was_shared(talker: Path) -> None:
    with Engine.load(talker, expert_cache=8, threads=1) as engine:
        talk = [{"role": "user", "content": "Tell me a story about a fox."}]
        settings = Sampling(max_tokens=5, ignore_eos=True, temperature=0)
        first = engine.generate(talk, settings)
        again = engine.generate(talk, settings)
        length = first.timings.prompt_tokens
        assert (first.timings.shared_tokens, again.timings.shared_tokens) == (0, length - 1)
        assert again.token_ids == first.token_ids
        assert again.timings.prompt_per_second == pytest.approx(1 / again.timings.prompt_seconds)
        assert (engine.stats.prefix_tokens, engine.stats.tokens_prompt) == (length - 1, 2 * length)
