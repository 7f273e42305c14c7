"""Recorded requests replayed against a policy, and Belady's optimum to compare it with."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

from edgemoe.cache.policy import EvictionPolicy
from edgemoe.cache.record import ExpertId

Trace = Sequence[Sequence[ExpertId]]
"""One entry a layer pass: the experts of one layer that it asked for, distinct, the hottest last.

What an entry names must be resident together, if it fits the slots. A larger one, such as a long prompt's, passes
through them: what is resident when it begins is a hit, and the others take turns.
"""


def replay(trace: Trace, policy: EvictionPolicy, slots: int) -> int:
    """The misses that `policy` has on `trace` with `slots` slots, told what `ExpertCache` tells it."""
    resident: set[ExpertId] = set()
    misses = 0
    for wanted in trace:
        if not wanted:
            continue
        policy.wanted(wanted[0].layer, [expert.number for expert in wanted])
        together = set(wanted) if len(wanted) <= slots else set()
        missing = [expert for expert in wanted if expert not in resident]
        misses += len(missing)
        for expert in wanted:
            if expert in resident:
                policy.used(expert)
        for expert in missing:
            if len(resident) >= slots:
                leaving = policy.victim(expert.layer, _outside(together))
                assert leaving is not None, "something that is not needed must be resident"
                policy.removed(leaving)
                resident.discard(leaving)
            policy.inserted(expert)
            resident.add(expert)
        for expert in wanted:
            if expert in resident:
                policy.used(expert)
    return misses


def _outside(needed: Collection[ExpertId]) -> Callable[[ExpertId], bool]:
    return lambda expert: expert not in needed


def belady_misses(trace: Trace, slots: int) -> int:
    """The fewest misses any policy can have (Belady 1966): evict what is wanted again the latest.

    After an entry that does not fit, it keeps the best of what was resident and what passed through, as if the slot
    of the last one were free at once: no policy can do better, and none quite as well.
    """
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
        misses += len(needed - resident)
        resident |= needed
        candidates = resident - needed if len(needed) <= slots else resident
        leaving = heapq.nlargest(len(resident) - slots, candidates, key=next_use.__getitem__)
        resident.difference_update(leaving)
    return misses
