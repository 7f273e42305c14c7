"""Experts that have slots, as the cache remembers them and as it lends them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from edgemoe.cache.link import Transfer


class LoadReason(Enum):
    """Why an expert was loaded before any request for it."""

    PREFETCH = "prefetch"
    """It was predicted."""
    FILL = "fill"
    """Its slot was free after start-up."""


@dataclass
class Resident:
    """An expert that has a slot, loaded or in flight."""

    slot: int
    """Its number among all slots of the pool."""
    transfer: Transfer | None
    pins: int = 0
    load_reason: LoadReason | None = None
    """Why it was loaded ahead; None once it was requested."""


@dataclass(frozen=True)
class Loan:
    """Pinned experts of one layer: slot `slots[i]` of its region holds the record of expert `experts[i]`.

    The records may be read: those of `borrow` until its iterator advances or is closed, those of `lend` until its block
    ends.
    """

    experts: tuple[int, ...]
    slots: tuple[int, ...]
