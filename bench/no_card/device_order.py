"""`device-order`: random schedules of table patches, copies, evictions and launches on a stand-in for a device.

Layers, cache, slot table and link are the engine's own, as are the launches; a card's streams are two lanes whose work
is done step by step in an order that a seed chooses. It says nothing of a card's speed, and has never run on one.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from bench.measurement import BaseSize, Measurement
from edgemoe.kernels.triton.availability import missing

if TYPE_CHECKING:
    from bench.no_card.stand_in.schedule import Schedule

NAME = "device-order"
BAR = "no read of a slot before its record, none after its reuse"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How many schedules, and the seed of the first one."""

    schedules: int = 100_000
    first: int = 0


FULL, SMALL = Size(), Size(small=True, schedules=400)


def run(size: Size = FULL) -> Measurement:
    """The schedules of `size`, one after the other; the value is how many were checked and how many were faulty."""
    # Read by Triton when it is first imported, here only to queue launches that the stand-in takes.
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        if reason := missing():
            return Measurement(NAME, None, BAR, None, {"why": reason})
        return _measured(size)


def _measured(size: Size) -> Measurement:
    import torch

    from bench.no_card.stand_in.engine import Workshop
    from bench.no_card.stand_in.schedule import Schedule

    began, faulty = time.perf_counter(), 0
    happened: Counter[str] = Counter()
    shortest: Schedule | None = None
    detail: dict[str, Any] = {}
    with closing(Workshop()) as workshop, torch.inference_mode():
        for seed in range(size.first, size.first + size.schedules):
            schedule = Schedule(workshop, seed)
            faults = schedule.run()
            happened.update(schedule.counts())
            faulty += bool(faults)
            if faults and (shortest is None or len(schedule.story) < len(shortest.story)):
                shortest = schedule
                detail["shortest_faulty"] = {"seed": seed, "faults": faults, "story": schedule.story}
    seconds = time.perf_counter() - began
    detail |= {**happened, "seconds": round(seconds, 1), "ms_a_schedule": round(1e3 * seconds / size.schedules, 2)}
    return Measurement(NAME, {"schedules": size.schedules, "faulty": faulty}, BAR, not faulty, detail)
