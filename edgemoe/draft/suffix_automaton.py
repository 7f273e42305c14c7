"""A suffix automaton over tokens, built online: finds earlier occurrences of a text's suffixes."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

NONE, MANY = -1, -2
"""In `_token`: a state without a follower, and one whose followers are in `_branches`. NONE is also no state."""

MAX_LINKS = 32
"""Suffix links that are followed from a match. Only a text of many equal periods has more, and they add nothing."""


class Match(NamedTuple):
    """The longest suffix of a text that occurs in the automaton's text. Valid until the automaton grows."""

    state: int
    """The state of the suffix's occurrences."""
    length: int
    """Tokens of the suffix."""


class Follower(NamedTuple):
    """A token that followed a suffix of a match."""

    token: int
    length: int
    """Tokens of the longest such suffix."""
    sole: bool
    """Whether no other token ever followed that suffix."""
    repeated: bool
    """Whether the token followed that suffix more than once."""


class SuffixAutomaton:
    """The smallest automaton that accepts the suffixes of a text (Blumer et al. 1985), built online.

    A state stands for the substrings that end at the same positions of the text. Its suffix link leads to their longest
    suffix that also ends at other positions. The link of the last state therefore leads to the longest suffix of the
    whole text that occurred earlier; no search is needed. SAM-Decoding (arXiv 2411.10666) speculates with it. There are
    at most two states per token, and with one text `append` takes constant amortised time.

    Nearly all states have one follower, kept in arrays. The others have a dict in the order in which their followers
    were last found, the latest at the end. As in PPM with update exclusion (Moffat 1990), only the longest context that
    already knew a token moves it to the end, which costs no further walk along the links.
    """

    def __init__(self) -> None:
        self._length = array("i", [0])
        self._link = array("i", [-1])
        self._token = array("q", [NONE])
        self._target = array("i", [0])
        self._branches: dict[int, dict[int, int]] = {}
        self._repeated = bytearray(1)
        self._last = 0

    def __len__(self) -> int:
        """Tokens of the text."""
        return self._length[self._last]

    @property
    def states(self) -> int:
        """The number of states, including the empty string's."""
        return len(self._length)

    @property
    def match(self) -> Match:
        """The longest suffix of the text that also occurred earlier in it."""
        state = max(self._link[self._last], 0)
        return Match(state, self._length[state])

    def append(self, token: int) -> None:
        """Appends `token` to the text. Raises ValueError for a negative one."""
        self._last = self.extend(self._last, token)

    def extend(self, text: int, token: int) -> int:
        """Appends `token` to the text with the state `text`, 0 for an empty one, and returns the text's new state.

        Several texts may grow in one automaton, in any order: matches and followers are then those of all texts. The
        returned state stays valid as long as the automaton exists. Raises ValueError for a negative token.
        """
        if token < 0:
            raise ValueError(f"token ids are at least 0, not {token}")
        new = self._add(self._length[text] + 1) if self._target_of(text, token) == NONE else NONE
        state = self._add_follower(text, token, new)
        if state < 0:
            return new
        known = self._target_of(state, token)
        if self._length[known] != self._length[state] + 1:
            known = self._split(state, token, known)
        self._repeated[known] = True
        if new == NONE:
            # Another text begins with the same tokens.
            return known
        self._link[new] = known
        return new

    def advance(self, match: Match, token: int) -> Match:
        """The match of the same text with `token` appended; does not change the automaton."""
        state, length = match
        for _ in range(MAX_LINKS):
            target = self._target_of(state, token)
            if target != NONE:
                return Match(target, length + 1)
            if state == 0:
                return Match(0, 0)
            state = self._link[state]
            length = self._length[state]
        target = self._target_of(0, token)
        return Match(target, 1) if target != NONE else Match(0, 0)

    def followers(self, match: Match) -> Iterator[Follower]:
        """The tokens that followed the match, then those that followed its shorter suffixes; each token once.

        Within one suffix the latest follower comes first. Drafted tokens (`advance`) are not part of the text and
        follow nothing.
        """
        state, length = match
        seen: set[int] = set()
        for _ in range(MAX_LINKS):
            if state == 0:
                break
            for token, target, sole in self._after(state):
                if token not in seen:
                    seen.add(token)
                    yield Follower(token, length, sole, bool(self._repeated[target]))
            state = self._link[state]
            length = self._length[state]

    def _after(self, state: int) -> Iterator[tuple[int, int, bool]]:
        token = self._token[state]
        if token >= 0:
            yield token, self._target[state], True
        elif token == MANY:
            for token, target in reversed(self._branches[state].items()):
                yield token, target, False

    def _add(self, length: int) -> int:
        self._length.append(length)
        self._link.append(0)
        self._token.append(NONE)
        self._target.append(0)
        self._repeated.append(False)
        return len(self._length) - 1

    def _target_of(self, state: int, token: int) -> int:
        held = self._token[state]
        if held == token:
            return self._target[state]
        return self._branches[state].get(token, NONE) if held == MANY else NONE

    def _add_follower(self, state: int, token: int, target: int) -> int:
        """Adds the follower `token`, leading to `target`, to `state` and to its suffixes that do not know it yet.

        Returns the longest of them that already knew the token, or -1.
        """
        while state >= 0:
            held = self._token[state]
            if held == token:
                break
            if held == NONE:
                self._token[state], self._target[state] = token, target
            elif held == MANY:
                branch = self._branches[state]
                if token in branch:
                    branch[token] = branch.pop(token)
                    break
                branch[token] = target
            else:
                self._branches[state] = {held: self._target[state], token: target}
                self._token[state] = MANY
            state = self._link[state]
        return state

    def _split(self, state: int, token: int, known: int) -> int:
        """Splits a state off `known` for its substrings no longer than `state` with `token`; returns the new state.

        Those also end at the text's new end, the longer ones do not.
        """
        new = self._add(self._length[state] + 1)
        self._link[new] = self._link[known]
        self._link[known] = new
        self._token[new], self._target[new] = self._token[known], self._target[known]
        if self._token[known] == MANY:
            self._branches[new] = dict(self._branches[known])
        while state >= 0 and self._target_of(state, token) == known:
            if self._token[state] == MANY:
                self._branches[state][token] = new
            else:
                self._target[state] = new
            state = self._link[state]
        return new
