"""Copies and cuts of a sequence's past go on like a fresh computation, whatever kind of past a family has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from edgemoe.model.kv_cache import CAPACITY_STEP, SequenceCache, capacity_for
from edgemoe.model.sequential_runner import SequentialRunner
from edgemoe.plan.kv_size import measure_kv
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import Running, Zoo, random_ids, running, spread

PLAIN = ["mixtral", "deepseek_v2"]
WINDOWED = ["qwen2_moe", "gpt_oss"]
"""All layers, or every second, with a window of 6 tokens."""
RECURRENT = ["nemotron_h", "qwen3_next", "minimax", "jamba", "lfm2_moe"]
TOKENS = random_ids(20)
OTHERS = random_ids(6, seed=1)


@pytest.fixture(params=[*PLAIN, *WINDOWED, *RECURRENT])
def own(request: pytest.FixtureRequest, zoo: Zoo) -> Iterator[Running]:
    with running(zoo(request.param)) as loaded, quiet_transformers():
        yield loaded


def after(runner: SequentialRunner, tokens: Sequence[int], capacity: int = 8) -> SequenceCache:
    """The past of `tokens`, computed in one pass."""
    cache = runner.start(capacity)
    runner.step(cache, tokens)
    return cache


def assert_goes_on_after(runner: SequentialRunner, cache: SequenceCache, tokens: Sequence[int]) -> None:
    """Whether `cache` gives what a fresh computation of `tokens` gives, over several further tokens."""
    assert cache.tokens == len(tokens)
    fresh = after(runner, tokens)
    for token in OTHERS:
        expected, found = runner.step(fresh, [token]), runner.step(cache, [token])
        assert (expected - found).abs().max() <= 1e-4 * spread(expected)


def test_a_whole_copy_goes_on_like_the_original_which_it_does_not_touch(own: Running) -> None:
    runner = own.runner()
    cache = after(runner, TOKENS)
    copies = [cache.fork(len(TOKENS), capacity) for capacity in (len(TOKENS), 64)]
    # Each goes its own way before the next is looked at.
    runner.step(copies[0], [99])
    runner.step(cache, [98])
    assert_goes_on_after(runner, copies[1], TOKENS)
    assert_goes_on_after(runner, copies[0], [*TOKENS, 99])
    assert_goes_on_after(runner, cache, [*TOKENS, 98])


def test_a_copy_of_a_copy_outlives_both(own: Running) -> None:
    runner = own.runner()
    cache = after(runner, TOKENS)
    copy = cache.fork(len(TOKENS), 32)
    last = copy.fork(len(TOKENS), 32)
    for other in (cache, copy):
        runner.step(other, [99])
    del cache, copy, other
    assert_goes_on_after(runner, last, TOKENS)


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("kept", [1, 7, 19])
def test_rows_are_copied_and_cut_to_any_length(family: str, kept: int, zoo: Zoo) -> None:
    with running(zoo(family)) as own, quiet_transformers():
        runner = own.runner()
        cache = after(runner, TOKENS)
        assert cache.can_crop()
        assert cache.can_always_crop()
        copy = cache.fork(kept, 64)
        runner.step(cache, [99])
        assert_goes_on_after(runner, copy, TOKENS[:kept])
        cache.crop(kept)
        assert_goes_on_after(runner, cache, TOKENS[:kept])


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("kept", [1, 3, 5])
def test_until_a_window_is_full_it_is_cut_like_rows(family: str, kept: int, zoo: Zoo) -> None:
    with running(zoo(family)) as own, quiet_transformers():
        runner = own.runner()
        cache = after(runner, TOKENS[:5])
        assert cache.can_crop()
        assert not cache.can_always_crop()
        copy = cache.fork(kept, 64)
        assert_goes_on_after(runner, copy, TOKENS[:kept])
        cache.crop(kept)
        assert_goes_on_after(runner, cache, TOKENS[:kept])


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("tokens", [6, 7, 20])
def test_a_window_that_is_full_is_copied_whole_or_not_at_all(family: str, tokens: int, zoo: Zoo) -> None:
    with running(zoo(family)) as own, quiet_transformers():
        runner = own.runner()
        cache = after(runner, TOKENS[:tokens])
        assert not cache.can_crop()
        with pytest.raises(ValueError, match=f"has {tokens} tokens, not {tokens - 1}"):
            cache.fork(tokens - 1, 64)
        assert_goes_on_after(runner, cache.fork(tokens, 64), TOKENS[:tokens])


@pytest.mark.parametrize("family", RECURRENT)
def test_a_state_is_copied_whole_or_not_at_all(family: str, zoo: Zoo) -> None:
    with running(zoo(family)) as own, quiet_transformers():
        cache = after(own.runner(), TOKENS[:3])
        assert not cache.can_crop()
        assert not cache.can_always_crop()
        with pytest.raises(ValueError, match="cannot be cropped has 3 tokens, not 2"):
            cache.fork(2, 64)


def test_a_past_that_was_cut_is_appended_to_in_chunks(zoo: Zoo) -> None:
    with running(zoo("mixtral")) as own, quiet_transformers():
        runner = own.runner()
        cache = after(runner, TOKENS)
        cache.crop(4)
        runner.step(cache, OTHERS)
        assert_goes_on_after(runner, cache, [*TOKENS[:4], *OTHERS])


def held_nbytes(value: Any, seen: set[int]) -> int:
    """Bytes of the memory behind every tensor in `value`, views counted with all that they keep alive."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if isinstance(value, dict):
        return sum(held_nbytes(inner, seen) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return sum(held_nbytes(inner, seen) for inner in value)
    if isinstance(value, (CacheLayerMixin, LinearAttentionCacheLayerMixin)):
        return held_nbytes(vars(value), seen)
    return 0


@pytest.mark.parametrize("length", [4, 40])
@pytest.mark.parametrize("family", [*PLAIN, *WINDOWED, *RECURRENT, "inkling2_text", "deepseek_v4"])
def test_a_copy_holds_no_more_memory_than_it_is_charged_with(family: str, length: int, zoo: Zoo) -> None:
    """A window's rows are views of the last chunk's: a copy of them must not take the chunk along."""
    with running(zoo(family)) as own, quiet_transformers():
        runner = own.runner()
        copy = after(runner, random_ids(length), capacity=length).fork(length, length)
        bookkeeping = 64 * len(copy.kv.layers)
        assert held_nbytes(vars(copy.kv), set()) <= measure_kv(own.blueprint).nbytes(length) + bookkeeping
        assert_goes_on_after(runner, copy, random_ids(length))


def test_growing_stays_within_the_room_that_was_given(zoo: Zoo) -> None:
    with running(zoo("mixtral")) as own, quiet_transformers():
        runner = own.runner()
        size = measure_kv(own.blueprint)
        cache = after(runner, TOKENS, capacity=20)
        for capacity in (22, 22, 40):
            cache.reserve(capacity)
            assert cache.capacity == capacity
            while cache.tokens < capacity:
                runner.step(cache, [5])
            assert held_nbytes(vars(cache.kv), set()) == size.nbytes(capacity)
        cache.reserve(30)
        assert cache.capacity == 40, "what it has buffers for is still charged"


def test_room_is_a_little_more_than_needed_and_never_more_than_the_limit() -> None:
    for tokens in range(1, 600):
        for limit in (tokens, tokens + 1, 600, 10_000):
            capacity = capacity_for(tokens, limit)
            assert tokens <= capacity <= max(tokens, limit)
            assert capacity <= tokens + tokens // 8 + CAPACITY_STEP
            if limit > tokens:
                assert capacity > tokens


def test_a_long_sequence_grows_rarely() -> None:
    capacity, grown = 1, 0
    for tokens in range(1, 100_000):
        if tokens > capacity:
            capacity, grown = capacity_for(tokens, 1_000_000), grown + 1
    assert grown < 70
