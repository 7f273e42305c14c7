"""Smaller steps after one that found no memory."""

from __future__ import annotations

from edgemoe.scheduler.batch_size import BatchSize

MIN_STEP_TOKENS = 16
"""Tokens of the smallest step; fewer free next to nothing."""
STEPS_UNTIL_PLANNED = 256
"""Steps that must go well before they are as large as planned again: another program may have had the memory.

They are twice as many each time when the planned ones find no memory again, since what they ran begins anew: a request
that fits smaller steps only is done in one of these times.
"""
MAX_HALVINGS = 3
"""How often the bounds are halved before the requests of a step fail: reads at the same time lack memory together."""


class MemoryRelief:
    """The bounds of a step: as planned, and halved by each step that finds no memory, until many go well."""

    def __init__(self, size: BatchSize, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        """Most tokens of a step."""
        self._size = size
        self._planned = step_tokens
        self._well = self._halvings = 0
        self._until_planned = STEPS_UNTIL_PLANNED
        self._on_trial = False
        """Whether steps are as large as planned again since not long ago."""

    def tighten(self) -> bool:
        """Halves the bounds. Returns False, and does nothing, where that was done often enough without going well."""
        if self._halvings == MAX_HALVINGS:
            return False
        if self._on_trial:
            self._until_planned *= 2
            self._on_trial = False
        self._halvings += 1
        self._well = 0
        self._size.hold(max(1, self._size.limit // 2))
        self.step_tokens = min(self.step_tokens, max(MIN_STEP_TOKENS, self.step_tokens // 2))
        return True

    def went_well(self) -> None:
        """A step had the memory that it needed."""
        if not (self._halvings or self._on_trial):
            return
        self._well += 1
        if self._well < self._until_planned:
            return
        self._well = 0
        if self._halvings:
            self._halvings, self._on_trial = 0, True
            self.step_tokens = self._planned
            self._size.hold(None)
        else:
            self._on_trial, self._until_planned = False, STEPS_UNTIL_PLANNED
