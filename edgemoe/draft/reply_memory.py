"""What the requests of an engine wrote lately, for all of them to draft from: templates that a session repeats.

SuffixDecoding (Oliaro et al., arXiv 2411.04975) drafts from earlier outputs in this way. Where drafts do not change
replies, which is everywhere but under an expert budget, requests learn nothing of each other but speed.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence

from edgemoe.draft.suffix_automaton import Follower, Match, SuffixAutomaton

MAX_TOKENS = 1 << 16
"""Tokens that are remembered, about 150 bytes each; beyond that half of them go."""
PROMPT_TAIL = 32
"""Last tokens of a prompt that belong to its reply: what the reply begins with is known by them."""


class Reply:
    """A reply that is being written: what of it is remembered, and the state that it stands in."""

    __slots__ = ("state", "tokens")

    def __init__(self) -> None:
        self.tokens = array("q")
        self.state = 0


class ReplyMemory:
    """Replies of all sequences of an engine, those that are being written too. One thread at a time may use it."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._replies: deque[Reply] = deque()
        self._automaton = SuffixAutomaton()
        self._tokens = 0

    def __len__(self) -> int:
        """Tokens that are remembered, the tails of prompts included."""
        return self._tokens

    def begin(self, prompt: Sequence[int]) -> Reply:
        """A reply to `prompt`, still empty."""
        reply = Reply()
        for token in prompt[-PROMPT_TAIL:]:
            self.append(reply, token)
        return reply

    def append(self, reply: Reply, token: int) -> None:
        """Lets a reply grow by a token. Every `Match` from before is void."""
        if self._tokens >= self._max_tokens:
            self._forget_half()
        if not reply.tokens:
            self._replies.append(reply)
        reply.tokens.append(token)
        reply.state = self._automaton.extend(reply.state, token)
        self._tokens += 1

    def match(self, reply: Reply) -> Match:
        """Where `reply` stands; until the next `append` of any."""
        return Match(reply.state, len(reply.tokens))

    def advance(self, match: Match, token: int) -> Match:
        """Where it would stand with `token` drafted after `match`."""
        return self._automaton.advance(match, token)

    def followers(self, match: Match) -> Iterator[Follower]:
        """What followed the match, and its shorter suffixes, in any reply: as `SuffixAutomaton.followers` says."""
        return self._automaton.followers(match)

    def _forget_half(self) -> None:
        """Begins anew with half as much: the replies that began last. One that goes on may lose what it has."""
        room, kept = self._max_tokens // 2, deque[Reply]()
        for reply in reversed(self._replies):
            reply.tokens = reply.tokens[max(0, len(reply.tokens) - room) :]
            room -= len(reply.tokens)
            if reply.tokens:
                kept.appendleft(reply)
            else:
                reply.state = 0
        self._automaton, self._replies, self._tokens = SuffixAutomaton(), kept, sum(len(each.tokens) for each in kept)
        for reply in kept:
            reply.state = 0
            for token in reply.tokens:
                reply.state = self._automaton.extend(reply.state, token)
