"""Smaller steps after one that found no memory."""

from __future__ import annotations

from edgemoe.scheduler.batch_size import BatchSize

MIN_STEP_TOKENS = 16
"""Tokens of the smallest step; fewer free next to nothing."""
STEPS_UNTIL_PLANNED = 256
"""Steps that must go well before they are as large as planned again: another program may have had the memory."""
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

    def tighten(self) -> bool:
        """Halves the bounds. Returns False, and does nothing, where that was done often enough without going well."""
        if self._halvings == MAX_HALVINGS:
            return False
        self._halvings += 1
        self._well = 0
        self._size.hold(max(1, self._size.limit // 2))
        self.step_tokens = min(self.step_tokens, max(MIN_STEP_TOKENS, self.step_tokens // 2))
        return True

    def went_well(self) -> None:
        """A step had the memory that it needed."""
        if not self._halvings:
            return
        self._well += 1
        if self._well == STEPS_UNTIL_PLANNED:
            self._halvings = 0
            self.step_tokens = self._planned
            self._size.hold(None)
