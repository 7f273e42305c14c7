"""What extra tokens in a step cost, as a curve: the second may cost as much as a step, and the next ones little."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

KNOTS = (1, 2, 3, 7, 15, 31)
"""Extra tokens of a sequence at which the curve is measured: steps of 2, 3, 4, 8, 16 and 32 tokens.

Kernels change with the number of tokens, so that a step's time has jumps and flat stretches between them.
"""
AVERAGE_WEIGHT = 8.0
"""Tokens that the average cost of a token counts for at each knot, until the knot itself has been measured."""


class TokenCurve:
    """Seconds of a step beyond a plain step's, over the extra tokens of each sequence: never falling."""

    def __init__(self) -> None:
        self._seconds = [0.0] * len(KNOTS)
        self._tokens = [0.0] * len(KNOTS)

    def observe(self, extra: float, tokens: int, seconds: float) -> None:
        """`tokens` extra tokens in all, `extra` for each sequence, took `seconds` more than a plain step."""
        place = min(range(len(KNOTS)), key=lambda knot: abs(KNOTS[knot] - extra))
        self._seconds[place] += seconds
        self._tokens[place] += tokens

    def fade(self, share: float) -> None:
        """Takes away a `share` of the weight of what was observed."""
        self._seconds = [each * (1 - share) for each in self._seconds]
        self._tokens = [each * (1 - share) for each in self._tokens]

    def take_over(self, other: TokenCurve) -> None:
        """Replaces what was observed by what `other` has observed."""
        self._seconds, self._tokens = list(other._seconds), list(other._tokens)

    def cost(self, extra: float, average: float) -> float:
        """Seconds of `extra` tokens for one sequence, where a token costs `average` seconds on average."""
        return _between(self._costs(average), extra, average)

    def next_token(self, drafted: int, average: float) -> float:
        """Seconds of one more token after `drafted` ones, if as many more follow as make it cheapest."""
        costs = self._costs(average)
        spent = _between(costs, drafted, average)
        lengths = [drafted + 1, *(knot for knot in KNOTS if knot > drafted + 1)]
        return min((_between(costs, length, average) - spent) / (length - drafted) for length in lengths)

    def _costs(self, average: float) -> list[float]:
        costs, least = [], 0.0
        for knot, seconds, tokens in zip(KNOTS, self._seconds, self._tokens, strict=True):
            each = (seconds + AVERAGE_WEIGHT * average) / (tokens + AVERAGE_WEIGHT)
            least = max(least, knot * each)
            costs.append(least)
        return costs


def _between(costs: Sequence[float], extra: float, average: float) -> float:
    """The cost of `extra` tokens, of those at the knots; beyond the last one a token costs `average`."""
    place = bisect_left(KNOTS, extra)
    if place == len(KNOTS):
        return costs[-1] + (extra - KNOTS[-1]) * average
    below, before = (0.0, 0) if place == 0 else (costs[place - 1], KNOTS[place - 1])
    return below + (costs[place] - below) * (extra - before) / (KNOTS[place] - before)
