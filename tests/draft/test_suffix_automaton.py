"""The suffix automaton agrees with a search through the whole text."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from typing import Any

import pytest

from edgemoe.draft.suffix_automaton import MAX_LINKS, Follower, Match, SuffixAutomaton


def automaton_of(text: list[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    return automaton


def fibonacci(length: int) -> list[int]:
    """The text with most repeated suffixes: all of its prefixes recur."""
    one, other = [0], [0, 1]
    while len(other) < length:
        one, other = other, other + one
    return other[:length]


def copied(draw: random.Random) -> list[int]:
    """A text that copies long parts of itself, with changes."""
    text = [draw.randrange(9) for _ in range(12)]
    while len(text) < 60:
        start = draw.randrange(len(text))
        text += [*text[start : start + draw.randint(1, 14)], draw.randrange(9)]
    return text[:60]


def texts() -> Iterator[list[int]]:
    draw = random.Random(5)
    for letters in (1, 2, 3, 7):
        for length in (0, 1, 2, 5, 17, 40):
            yield [draw.randrange(letters) for _ in range(length)]
    yield from (copied(draw) for _ in range(6))
    yield fibonacci(45)
    yield [0, 1, 2, 3] * 11
    yield [3, 2**31, 2**32 - 1] * 3


TEXTS = list(texts())


def ends(text: list[int], piece: list[int]) -> list[int]:
    """The positions after the occurrences of `piece` in `text`."""
    return [end for end in range(len(piece), len(text) + 1) if text[end - len(piece) : end] == piece]


def suffix(text: list[int], length: int) -> list[int]:
    return text[len(text) - length :]


def longest_earlier(text: list[int]) -> int:
    """The length of the longest suffix that occurred earlier."""
    return next((length for length in range(len(text) - 1, 0, -1) if len(ends(text, suffix(text, length))) > 1), 0)


def longest_within(text: list[int], drafted: list[int]) -> int:
    """The length of the longest suffix of `text` + `drafted` that occurs in `text`."""
    whole = text + drafted
    return next(length for length in range(len(whole) - 1, -1, -1) if ends(text, suffix(whole, length)))


def followed(text: list[int], piece: list[int]) -> list[int]:
    """The tokens after each occurrence of `piece`."""
    return [text[end] for end in ends(text, piece) if end < len(text)]


def followers_by_search(texts: list[list[int]], whole: list[int], longest: int) -> dict[int, Follower]:
    found: dict[int, Follower] = {}
    for length in range(longest, 0, -1):
        tokens = [token for text in texts for token in followed(text, suffix(whole, length))]
        for token in tokens:
            follower = Follower(token, length, len(set(tokens)) == 1, tokens.count(token) > 1)
            found.setdefault(token, follower)
    return found


def check_followers(automaton: SuffixAutomaton, match: Match, texts: list[list[int]], whole: list[int]) -> None:
    """The followers of `match`, the end of `whole`, are those that a search through `texts` finds."""
    told = list(automaton.followers(match))
    assert {follower.token: follower for follower in told} == followers_by_search(texts, whole, match.length)
    assert len({follower.token for follower in told}) == len(told)
    lengths = [follower.length for follower in told]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_match_is_the_longest_suffix_that_occurred_earlier(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for end in range(len(text) + 1):
        so_far = text[:end]
        assert len(automaton) == end
        assert automaton.match.length == longest_earlier(so_far)
        check_followers(automaton, automaton.match, [so_far], so_far)
        if end < len(text):
            automaton.append(text[end])


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_drafted_tokens_are_matched_like_tokens_of_the_text(text: list[int]) -> None:
    draw, automaton = random.Random(len(text)), automaton_of(text)
    for _ in range(8):
        match, drafted = automaton.match, list[int]()
        for _ in range(7):
            likely = [follower.token for follower in automaton.followers(match)][:2]
            drafted.append(draw.choice([*likely, *text[:3], 99]))
            match = automaton.advance(match, drafted[-1])
            assert match.length == longest_within(text, drafted)
            check_followers(automaton, match, [text], text + drafted)


@pytest.mark.parametrize("seed", range(30))
def test_followers_in_several_growing_texts_agree_with_a_search(seed: int) -> None:
    draw, automaton = random.Random(seed), SuffixAutomaton()
    texts: list[list[int]] = [[] for _ in range(draw.randint(2, 4))]
    states = [0] * len(texts)
    for _ in range(60):
        one = draw.randrange(len(texts))
        texts[one].append(draw.randrange(draw.choice((2, 3))))
        states[one] = automaton.extend(states[one], texts[one][-1])
        for state, text in zip(states, texts, strict=True):
            assert automaton._length[state] == len(text)
            check_followers(automaton, Match(state, len(text)), texts, text)


def test_the_latest_follower_comes_first_whichever_text_it_is_in() -> None:
    automaton, one, other = SuffixAutomaton(), 0, 0
    for token in (1, 2):
        one = automaton.extend(one, token)
    for token in (1, 3):
        other = automaton.extend(other, token)
    start = automaton.extend(0, 1)
    assert [follower.token for follower in automaton.followers(Match(start, 1))] == [3, 2]
    automaton.extend(start, 2)
    assert [follower.token for follower in automaton.followers(Match(start, 1))] == [2, 3]


def test_a_token_that_never_occurred_leaves_no_match() -> None:
    automaton = automaton_of([1, 2, 1])
    assert automaton.advance(automaton.match, 5) == Match(0, 0)
    assert list(automaton.followers(Match(0, 0))) == []


def test_an_empty_text_has_no_followers() -> None:
    automaton = SuffixAutomaton()
    assert (len(automaton), automaton.match, automaton.advance(automaton.match, 1)) == (0, Match(0, 0), Match(0, 0))


def test_negative_token_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 0, not -1"):
        SuffixAutomaton().append(-1)


# --- the order of followers ----------------------------------------------------------------------


class LatestFirst:
    """The plain form of the order: a list of followers for every substring, the latest first."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.after: dict[tuple[int, ...], list[int]] = {(): []}

    def append(self, token: int) -> None:
        suffixes = [tuple(suffix(self.text, length)) for length in range(len(self.text), -1, -1)]
        knowing = next((each for each in suffixes if token in self.after.get(each, [])), None)
        for each in suffixes:
            known = self.after.setdefault(each, [])
            if token not in known:
                known.insert(0, token)
            elif knowing is not None and ends(self.text, list(each)) == ends(self.text, list(knowing)):
                known.remove(token)
                known.insert(0, token)
        self.text.append(token)


