"""What a profile measures at one point: passes of one shape, and what went on around them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProfilePoint:
    """The middle of a few passes that ran `tokens` tokens of each of `batch` sequences. Seconds are of one pass."""

    batch: int
    tokens: int
    """Of each sequence: 1 is a plain step, more a verification."""
    cache_share: float
    """Share of the experts that there were slots for, from 0 to 1."""
    seconds: float
    """Of the pass over the model."""
    experts: float
    """Experts of a layer that the pass asked for, on the average."""
    misses: float
    """Experts of all layers that were asked for and not resident."""
    draft_seconds: float
    """Of looking drafts up for all sequences before the pass; 0 for a plain step."""
    reject_seconds: float
    """Of choosing tokens after it, and of dropping what was drafted in vain, for all sequences."""

    @property
    def total(self) -> int:
        """Tokens of the pass."""
        return self.batch * self.tokens
