"""Many requests on one model: each gets what it gets alone, within the room and the budget, and nobody is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edgemoe.plan.kv_size import KvSize
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import Running, Zoo, random_ids, running
from tests.support.crowd import Crowd, alone, assert_same_reply, completion, mixed_requests


@pytest.fixture
def own(zoo: Zoo) -> Iterator[Running]:
    with running(zoo("mixtral"), slots=12) as loaded, quiet_transformers():
        yield loaded


@pytest.mark.parametrize(
    ("family", "count", "in_chunks"),
    [
        ("mixtral", 32, True),
        ("gpt_oss", 12, True),
        ("deepseek_v3", 10, True),
        ("nemotron_h", 10, True),
        ("jamba", 10, False),
    ],
)
def test_mixed_requests_get_what_they_get_alone(family: str, count: int, in_chunks: bool, zoo: Zoo) -> None:
    """Half are there at the beginning, the others arrive one by one while these run."""
    requests = mixed_requests(count, 300)
    with running(zoo(family), slots=12) as own, quiet_transformers():
        crowd = Crowd(own, limit=6, in_chunks=in_chunks)
        for number, (prompt, settings) in enumerate(requests):
            crowd.ask(prompt, **settings)
            if number > count // 2:
                crowd.step()
        crowd.finish()
        replies = [completion(request) for request in crowd.requests]
        for reply, (prompt, settings) in zip(replies, requests, strict=True):
            assert_same_reply(reply, alone(own, prompt, **settings))
        own.cache.check_integrity()
    assert {reply.finish_reason for reply in replies} == {"stop", "length"}
    assert max(map(len, crowd.steps)) >= (6 if in_chunks else 3)
    assert crowd.scheduler.totals.preemptions == 0


@pytest.mark.parametrize("companions", [1, 4])
def test_what_a_seed_draws_does_not_depend_on_companions(companions: int, own: Running) -> None:
    settings = {"temperature": 1.0, "seed": 7, "max_tokens": 20}
    prompt = random_ids(30)
    expected = alone(own, prompt, **settings)
    for seed in (1, 2):
        crowd = Crowd(own)
        for number in range(companions):
            crowd.ask(random_ids(10 * number + 5, seed), temperature=1.0, seed=7, max_tokens=13)
            crowd.step()
        assert_same_reply(crowd.reply(prompt, **settings), expected)


# --- room ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_who_loses_its_past_for_lack_of_room_is_computed_again(family: str, zoo: Zoo) -> None:
    """Room for two that have not grown. The first to lose is the youngest, and the reply is the same."""
    with running(zoo(family)) as own, quiet_transformers():
        crowd = Crowd(own, capacity=lambda size: 2 * size.nbytes(64) + 1)
        asked = [
            (random_ids(20, seed=5 + number), {"max_tokens": 50 + number, "temperature": 1.0, "seed": number})
            for number in range(4)
        ]
        requests = [crowd.ask(prompt, **settings) for prompt, settings in asked]
        lost: list[Any] = []
        while crowd.scheduler.running or crowd.scheduler.waiting:
            before = [request for request in requests if request.cache is not None]
            crowd.step()
            lost += [request for request in before if request.cache is None and not request.finished]
        assert crowd.scheduler.totals.preemptions == len(lost) >= 2
        for request, (prompt, settings) in zip(requests, asked, strict=True):
            assert_same_reply(completion(request), alone(own, prompt, **settings))
        assert crowd.scheduler.totals.tokens_generated == 50 + 51 + 52 + 53
        assert crowd.scheduler.totals.tokens_prompt == 4 * 20


def test_the_youngest_lose_their_places_and_get_them_back_first(own: Running) -> None:
    crowd = Crowd(own, capacity=lambda size: size.nbytes(192))
    old, middle, young = (crowd.ask([number] * 20, max_tokens=60) for number in (5, 6, 7))
    later = crowd.ask([7] * 20, max_tokens=2)
    while not crowd.scheduler.totals.preemptions:
        crowd.step()
    assert old.cache is not None
    assert middle.cache is not None
    assert young.cache is None
    assert later.cache is None
    generated = young.generated
    assert generated > 0
    while later.cache is None:
        assert not later.finished
        crowd.step()
    assert young.cache is not None, "it is let in before those that have not begun"
    assert young.generated >= generated
    crowd.finish()
    assert_same_reply(completion(young), alone(own, [7] * 20, max_tokens=60))


def test_who_needs_room_that_only_older_ones_have_waits_for_them(own: Running) -> None:
    crowd = Crowd(own, capacity=lambda size: size.nbytes(60) + size.nbytes(64))
    old = crowd.ask(random_ids(20), max_tokens=40)
    crowd.step()
    prompt = random_ids(30, seed=1)
    young = crowd.ask(prompt, max_tokens=80)
    while young.cache is None or young.generated < 34:
        crowd.step()
    crowd.step()
    crowd.step()
    assert young.cache is None
    assert old.cache is not None
    crowd.finish()
    assert crowd.scheduler.totals.preemptions == 1
    assert_same_reply(completion(young), alone(own, prompt, max_tokens=80))


def test_a_request_that_is_preempted_within_its_prompt_is_counted_once(own: Running) -> None:
    """The older one needs the room while the long prompt of the younger is under way."""
    crowd = Crowd(own, capacity=lambda size: size.nbytes(64) + size.nbytes(230), step_tokens=16)
    old = crowd.ask(random_ids(50), max_tokens=60)
    while old.generated < 8:
        crowd.step()
    prompt = random_ids(200, seed=1)
    young = crowd.ask(prompt, max_tokens=4)
    crowd.finish()
    totals = crowd.scheduler.totals
    assert totals.preemptions == 1
    assert young.shared_tokens == 0
    assert (totals.tokens_prompt, totals.tokens_shared, totals.tokens_generated) == (250, 0, 64)
    assert_same_reply(completion(young), alone(own, prompt, max_tokens=4))


@pytest.mark.parametrize(("family", "seed"), [("mixtral", 0), ("mixtral", 1), ("gpt_oss", 2), ("qwen3_next", 3)])
def test_the_pasts_never_outgrow_the_room(family: str, seed: int, zoo: Zoo) -> None:
    """Random requests that share beginnings, some cancelled, in little room: `Crowd` looks after every step."""
    with running(zoo(family)) as own, quiet_transformers():
        crowd = Crowd(own, capacity=lambda size: size.nbytes(300) + size.nbytes(70), step_tokens=48, limit=5)
        headers = [random_ids(150, seed=seed), random_ids(40, seed=seed + 10)]
        for number, (prompt, settings) in enumerate(mixed_requests(14, 120, seed)):
            asked = crowd.ask([*headers[number % 2], *prompt], **settings)
            crowd.step()
            if number % 5 == 4:
                crowd.cancel(asked)
        crowd.finish()
        assert all(request.error is None for request in crowd.requests)
        # What is kept for later does not keep the longest sequence out.
        crowd.reply(random_ids(290, seed=99), max_tokens=10)


def test_kept_pasts_go_before_anybody_has_to_wait(own: Running) -> None:
    crowd = Crowd(own, capacity=lambda size: 2 * size.nbytes(128))
    for seed in range(3):
        crowd.reply(random_ids(60, seed=seed), max_tokens=4)
    assert crowd.scheduler.kv.nbytes > crowd.room_nbytes // 2
    one, other = crowd.ask(random_ids(110, seed=8), max_tokens=18), crowd.ask(random_ids(110, seed=9), max_tokens=18)
    crowd.step()
    assert one.cache is not None
    assert other.cache is not None
    crowd.finish()
    assert crowd.scheduler.totals.preemptions == 0


def test_room_that_is_short_is_named_as_the_bound_on_the_batch(own: Running) -> None:
    crowd = Crowd(own, capacity=lambda size: 3 * size.nbytes(64))
    for seed in range(5):
        crowd.ask(random_ids(20, seed=seed), max_tokens=60)
    crowd.step()
    assert crowd.scheduler.running == 3
    assert crowd.scheduler.waiting == 2
    assert crowd.scheduler.size.reason == "the memory for keys and values holds 3"


# --- steps -----------------------------------------------------------------------------------------


def test_a_long_prompt_holds_nobody_up(own: Running) -> None:
    """Short requests that come during a long prefill finish before it has ended."""
    crowd = Crowd(own, step_tokens=32)
    talking = crowd.ask(random_ids(10), max_tokens=100)
    crowd.step()
    long = crowd.ask(random_ids(300, seed=1), max_tokens=5)
    crowd.step()
    short = crowd.ask(random_ids(12, seed=2), max_tokens=3)
    while not short.finished:
        before = talking.generated
        crowd.step()
        assert talking.generated == before + 1, "who decodes gets a token at every step"
    assert long.generated == 0
    assert long.uncomputed > 100
    crowd.finish()
    for request in (talking, long, short):
        settings = {"max_tokens": request.generated}
        assert_same_reply(completion(request), alone(own, request.tokens[: request.prompt_length], **settings))


def test_prompts_under_way_share_what_the_decoding_ones_leave(own: Running) -> None:
    crowd = Crowd(own, step_tokens=32)
    for seed in range(2):
        crowd.ask(random_ids(4, seed), max_tokens=50)
    crowd.step()
    for seed in (5, 6, 7):
        crowd.ask(random_ids(100, seed), max_tokens=1)
    crowd.step()
    assert crowd.steps[-1] == [1, 1, 10, 10, 10]


def test_with_a_large_batch_newcomers_still_get_on(own: Running) -> None:
    """More decode than a step has tokens: a quarter of a step is left to prompts all the same."""
    crowd = Crowd(own, step_tokens=8, limit=12)
    for seed in range(10):
        crowd.ask(random_ids(1, seed), max_tokens=40)
    crowd.step()
    newcomer = crowd.ask(random_ids(20, seed=50), max_tokens=1)
    crowd.step()
    assert crowd.steps[-1] == [1] * 10 + [2]
    for _ in range(9):
        crowd.step()
    assert newcomer.finished


def test_prompts_that_go_whole_go_one_in_a_step_and_all_get_on(zoo: Zoo) -> None:
    """What cannot be run in chunks is longer than a step may be; the others decode meanwhile."""
    with running(zoo("jamba")) as own, quiet_transformers():
        crowd = Crowd(own, step_tokens=16, in_chunks=False)
        talking = crowd.ask([5, 6, 7], max_tokens=30)
        crowd.step()
        long = [crowd.ask(random_ids(40, seed), max_tokens=3) for seed in range(3)]
        for number in range(3):
            crowd.step()
            assert crowd.steps[-1] == [1] * (number + 1) + [40]
        crowd.finish()
        assert talking.generated == 30
        assert [request.generated for request in long] == [3, 3, 3]


def test_a_request_runs_in_as_many_steps_as_it_has_tokens(own: Running) -> None:
    """Nothing is computed twice and no step is empty: a prompt of one chunk, then a token a step."""
    crowd = Crowd(own, step_tokens=64)
    crowd.reply(random_ids(20), max_tokens=10)
    assert crowd.steps == [[20], *[[1]] * 9]
    assert crowd.scheduler.totals.steps == 10
    assert crowd.scheduler.totals.seconds > 0


def test_never_more_run_than_the_limit_and_places_are_filled_at_once(own: Running) -> None:
    crowd = Crowd(own, limit=3)
    for seed in range(7):
        crowd.ask(random_ids(5, seed), max_tokens=2 + seed)
    sizes = []
    while crowd.scheduler.running or crowd.scheduler.waiting:
        waited = crowd.scheduler.waiting
        crowd.step()
        sizes.append(len(crowd.steps[-1]))
        assert sizes[-1] == 3 or waited == 0
    assert max(sizes) == 3


# --- measures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_every_generated_token_counts_in_the_measurement_of_the_batch(max_tokens: int, own: Running) -> None:
    """The last of a reply as well: replies of one token would otherwise never be measured."""
    crowd = Crowd(own, step_tokens=32)
    seen: list[tuple[int, int]] = []
    observe = crowd.scheduler.size.observe

    def noting(running: int, tokens: int, seconds: float) -> None:
        seen.append((running, tokens))
        observe(running, tokens, seconds)

    crowd.scheduler.size.observe = noting  # type: ignore[method-assign]
    for seed in range(4):
        # A step of 8 tokens each leaves one for a step that generates, and no sooner.
        crowd.ask(random_ids(25, seed), max_tokens=max_tokens)
    crowd.finish()
    assert sum(tokens for _, tokens in seen) == crowd.scheduler.totals.tokens_generated == 4 * max_tokens
    assert [running for running, _ in seen] == [len(tokens) for tokens in crowd.steps]


def test_what_the_steps_move_is_divided_among_their_requests(own: Running) -> None:
    crowd = Crowd(own)
    before = own.cache.counters.copy()
    for seed in range(5):
        crowd.ask(random_ids(10 * seed + 2, seed), max_tokens=3 * seed + 1)
    crowd.finish()
    after = own.cache.counters
    timings = [completion(request).timings for request in crowd.requests]
    # Each one's share is rounded.
    assert sum(each.hits for each in timings) == pytest.approx(after.hits - before.hits, abs=3)
    assert sum(each.misses for each in timings) == pytest.approx(after.misses - before.misses, abs=3)
    assert sum(each.bytes_loaded for each in timings) == pytest.approx(after.bytes_loaded - before.bytes_loaded, abs=3)
    for each in timings:
        assert each.wait_seconds >= 0
        assert each.time_to_first_token == pytest.approx(each.wait_seconds + each.prompt_seconds)


def test_who_has_more_tokens_in_a_step_bears_more_of_what_it_moves(zoo: Zoo) -> None:
    with running(zoo("mixtral"), slots=4) as own, quiet_transformers():
        crowd = Crowd(own)
        few, many = (crowd.ask(random_ids(count), max_tokens=1) for count in (10, 30))
        crowd.finish()
        assert len(crowd.steps) == 1
        share = completion(few).timings.bytes_loaded
        assert share > 0
        assert completion(many).timings.bytes_loaded == pytest.approx(3 * share, abs=3)


@pytest.mark.parametrize("capacity", [lambda size: 64 * size.nbytes(512), lambda size: size.nbytes(200)])
def test_requests_are_finished_in_bounded_time_in_an_adversarial_mix(
    capacity: Callable[[KvSize], int], own: Running
) -> None:
    """One that sorts last, while newcomers that sort before it never stop coming: it begins within its patience."""
    crowd = Crowd(own, capacity=capacity, limit=2, patience=6)
    last = crowd.ask([255] * 20, max_tokens=2)
    others = 0
    while last.cache is None and not last.finished:
        crowd.ask([3 + others % 50] * (1 + 37 * (others % 4)), max_tokens=1 + others % 3)
        others += 1
        crowd.step()
        assert others < 40
    begun = sum(request.cache is not None or request.finished for request in crowd.requests)
    assert begun <= 1 + 6 + 1
    crowd.finish()
