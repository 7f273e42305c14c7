"""Recorded requests replayed against a policy, and Belady's optimum to compare it with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from edgemoe.cache.policy import EvictionPolicy
from edgemoe.cache.record import ExpertId

Trace = Sequence[Sequence[ExpertId]]
"""One entry a layer pass: the experts it asked for, all of which must be resident together."""


def replay(trace: Trace, policy: EvictionPolicy, slots: int) -> int:
    """The misses that `policy` has on `trace` with `slots` slots. Each entry must fit the slots."""
    resident: set[ExpertId] = set()
    misses = 0
    for wanted in trace:
        needed = set(wanted)
        for expert in wanted:
            if expert in resident:
                policy.used(expert)
                continue
            misses += 1
            if len(resident) >= slots:
                leaving = policy.victim(expert.layer, _outside(needed))
                if leaving is None:
                    raise ValueError(f"an entry of {len(needed)} experts does not fit {slots} slots")
                policy.removed(leaving)
                resident.discard(leaving)
            policy.inserted(expert)
            resident.add(expert)
    return misses


def _outside(needed: set[ExpertId]) -> Callable[[ExpertId], bool]:
    return lambda expert: expert not in needed


def belady_misses(trace: Trace, slots: int) -> int:
    """The fewest misses any policy can have (Belady 1966): evict what is wanted again the latest."""
    wanted_at: dict[ExpertId, list[int]] = defaultdict(list)
    for time, wanted in enumerate(trace):
        for expert in wanted:
            wanted_at[expert].append(time)
    upcoming = {expert: iter(times) for expert, times in wanted_at.items()}
    never = len(trace)
    next_use = {expert: next(times) for expert, times in upcoming.items()}
    resident: set[ExpertId] = set()
    misses = 0
    for wanted in trace:
        needed = set(wanted)
        for expert in needed:
            next_use[expert] = next(upcoming[expert], never)
        for expert in needed - resident:
            misses += 1
            if len(resident) >= slots:
                resident.remove(max(resident - needed, key=next_use.__getitem__))
            resident.add(expert)
    return misses
