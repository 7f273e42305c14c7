"""Replays recorded traces against eviction policies, and Belady's optimum to compare them with."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

from edgemoe.cache.eviction.policy import EvictionPolicy
from edgemoe.cache.record import ExpertId

Trace = Sequence[Sequence[ExpertId]]
"""One request per entry: the distinct experts that a pass used in one layer, the hottest last.

The experts of an entry must be resident together if they fit into the slots. Those of a larger entry, such as a long
prompt's, stream through the slots: experts that are resident at its start are hits, and the misses replace one another.
"""


def replay(trace: Trace, policy: EvictionPolicy, slots: int) -> int:
    """The misses of `policy` on `trace` with `slots` slots. Calls the policy as `ExpertCache` does."""
    return sum(misses_by_entry(trace, policy, slots))


def misses_by_entry(trace: Trace, policy: EvictionPolicy, slots: int) -> list[int]:
    """As `replay`, for each entry of `trace`."""
    resident: set[ExpertId] = set()
    misses = []
    for requested in trace:
        if not requested:
            misses.append(0)
            continue
        policy.requested(requested[0].layer, [expert.number for expert in requested])
        pinned = set(requested) if len(requested) <= slots else set()
        missing = [expert for expert in requested if expert not in resident]
        misses.append(len(missing))
        for expert in requested:
            if expert in resident:
                policy.used(expert)
        for expert in missing:
            if len(resident) >= slots:
                victim = policy.victim(expert.layer, _outside(pinned))
                assert victim is not None, "an expert that is not pinned must be resident"
                policy.removed(victim)
                resident.discard(victim)
            policy.inserted(expert)
            resident.add(expert)
        for expert in requested:
            if expert in resident:
                policy.used(expert)
    return misses


def _outside(pinned: Collection[ExpertId]) -> Callable[[ExpertId], bool]:
    return lambda expert: expert not in pinned


def belady_misses(trace: Trace, slots: int) -> int:
    """The minimum number of misses of any policy (Belady 1966), which evicts the expert with the latest next use.

    After an entry that does not fit, it keeps the best of all experts that were resident or streamed through, as if the
    last one's slot were free at once. So the result is a lower bound that no policy quite reaches.
    """
    uses: dict[ExpertId, list[int]] = defaultdict(list)
    for time, requested in enumerate(trace):
        for expert in requested:
            uses[expert].append(time)
    upcoming = {expert: iter(times) for expert, times in uses.items()}
    never = len(trace)
    next_use = {expert: next(times) for expert, times in upcoming.items()}
    resident: set[ExpertId] = set()
    misses = 0
    for requested in trace:
        needed = set(requested)
        for expert in needed:
            next_use[expert] = next(upcoming[expert], never)
        misses += len(needed - resident)
        resident |= needed
        candidates = resident - needed if len(needed) <= slots else resident
        victims = heapq.nlargest(len(resident) - slots, candidates, key=next_use.__getitem__)
        resident.difference_update(victims)
    return misses
