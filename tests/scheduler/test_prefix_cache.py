"""Finding shared beginnings: the best past for a prompt is the one that a look at every past would choose."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from edgemoe.request.token_key import token_key
from edgemoe.scheduler.prefix_cache import PrefixCache


@dataclass
class FakePast:
    """Knows how many tokens it has and whether the last of them may be forgotten."""

    tokens: int
    cuttable: bool = True

    def can_crop(self) -> bool:
        return self.cuttable


@dataclass
class Known:
    """What the oracle knows of a past: all tokens of its key, and the past."""

    tokens: list[int]
    cache: FakePast


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
    prefixes: Any = PrefixCache(max_kept=5)
    kept = [
        Known(tokens, FakePast(len(tokens), draw.random() < 0.5))
        for tokens in (random_tokens(draw, draw.randint(1, 9)) for _ in range(5))
    ]
    for known in kept:
        prefixes.keep(known.tokens, known.cache, 1)
    running = []
    for number in range(draw.randint(0, 12)):
        prompt = random_tokens(draw, draw.randint(1, 9))
        # A running past may be longer than its prompt, by the reply.
        running.append(Known(prompt, FakePast(draw.randint(0, len(prompt) + 2), draw.random() < 0.7)))
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
            assert (match.kept is not None) == any(known is each for each in kept)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_coming_is_the_longest_beginning_of_any_running_prompt(seed: int) -> None:
    draw = random.Random(seed)
    prefixes: Any = PrefixCache(max_kept=5)
    prompts = {number: random_tokens(draw, draw.randint(1, 9)) for number in range(draw.randint(0, 12))}
    for number, prompt in prompts.items():
        prefixes.watch(token_key(prompt), number, FakePast(0))
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
    prefixes: Any = PrefixCache(2)
    prefixes.keep([1, 2, 3, 4, 5], FakePast(5), 1)
    match = prefixes.best(token_key([1, 2, 3]))
    assert match is not None
    assert match.tokens == 2
    assert prefixes.best(token_key([1])) is None


def test_what_cannot_be_cut_is_taken_over_whole_or_not_at_all() -> None:
    prefixes: Any = PrefixCache(2)
    prefixes.keep([1, 2, 3], FakePast(3, cuttable=False), 1)
    assert prefixes.best(token_key([1, 2, 3])) is None
    assert prefixes.best(token_key([1, 2, 9, 9])) is None
    match = prefixes.best(token_key([1, 2, 3, 4]))
    assert match is not None
    assert match.tokens == 3


def test_the_reply_of_a_running_request_is_no_beginning_of_another() -> None:
    """Its key is its prompt; what it has generated since is not looked at."""
    prefixes: Any = PrefixCache(2)
    prefixes.watch(token_key([1, 2, 3]), 7, FakePast(6))
    match = prefixes.best(token_key([1, 2, 3, 4, 5, 6, 7]))
    assert match is not None
    assert (match.tokens, match.kept) == (3, None)
    prefixes.unwatch(token_key([1, 2, 3]), 7)
    assert prefixes.best(token_key([1, 2, 3, 4])) is None
    assert prefixes.coming(token_key([1, 2, 3, 4])) is None


def test_equal_prompts_are_told_apart_by_their_numbers() -> None:
    prefixes: Any = PrefixCache(2)
    caches = [FakePast(0), FakePast(3), FakePast(1)]
    for number, cache in enumerate(caches):
        prefixes.watch(token_key([5, 5, 5]), number, cache)
    prefixes.unwatch(token_key([5, 5, 5]), 0)
    prefixes.unwatch(token_key([5, 5, 5]), 2)
    match = prefixes.best(token_key([5, 5, 5, 5]))
    assert match is not None
    assert match.cache is caches[1]


def test_the_past_that_was_of_no_use_for_longest_goes_first() -> None:
    prefixes: Any = PrefixCache(3)
    for name in (1, 2, 3):
        prefixes.keep([name, name, name], FakePast(3), 10 * name)
    assert prefixes.nbytes == 60
    match = prefixes.best(token_key([1, 1, 1, 1]))
    assert match is not None
    prefixes.touch(match.kept)
    prefixes.keep([4, 4, 4], FakePast(3), 40)
    assert prefixes.best(token_key([2, 2])) is None, "the oldest, since the first was of use"
    assert prefixes.nbytes == 80
    assert prefixes.drop_oldest()
    assert prefixes.best(token_key([3, 3])) is None
    assert prefixes.best(token_key([1, 1])) is not None
    assert prefixes.drop_oldest()
    assert prefixes.drop_oldest()
    assert not prefixes.drop_oldest()
    assert prefixes.nbytes == 0


def test_what_is_taken_is_gone_and_no_longer_charged() -> None:
    """Of two that are equal only the one that was taken."""
    prefixes: Any = PrefixCache(3)
    caches = [FakePast(3), FakePast(3)]
    for cache in caches:
        prefixes.keep([1, 2, 3], cache, 10)
    match = prefixes.best(token_key([1, 2, 3, 4]))
    assert match is not None
    assert prefixes.owns(match.kept)
    prefixes.take(match.kept)
    assert not prefixes.owns(match.kept)
    assert prefixes.nbytes == 10
    other = prefixes.best(token_key([1, 2, 3, 4]))
    assert other is not None
    assert other.cache is not match.cache
