"""What a token more in a step costs, and what a step for one token each costs, learnt while running."""

from __future__ import annotations

import math
from collections.abc import Callable

FIRST_GUESS = 0.35
"""What one more token costs, as a share of a step's time for each of its sequences, before it was measured or
profiled ..."""
DEAREST_GUESS = 0.6
"""Of which a profile's guess is at most so much, so that what is all but certain is drafted, and so measured."""
GUESS_WEIGHT = 16.0
"""... and how many measured tokens that guess counts for. It comes back slowly where nothing is measured."""
SHARING = 0.25
"""How much faster than the number of sequences that guess falls: with many, most experts are wanted anyway."""
MEMORY = 32.0
"""Plain steps that an average is made of."""
REFRESH = 64
"""Steps with drafts in a row after which a plain one is measured again: what drafts are held against must be known."""
AGAIN = 8
"""Steps after which it is due again, where none could be measured meanwhile."""
NEAR = 1.35
"""Steps for so many times as many sequences, or fewer, tell about steps that were never measured."""
CALM = 2.0
"""A step that took so many times the average, or so much less, counts as this: other programs run too."""


class StepCost:
    """Steps of one token a sequence, for about the same number of sequences, and what more tokens cost there."""

    def __init__(self, guess: float = FIRST_GUESS) -> None:
        """`guess` is what one more token costs, as a share of such a step, before it was measured."""
        self._guess = guess
        self.seconds = 0.0
        """Seconds of such a step; 0 before one was measured."""
        self._warm = False
        self._measured = 0
        self._since = 0
        self._waited = 0.0
        self._more_seconds = 0.0
        self._more_waited = 0.0
        self._more_tokens = 0.0

    @property
    def measured(self) -> bool:
        """Whether what is known is of such steps themselves."""
        return self._measured > 0

    def borrow(self, other: StepCost) -> None:
        """Takes what is known of steps for about as many sequences, until one of its own is measured, which is due."""
        self.seconds, self._waited, self._since = other.seconds, other._waited, REFRESH
        self._more_seconds, self._more_waited = other._more_seconds, other._more_waited
        self._more_tokens = other._more_tokens

    def saw(self, seconds: float, waited: float = 0.0) -> None:
        """A step of one token a sequence, of which it `waited` for the link; the very first one is a warm-up."""
        self._since = 0
        if not self.seconds and not self._warm:
            self._warm = True
            return
        if self._measured:
            seconds = min(max(seconds, self.seconds / CALM), self.seconds * CALM)
        self._measured += 1
        self.seconds += (seconds - self.seconds) / min(self._measured, MEMORY)
        self._waited += (min(waited, seconds) - self._waited) / min(self._measured, MEMORY)
        self._fade(1 / (4 * MEMORY))

    def saw_more(self, tokens: int, seconds: float, waited: float = 0.0) -> None:
        """A step with `tokens` tokens more than that."""
        self._since += 1
        self._fade(tokens / (4 * MEMORY + tokens))
        if seconds < self.seconds:
            # With fewer tokens it would not have taken longer: the first plain steps were disturbed.
            self.seconds += (seconds - self.seconds) / (min(self._measured + 1, MEMORY) if self._measured else MEMORY)
            self._waited = min(self._waited, self.seconds)
        more = min(max(0.0, seconds - self.seconds), CALM * tokens * self.seconds)
        self._more_tokens += tokens
        self._more_seconds += more
        self._more_waited += min(max(0.0, waited - self._waited), more)

    def missed(self) -> None:
        """Such a step could have been made, and was not."""
        self._since += 1

    def is_due(self) -> bool:
        """Whether such a step is due, after many others; asked again, only after a while."""
        due = self._since >= REFRESH
        if due:
            self._since = REFRESH - AGAIN
        return due

    @property
    def token(self) -> float:
        """Seconds that one more token costs."""
        guessed = GUESS_WEIGHT * self._guess * self.seconds
        return (self._more_seconds + guessed) / (self._more_tokens + GUESS_WEIGHT)

    @property
    def computing(self) -> float:
        """What of that is not waiting for the link."""
        guessed = GUESS_WEIGHT * self._guess * (self.seconds - self._waited)
        return (self._more_seconds - self._more_waited + guessed) / (self._more_tokens + GUESS_WEIGHT)

    def _fade(self, share: float) -> None:
        self._more_seconds *= 1 - share
        self._more_waited *= 1 - share
        self._more_tokens *= 1 - share


class CycleCost:
    """Prices drafts in seconds. Steps for few and for many sequences are kept apart."""

    def __init__(self, guess: Callable[[int], float] | None = None) -> None:
        """`guess`, where there is a profile of this machine, tells for so many sequences what one more token costs."""
        self._profiled = guess
        self._plain: dict[int, StepCost] = {}
        self._drafting: dict[int, StepCost] = {}

    def of(self, sequences: int) -> StepCost:
        """What steps for `sequences` cost."""
        size = _about(sequences)
        if size not in self._plain:
            self._plain[size] = StepCost(self._guess(sequences))
        if not self._plain[size].seconds:
            self._borrow(size)
        return self._plain[size]

    def saw_step(self, sequences: int, tokens: int, seconds: float, waited: float = 0.0) -> None:
        """A step took `seconds`, `waited` of them for the link: `sequences` decode, `tokens` are all in it."""
        plain = self.of(sequences)
        if tokens == sequences:
            plain.saw(seconds, waited)
        elif plain.seconds:
            plain.saw_more(tokens - sequences, seconds, waited)

    def _guess(self, sequences: int) -> float:
        if self._profiled is None:
            return FIRST_GUESS / math.pow(sequences, 1 + SHARING)
        return min(self._profiled(sequences), DEAREST_GUESS / sequences)

    def _borrow(self, size: int) -> None:
        """What was measured for the nearest number of sequences holds for `size`, where that is near enough."""
        known = [other for other, plain in self._plain.items() if plain.measured]
        nearest = min(known, key=lambda other: abs(math.log(other / size)), default=None)
        if nearest is not None and max(nearest / size, size / nearest) <= NEAR:
            self._plain[size].borrow(self._plain[nearest])

    def saw_draft(self, sequences: int, seconds: float) -> None:
        """A drafting pass for `sequences` took `seconds`."""
        self._drafting.setdefault(_about(sequences), StepCost()).saw(seconds)

    def draft_pays(self, sequences: int, gain: float) -> bool:
        """Whether a drafting pass for `sequences` that saves `gain` seconds is worth its own.

        It is before one was measured, which is forgotten after a while in which it never seemed to be.
        """
        size = _about(sequences)
        passes = self._drafting.setdefault(size, StepCost())
        if gain < passes.seconds:
            passes.missed()
            if passes.is_due():
                passes = self._drafting[size] = StepCost()
        return gain >= passes.seconds


def _about(sequences: int) -> int:
    """From 8 on, numbers that differ by less than a fifth are one."""
    return sequences if sequences < 8 else int(8 * 2 ** (int(4 * math.log2(sequences / 8)) / 4))