@pytest.mark.parametrize("letters", [2, 3, 5])
def test_within_one_length_the_latest_follower_comes_first(letters: int) -> None:
    draw = random.Random(letters)
    automaton, rule = SuffixAutomaton(), LatestFirst()
    for _ in range(70):
        for follower in (told := list(automaton.followers(automaton.match))):
            same = [each.token for each in told if each.length == follower.length]
            known = rule.after[tuple(suffix(rule.text, follower.length))]
            assert same == [token for token in known if token in same]
        token = draw.randrange(letters)
        automaton.append(token)
        rule.append(token)


def test_the_latest_follower_comes_first() -> None:
    assert [each.token for each in automaton_of([1, 5, 1, 6, 1, 7, 1]).followers(Match(1, 1))] == [7, 6, 5]
    assert [each.token for each in automaton_of([1, 5, 1, 6, 1, 7, 1, 5, 1]).followers(Match(1, 1))] == [5, 7, 6]


# --- what it costs -------------------------------------------------------------------------------


def content(automaton: SuffixAutomaton) -> list[Any]:
    """Its whole state, the order of dicts included."""
    return [repr(value) for value in vars(automaton).values()]


def test_advance_and_followers_change_nothing() -> None:
    automaton = automaton_of([0, 1, 0, 2, 0, 1, 0, 2, 2, 0, 1])
    before = content(automaton)
    match = automaton.match
    for token in (0, 2, 2, 1, 9, 0):
        assert len(list(automaton.followers(match))) < 4
        match = automaton.advance(match, token)
    assert content(automaton) == before


class CountedReads(array):  # type: ignore[type-arg]
    """Counts the elements that are read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)


def long_texts() -> dict[str, list[int]]:
    draw = random.Random(1)
    half = [draw.randrange(200) for _ in range(10_000)]
    return {
        "one token": [7] * 20_000,
        "two tokens": [draw.randrange(2) for _ in range(20_000)],
        "many tokens": [draw.randrange(5000) for _ in range(20_000)],
        "copied": half + half,
        "periods": [1, 2, 3] * 6_000 + [4] + [2, 3] * 1_000,
        "fibonacci": fibonacci(20_000),
        "most states": [0] + [1] * 19_999,
    }


@pytest.mark.parametrize("name", long_texts())
def test_states_and_steps_are_linear_in_the_text(name: str) -> None:
    text, automaton = long_texts()[name], SuffixAutomaton()
    automaton._link = CountedReads("i", [-1])
    for token in text:
        automaton.append(token)
    assert automaton.states <= 2 * len(text)
    assert automaton._link.reads <= 4 * len(text)
    followers = sum(len(branch) for branch in automaton._branches.values())
    assert automaton.states - len(automaton._branches) + followers <= 3 * len(text)


def test_in_a_text_of_many_periods_few_links_are_followed() -> None:
    automaton = automaton_of([5, 6, *[5] * 400])
    reads = automaton._link = CountedReads("i", automaton._link)
    assert automaton.match.length == 399
    assert {follower.token for follower in automaton.followers(automaton.match)} == {5}
    elsewhere = automaton.advance(automaton.match, 6)
    assert elsewhere.length == 1, "a shorter match than the longest, [5, 6], but one that there is"
    assert [follower.token for follower in automaton.followers(elsewhere)] == [5]
    assert reads.reads <= 3 * MAX_LINKS
