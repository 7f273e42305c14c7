"""Finding shared beginnings: the best past for a prompt is the one that a look at every past would choose."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from edgemoe.plan.kv_size import KvSize
from edgemoe.request.token_key import token_key
from edgemoe.scheduler.kv_budget import KvBudget
from edgemoe.scheduler.prefix_cache import PrefixCache


@dataclass(eq=False)
class FakeCache:
    """Knows how many tokens it has and whether the last of them may be dropped; charged 10 bytes a token."""

    tokens: int
    cuttable: bool = True

    @property
    def capacity(self) -> int:
        return self.tokens

    def can_crop(self) -> bool:
        return self.cuttable


@dataclass
class Known:
    """What the oracle knows of a past: all tokens of its key, and the past."""

    tokens: list[int]
    cache: FakeCache


class FakeBudget(KvBudget):
    """Charges what is kept, as the scheduler does before it gives a cache away."""

    def __init__(self, limit: int = 1 << 30) -> None:
        super().__init__(KvSize(0, ((10, None),)), limit)


def kept_in(prefixes: Any, tokens: list[int], cache: Any) -> None:
    prefixes._budget.charge(cache)
    prefixes.keep(tokens, cache)


def shared(one: list[int], other: list[int]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def usable(prompt: list[int], known: Known) -> int:
    """Tokens of `known` that a request for `prompt` may take over."""
    count = min(shared(prompt, known.tokens), known.cache.tokens, len(prompt) - 1)
    return count if known.cache.cuttable or count == known.cache.tokens else 0


def random_tokens(draw: random.Random, length: int) -> list[int]:
    """Few different tokens, so that much is shared."""
    return [draw.choice([1, 256]) for _ in range(length)]


@pytest.mark.parametrize("seed", range(30))
def test_the_best_match_is_the_one_that_looking_at_all_would_find(seed: int) -> None:
    """Kept pasts of any length, cuttable or not; running ones that are anywhere in their prompts."""
    draw = random.Random(seed)
    prefixes: Any = PrefixCache(FakeBudget(), 5)
    kept = [
        Known(tokens, FakeCache(len(tokens), draw.random() < 0.5))
        for tokens in (random_tokens(draw, draw.randint(1, 9)) for _ in range(5))
    ]
    for known in kept:
        kept_in(prefixes, known.tokens, known.cache)
    running = []
    for number in range(draw.randint(0, 12)):
        prompt = random_tokens(draw, draw.randint(1, 9))
        # A running past may be longer than its prompt, by the reply.
        running.append(Known(prompt, FakeCache(draw.randint(0, len(prompt) + 2), draw.random() < 0.7)))
        prefixes.watch(token_key(prompt), number, running[-1].cache)
    for _ in range(40):
        prompt = random_tokens(draw, draw.randint(1, 10))
        candidates = kept + [known for known in running if known.cache.cuttable]
        most = max(usable(prompt, known) for known in candidates)
        match = prefixes.best(token_key(prompt))
        assert (match.tokens if match else 0) == most
        if match:
            known = next(known for known in candidates if known.cache is match.cache)
            assert usable(prompt, known) == most
            assert (match.prefix is not None) == any(known is each for each in kept)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_coming_is_the_longest_beginning_of_any_running_prompt(seed: int) -> None:
    draw = random.Random(seed)
    prefixes: Any = PrefixCache(FakeBudget(), 5)
    prompts = {number: random_tokens(draw, draw.randint(1, 9)) for number in range(draw.randint(0, 12))}
    for number, prompt in prompts.items():
        prefixes.watch(token_key(prompt), number, FakeCache(0))
    for number in list(prompts)[::3]:
        prefixes.unwatch(token_key(prompts.pop(number)), number)
    for _ in range(40):
        prompt = random_tokens(draw, draw.randint(1, 10))
        most = max((shared(prompt, other) for other in prompts.values()), default=0)
        found = prefixes.coming(token_key(prompt))
        if not most:
            assert found is None
        else:
            number, tokens = found
            assert tokens == most == shared(prompt, prompts[number])


def test_a_prompt_is_never_taken_over_whole() -> None:
    """Its last token's logits start the reply, so that at least one token is left to compute."""
    prefixes: Any = PrefixCache(FakeBudget(), 2)
    kept_in(prefixes, [1, 2, 3, 4, 5], FakeCache(5))
    match = prefixes.best(token_key([1, 2, 3]))
    assert match is not None
    assert match.tokens == 2
    assert prefixes.best(token_key([1])) is None


