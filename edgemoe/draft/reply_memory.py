"""The latest replies of an engine's requests, for all requests to draft from.

SuffixDecoding (Oliaro et al., arXiv 2411.04975) drafts from earlier outputs in this way. Except under an expert budget
drafts do not change replies, so one request affects no more than the speed of another.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence

from edgemoe.draft.suffix_automaton import Follower, Match, SuffixAutomaton

MAX_TOKENS = 1 << 16
"""Cap on the tokens in memory, about 150 bytes each. When it is reached, half of them are dropped."""
PROMPT_TAIL = 32
"""Last tokens of the prompt that are kept with its reply, so that the reply's first tokens can be matched."""


class Reply:
    """A reply in the memory: its tokens there, with the prompt's tail, and its state in the suffix automaton."""

    __slots__ = ("state", "tokens")

    def __init__(self) -> None:
        self.tokens = array("q")
        self.state = 0


class ReplyMemory:
    """The replies of all sequences of an engine, unfinished ones included. One thread at a time may use it."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._replies: deque[Reply] = deque()
        self._automaton = SuffixAutomaton()
        self._tokens = 0

    def __len__(self) -> int:
        """Tokens in memory, the tails of prompts included."""
        return self._tokens

    def begin(self, prompt: Sequence[int]) -> Reply:
        """Adds an empty reply to `prompt`."""
        reply = Reply()
        for token in prompt[-PROMPT_TAIL:]:
            self.append(reply, token)
        return reply

    def append(self, reply: Reply, token: int) -> None:
        """Appends `token` to `reply`. Invalidates every `Match`."""
        if self._tokens >= self._max_tokens:
            self._forget_half()
        if not reply.tokens:
            self._replies.append(reply)
        reply.tokens.append(token)
        reply.state = self._automaton.extend(reply.state, token)
        self._tokens += 1

    def match(self, reply: Reply) -> Match:
        """The match of the whole of `reply`; valid until the next `append` to any reply."""
        return Match(reply.state, len(reply.tokens))

    def advance(self, match: Match, token: int) -> Match:
        """The match with `token` drafted after `match`."""
        return self._automaton.advance(match, token)

    def followers(self, match: Match) -> Iterator[Follower]:
        """The tokens that followed the match and its shorter suffixes in any reply: see `SuffixAutomaton.followers`."""
        return self._automaton.followers(match)

    def _forget_half(self) -> None:
        """Rebuilds the memory with the replies that began last, half of the tokens. Unfinished ones may be dropped."""
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
