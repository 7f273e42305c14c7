"""The expert cache: records, stores, slots, links and eviction.

This package knows bytes and memory tiers. It does not know tokens, routers, drafts or models.
"""

from __future__ import annotations

from edgemoe.cache.counters import CacheCounters
from edgemoe.cache.eviction.policy import EvictionPolicy
from edgemoe.cache.expert_cache import ExpertCache
from edgemoe.cache.link import Link, Throttle, Transfer
from edgemoe.cache.record import ExpertId, Part, RecordLayout
from edgemoe.cache.resident import Loan
from edgemoe.cache.slot_classes import SlotClass
from edgemoe.cache.slots import SlotPool, SlotRegion
from edgemoe.cache.store import ExpertStore

__all__ = [
    "CacheCounters",
    "EvictionPolicy",
    "ExpertCache",
    "ExpertId",
    "ExpertStore",
    "Link",
    "Loan",
    "Part",
    "RecordLayout",
    "SlotClass",
    "SlotPool",
    "SlotRegion",
    "Throttle",
    "Transfer",
]
