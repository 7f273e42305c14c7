"""The interface of eviction policies. A policy ranks experts; the cache decides which of them may be evicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from edgemoe.cache.record import ExpertId

Evictable = Callable[[ExpertId], bool]
"""Whether an expert may be evicted now: it is neither pinned nor in flight, and its slot fits what needs one."""


class EvictionPolicy(ABC):
    """Ranks the experts that have slots. Not thread-safe: the cache calls it from one thread."""

    def requested(self, layer: int, experts: Sequence[int]) -> None:  # noqa: B027
        """A pass requests `experts` of `layer`: distinct, the hottest last.

        The cache calls this once per pass of a layer, before `inserted` and `used`. These two may come more than once
        for the same expert, and count as no further request.
        """

    @abstractmethod
    def inserted(self, expert: ExpertId) -> None:
        """`expert` was assigned a slot. It counts as just used."""

    @abstractmethod
    def used(self, expert: ExpertId) -> None:
        """`expert`, which has a slot, was used."""

    @abstractmethod
    def removed(self, expert: ExpertId) -> None:
        """`expert` lost its slot."""

    @abstractmethod
    def victim(self, layer: int, evictable: Evictable) -> ExpertId | None:
        """The expert to evict for one of `layer`, or None when none is evictable. Does not change the policy."""

    def heat(self) -> Mapping[ExpertId, float]:
        """The heat of each expert, resident or not; more is hotter. Empty for a policy without heat."""
        return {}

    def warm(self, heat: Mapping[ExpertId, float]) -> None:  # noqa: B027
        """Starts from the `heat` of an earlier run. To be called before the first insertion."""
