"""The number of sequences decoded together: as configured, or as many as give more tokens a second."""

from __future__ import annotations

from dataclasses import dataclass

START = 4
"""Sequences; the first size that "auto" measures."""
GAIN = 1.05
"""A larger batch must make at least this many times the tokens a second, or the smaller one stays."""
STEPS = 8
"""Fewest steps of a measurement, in which each sequence must also get two tokens."""
STEPS_BETWEEN_TRIALS = 512
"""Steps after which a settled size is put to the test again, since texts and what is cached change."""


@dataclass
class _Window:
    """A measurement under way."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class BatchSize:
    """The limit on sequences that run at once. `most` bounds it; "auto" climbs by doubling while that pays.

    Measured is generated tokens a second over steps with a full batch, prefills of newcomers included. The
    steps in which the batch fills up after a change are left out.
    """

    def __init__(self, most: int, *, automatic: bool) -> None:
        self.limit = min(START, most) if automatic else most
        self.reason = "not measured yet" if automatic else "as asked for"
        self._most = self._planned = most
        self._held: tuple[int, str] | None = None
        self._automatic = automatic
        self._climbing = automatic
        self._smaller: tuple[int, float] | None = None
        self._window: _Window | None = None
        self._settled_steps = 0

    def observe(self, running: int, tokens: int, seconds: float) -> None:
        """Records a step: sequences that ran, tokens generated, and its seconds."""
        if not self._automatic:
            return
        if not self._climbing:
            self._rest()
        elif running == self.limit:
            self._measure(tokens, seconds)

    def held_back(self, running: int) -> None:
        """Records that the KV budget held no more than the `running` sequences."""
        if running < self.limit:
            self.reason = f"the memory for keys and values holds {running}"

    def hold(self, limit: int | None) -> None:
        """Bounds the size by `limit`, since a step of more found no memory; None lifts the bound again."""
        if limit is None:
            if self._held is not None:
                self.limit, self.reason = self._held
            self._most, self._held = self._planned, None
            return
        self._held = self._held or (self.limit, self.reason)
        self._most = self.limit = limit
        self.reason = "a step of more found no memory"
        self._window = self._smaller = None

    def _measure(self, tokens: int, seconds: float) -> None:
        if self._window is None:
            # The step that filled the batch up was mostly prefill.
            self._window = _Window()
            return
        window = self._window
        window.steps += 1
        window.tokens += tokens
        window.seconds += seconds
        if window.steps >= STEPS and window.tokens >= 2 * self.limit:
            self._window = None
            self._decide(window.tokens / window.seconds)

    def _decide(self, rate: float) -> None:
        """Doubles the size, or settles on the better one of this size and the last."""
        if self._smaller is not None and rate < GAIN * self._smaller[1]:
            size, before = self._smaller
            self._settle(size, f"{size} made {before:.1f} tokens/s, {self.limit} made {rate:.1f}")
        elif self.limit >= self._most:
            self._settle(self.limit, f"{self.limit} made {rate:.1f} tokens/s and are the most allowed")
        else:
            self.reason = f"{self.limit} made {rate:.1f} tokens/s, more are being tried"
            self._smaller = self.limit, rate
            self.limit = min(2 * self.limit, self._most)

    def _settle(self, limit: int, reason: str) -> None:
        self.limit, self.reason = limit, reason
        self._climbing, self._smaller, self._settled_steps = False, None, 0

    def _rest(self) -> None:
        """Counts the steps of a settled size, after which half and double are measured again."""
        self._settled_steps += 1
        if self._settled_steps >= STEPS_BETWEEN_TRIALS:
            self._climbing, self._window = True, None
            self.limit = max(min(START, self._most), self.limit // 2)