def test_what_cannot_be_cut_is_taken_over_whole_or_not_at_all() -> None:
    prefixes: Any = PrefixCache(FakeBudget(), 2)
    kept_in(prefixes, [1, 2, 3], FakeCache(3, cuttable=False))
    assert prefixes.best(token_key([1, 2, 3])) is None
    assert prefixes.best(token_key([1, 2, 9, 9])) is None
    match = prefixes.best(token_key([1, 2, 3, 4]))
    assert match is not None
    assert match.tokens == 3


def test_the_reply_of_a_running_request_is_no_beginning_of_another() -> None:
    """Its key is its prompt; what it has generated since is not looked at."""
    prefixes: Any = PrefixCache(FakeBudget(), 2)
    prefixes.watch(token_key([1, 2, 3]), 7, FakeCache(6))
    match = prefixes.best(token_key([1, 2, 3, 4, 5, 6, 7]))
    assert match is not None
    assert (match.tokens, match.prefix) == (3, None)
    prefixes.unwatch(token_key([1, 2, 3]), 7)
    assert prefixes.best(token_key([1, 2, 3, 4])) is None
    assert prefixes.coming(token_key([1, 2, 3, 4])) is None


def test_equal_prompts_are_told_apart_by_their_numbers() -> None:
    prefixes: Any = PrefixCache(FakeBudget(), 2)
    caches = [FakeCache(0), FakeCache(3), FakeCache(1)]
    for number, cache in enumerate(caches):
        prefixes.watch(token_key([5, 5, 5]), number, cache)
    prefixes.unwatch(token_key([5, 5, 5]), 0)
    prefixes.unwatch(token_key([5, 5, 5]), 2)
    match = prefixes.best(token_key([5, 5, 5, 5]))
    assert match is not None
    assert match.cache is caches[1]


def test_the_least_recently_used_entry_is_evicted_first() -> None:
    budget = FakeBudget(limit=100)
    prefixes: Any = PrefixCache(budget, 3)
    for name in (1, 2, 3):
        kept_in(prefixes, [name, name, name], FakeCache(3))
    assert budget.nbytes == 90
    match = prefixes.best(token_key([1, 1, 1, 1]))
    assert match is not None
    prefixes.touch(match.prefix)
    kept_in(prefixes, [4, 4, 4], FakeCache(3))
    assert prefixes.best(token_key([2, 2])) is None, "the oldest, since the first was of use"
    assert budget.nbytes == 90
    assert prefixes.evict_for(10) == [], "that fits"
    assert [each.key for each in prefixes.evict_for(30)] == [token_key([3, 3, 3])]
    assert prefixes.best(token_key([3, 3])) is None
    assert prefixes.best(token_key([1, 1])) is not None
    assert len(prefixes.evict_for(1000)) == 2, "all, although that is not enough"
    assert not budget.fits(1000)
    assert budget.nbytes == 0


def test_what_is_taken_is_gone_and_no_longer_charged() -> None:
    """Of two that are equal only the one that was taken."""
    budget = FakeBudget()
    prefixes: Any = PrefixCache(budget, 3)
    caches = [FakeCache(3), FakeCache(3)]
    for cache in caches:
        kept_in(prefixes, [1, 2, 3], cache)
    match = prefixes.best(token_key([1, 2, 3, 4]))
    assert match is not None
    assert prefixes.take(match.prefix) is match.cache
    assert match.prefix not in prefixes.kept
    assert budget.nbytes == 30
    other = prefixes.best(token_key([1, 2, 3, 4]))
    assert other is not None
    assert other.cache is not match.cache
    prefixes.clear()
    assert budget.nbytes == 0


@pytest.mark.parametrize("error", [MemoryError("none left"), ValueError("wrong")])
def test_a_copy_that_finds_no_memory_is_not_kept(error: Exception) -> None:
    class NoMemory(FakeCache):
        def fork(self, tokens: int, capacity: int) -> FakeCache:
            raise error

    budget = FakeBudget()
    prefixes: Any = PrefixCache(budget, 4)
    if isinstance(error, MemoryError):
        prefixes.keep_copy([1, 2, 3], NoMemory(3))
    else:
        with pytest.raises(ValueError, match="wrong"):
            prefixes.keep_copy([1, 2, 3], NoMemory(3))
    assert prefixes.kept == ()
    assert budget.nbytes == 0
