"""Which expert leaves when a slot is needed. Every policy here only orders; the cache decides what may go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from edgemoe.cache.record import ExpertId

Evictable = Callable[[ExpertId], bool]
"""Says whether an expert may leave now: it is resident, not pinned and not on the link."""


class EvictionPolicy(ABC):
    """Keeps an order over the resident experts. Not thread-safe: its cache calls it from one thread."""

    def wanted(self, layer: int, experts: Sequence[int]) -> None:  # noqa: B027
        """A pass asks for `experts` of `layer`, distinct, the hottest last. Told once a pass, before all else of it.

        What follows of the same pass (`inserted` and `used`, which may come twice for an expert) is no further wish.
        """

    @abstractmethod
    def inserted(self, expert: ExpertId) -> None:
        """`expert` took a slot. It counts as just used."""

    @abstractmethod
    def used(self, expert: ExpertId) -> None:
        """A resident expert was asked for."""

    @abstractmethod
    def removed(self, expert: ExpertId) -> None:
        """`expert` left its slot."""

    @abstractmethod
    def victim(self, layer: int, evictable: Evictable) -> ExpertId | None:
        """The expert that should leave for one of `layer`, or None when none may. Changes nothing."""

    def heat(self) -> Mapping[ExpertId, float]:
        """How wanted experts have been, more is hotter, resident or not; empty for a policy that does not tell."""
        return {}

    def warm(self, heat: Mapping[ExpertId, float]) -> None:  # noqa: B027
        """Takes over what `heat` gave in an earlier run, before anything is inserted."""
