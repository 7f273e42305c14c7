"""Where a text repeats itself: its suffix automaton, which grows by a token at a time."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

NOTHING, SEVERAL = -1, -2
"""What `_token` has for a state with no follower, and for one whose followers are in `_branches`."""

FURTHEST = 32
"""Suffix links that are followed from a match; a text of many equal periods alone has more, and they tell nothing."""


class Match(NamedTuple):
    """The longest suffix of a text that occurs in the automaton's: the state of its occurrences, and its length.

    It holds until the automaton grows.
    """

    state: int
    length: int


class Follower(NamedTuple):
    """A token that followed a suffix of a match."""

    token: int
    length: int
    """Of the longest such suffix."""
    sole: bool
    """Whether nothing else ever followed that suffix."""
    repeated: bool
    """Whether it followed that suffix more than once."""


class SuffixAutomaton:
    """The smallest automaton that accepts the suffixes of a text (Blumer et al. 1985), built online.

    A state stands for the substrings that end at the same places of the text. Its suffix link leads to the longest
    suffix of these that ends elsewhere too, so the longest suffix of the whole text that also occurred earlier is
    where the last state's link leads: nothing has to be searched. Speculation with it is SAM-Decoding's
    (arXiv 2411.10666). There are at most two states a token, and with one text `append` takes constant time, amortised.

    Nearly all states have one follower, which lies in arrays; the others have a dict, the token that was last found
    to follow at its end. As in PPM with update exclusion (Moffat 1990), a token moves there in the longest context
    that knew it alone: that is free of further walks, and what is predicted from longer contexts says nothing
    of shorter ones.
    """

    def __init__(self) -> None:
        self._length = array("i", [0])
        self._link = array("i", [-1])
        self._token = array("q", [NOTHING])
        self._target = array("i", [0])
        self._branches: dict[int, dict[int, int]] = {}
        self._repeated = bytearray(1)
        self._last = 0

    def __len__(self) -> int:
        """Tokens of the text."""
        return self._length[self._last]

    @property
    def states(self) -> int:
        """States, the one of the empty string included."""
        return len(self._length)

    @property
    def match(self) -> Match:
        """The longest suffix of the text that also ended before the text's end."""
        state = max(self._link[self._last], 0)
        return Match(state, self._length[state])

    def append(self, token: int) -> None:
        """Lets the text grow by a token."""
        self._last = self.extend(self._last, token)

    def extend(self, text: int, token: int) -> int:
        """The state of a whole text with `token` after it; `text` is the state without it, 0 for an empty one.

        So several texts may grow in turns in one automaton: what is told is then of all of them. Their states hold
        as long as the automaton does.
        """
        if token < 0:
            raise ValueError(f"token ids are at least 0, not {token}")
        new = self._add(self._length[text] + 1) if self._step(text, token) == NOTHING else NOTHING
        state = self._teach(text, token, new)
        if state < 0:
            return new
        known = self._step(state, token)
        if self._length[known] != self._length[state] + 1:
            known = self._split(state, token, known)
        self._repeated[known] = True
        if new == NOTHING:
            # Another text began with the same.
            return known
        self._link[new] = known
        return new

    def advance(self, match: Match, token: int) -> Match:
        """The match of the same text with `token` after it; the automaton stays as it is."""
        state, length = match
        for _ in range(FURTHEST):
            target = self._step(state, token)
            if target != NOTHING:
                return Match(target, length + 1)
            if state == 0:
                return Match(0, 0)
            state = self._link[state]
            length = self._length[state]
        target = self._step(0, token)
        return Match(target, 1) if target != NOTHING else Match(0, 0)

    def followers(self, match: Match) -> Iterator[Follower]:
        """What followed the match and, after that, its shorter suffixes: each token once, the latest found first.

        What is drafted after the text is no part of it, so nothing follows a match with the text's own end alone.
        """
        state, length = match
        told: set[int] = set()
        for _ in range(FURTHEST):
            if state == 0:
                break
            for token, target, sole in self._after(state):
                if token not in told:
                    told.add(token)
                    yield Follower(token, length, sole, bool(self._repeated[target]))
            state = self._link[state]
            length = self._length[state]

    def _after(self, state: int) -> Iterator[tuple[int, int, bool]]:
        token = self._token[state]
        if token >= 0:
            yield token, self._target[state], True
        elif token == SEVERAL:
            for token, target in reversed(self._branches[state].items()):
                yield token, target, False

    def _add(self, length: int) -> int:
        self._length.append(length)
        self._link.append(0)
        self._token.append(NOTHING)
        self._target.append(0)
        self._repeated.append(False)
        return len(self._length) - 1

    def _step(self, state: int, token: int) -> int:
        held = self._token[state]
        if held == token:
            return self._target[state]
        return self._branches[state].get(token, NOTHING) if held == SEVERAL else NOTHING

    def _teach(self, state: int, token: int, target: int) -> int:
        """The text of `state`, and its suffixes, are now followed by `token`; the first state that knew it, or -1."""
        while state >= 0:
            held = self._token[state]
            if held == token:
                break
            if held == NOTHING:
                self._token[state], self._target[state] = token, target
            elif held == SEVERAL:
                branch = self._branches[state]
                if token in branch:
                    branch[token] = branch.pop(token)
                    break
                branch[token] = target
            else:
                self._branches[state] = {held: self._target[state], token: target}
                self._token[state] = SEVERAL
            state = self._link[state]
        return state

    def _split(self, state: int, token: int, known: int) -> int:
        """A state for those of `known` that are no longer than `state` and `token`: they end at the new end too."""
        new = self._add(self._length[state] + 1)
        self._link[new] = self._link[known]
        self._link[known] = new
        self._token[new], self._target[new] = self._token[known], self._target[known]
        if self._token[known] == SEVERAL:
            self._branches[new] = dict(self._branches[known])
        while state >= 0 and self._step(state, token) == known:
            if self._token[state] == SEVERAL:
                self._branches[state][token] = new
            else:
                self._target[state] = new
            state = self._link[state]
        return new
