"""Which rule self-drafts follow: the one that makes most tokens a second on this model and machine."""

from __future__ import annotations

from collections.abc import Sequence

TRIES = 6
"""Cycles of each rule before one is preferred."""
ANOTHER_EVERY = 48
"""Cycles after which another rule has a turn, since text and resident experts change."""
NEWEST = 0.1
"""Weight of the newest cycle in a rule's tokens and seconds."""


class RuleChoice:
    """Takes turns between rules until each was measured, then mostly the best."""

    def __init__(self, rules: Sequence[str]) -> None:
        self._rules = list(rules)
        self._cycles = dict.fromkeys(rules, 0)
        self._tokens = dict.fromkeys(rules, 0.0)
        self._seconds = dict.fromkeys(rules, 0.0)
        self._turns = 0

    def next(self) -> str:
        """The rule of the next cycle."""
        self._turns += 1
        fewest = min(self._rules, key=lambda rule: self._cycles[rule])
        if self._cycles[fewest] < TRIES or self._turns % ANOTHER_EVERY == 0:
            return fewest
        return self.best

    @property
    def best(self) -> str:
        """The rule that has made most tokens a second so far; the first before anything was measured."""
        return max(self._rules, key=lambda rule: self._tokens[rule] / self._seconds[rule] if self._seconds[rule] else 0)

    def saw(self, rule: str, tokens: int, seconds: float) -> None:
        """A cycle by `rule` gave `tokens` in `seconds`, draft and verification."""
        self._cycles[rule] += 1
        share = max(NEWEST, 1 / self._cycles[rule])
        self._tokens[rule] += share * (tokens - self._tokens[rule])
        self._seconds[rule] += share * (seconds - self._seconds[rule])
