"""Smaller steps after one that found no memory."""

from __future__ import annotations

from edgemoe.scheduler.batch_size import BatchSize

MIN_STEP_TOKENS = 16
"""Tokens of the smallest step; fewer free next to nothing."""
STEPS_UNTIL_PLANNED = 256
"""Steps that must go well before they are as large as planned again: another program may have had the memory."""


class MemoryRelief:
    """The bounds of a step: as planned, and half of that after a step that found no memory, until many go well."""

    def __init__(self, size: BatchSize, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        """Most tokens of a step."""
        self._size = size
        self._planned = step_tokens
        self._well = STEPS_UNTIL_PLANNED

    def tighten(self) -> bool:
        """Halves the bounds. Returns False, and does nothing, where they are not as planned since the last time."""
        if self._well < STEPS_UNTIL_PLANNED:
            return False
        self._well = 0
        self._size.hold(max(1, self._size.limit // 2))
        self.step_tokens = min(self.step_tokens, max(MIN_STEP_TOKENS, self.step_tokens // 2))
        return True

    def went_well(self) -> None:
        """A step had the memory that it needed."""
        self._well = min(self._well + 1, STEPS_UNTIL_PLANNED)
        if self._well == STEPS_UNTIL_PLANNED and self.step_tokens != self._planned:
            self.step_tokens = self._planned
            self._size.hold(None)
