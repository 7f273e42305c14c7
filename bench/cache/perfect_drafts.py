"""`perfect-drafts`: the loads a token that drafts leave if all of them are right, on recorded routing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.cache.cache_policy import Entries, recorded
from bench.cache.cache_policy import Size as Recording
from bench.measurement import BaseSize, Measurement
from bench.support.policies.trace import misses_by_entry
from edgemoe.cache.eviction.hot_temporal import HotTemporal
from edgemoe.cache.record import ExpertId

NAME = "perfect-drafts"
BAR = "no more loads than without drafts; the ratio is the most that any drafter gains where loads take the time"
DEPTHS = (0, 1, 3, 7)
"""Drafted tokens of each verification."""
SHARES = (0.25, 0.5)


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Held-out questions of each documented task, one at a time, and the longest reply."""

    items: int = 8
    tokens: int = 48


FULL, SMALL = Size(), Size(small=True, items=1, tokens=8)


def run(size: Size = FULL) -> Measurement:
    """Each reply's steps are joined to verifications whose drafts are right and cost nothing. Prompts do not count."""
    replies, experts = recorded("off", Recording(items=size.items, tokens=size.tokens))
    random.Random(0).shuffle(replies)
    found: dict[str, dict[str, Any]] = {}
    for share in SHARES:
        slots = round(share * sum(experts))
        for depth in DEPTHS:
            at = loads(replies, experts, slots, depth)
            found[f"{share:.0%}, {depth} drafted"] = at
            print(f"{share:.0%} cached, {depth} drafted: {at['loads']:.2f} of {at['experts']:.2f} a token", flush=True)
    gains = {}
    for share in SHARES:
        each = [found[f"{share:.0%}, {depth} drafted"]["loads"] for depth in DEPTHS]
        gains[f"{share:.0%}"] = {
            f"{depth} drafted": round(each[0] / own, 3) for depth, own in zip(DEPTHS, each, strict=True)
        }
    ok = all(gain >= 1 for by_depth in gains.values() for gain in by_depth.values())
    return Measurement(NAME, {"fewer_loads": gains}, BAR, ok, {"questions": len(replies), "cells": found})


def loads(replies: Sequence[Entries], experts: Sequence[int], slots: int, depth: int) -> dict[str, float]:
    """Loads, and distinct experts, for each token of the replies after its first, if `depth` tokens are drafted."""
    layers, tokens = len(experts), 0
    trace: Entries = []
    counted: list[bool] = []
    for reply in replies:
        passes = [reply[first : first + layers] for first in range(0, len(reply), layers)]
        # The prompts are shorter than a chunk: each is the first pass of its reply.
        prompt, steps = passes[0], passes[1:]
        verified = [joined(steps[first : first + depth + 1]) for first in range(0, len(steps), depth + 1)]
        decoding = [entry for each in verified for entry in each]
        trace += [*prompt, *decoding]
        counted += [False] * len(prompt) + [True] * len(decoding)
        tokens += len(steps)
    misses = misses_by_entry(trace, HotTemporal(experts), slots)
    loaded = sum(count for count, decodes in zip(misses, counted, strict=True) if decodes)
    distinct = sum(len(entry) for entry, decodes in zip(trace, counted, strict=True) if decodes)
    return {"loads": loaded / tokens, "experts": distinct / tokens}


def joined(steps: Sequence[Entries]) -> Entries:
    """The requests of one pass over the tokens of `steps`: in each layer every expert once, the most used ones last."""
    found = []
    for layer in zip(*steps, strict=True):
        used: Counter[ExpertId] = Counter(expert for entry in layer for expert in entry)
        found.append(sorted(used, key=used.__getitem__))
    return found
