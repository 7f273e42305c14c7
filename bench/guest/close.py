"""`close`: memory, threads and files after engines that were closed, and after engines that were dropped."""

from __future__ import annotations

import gc
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.checkpoints import SMALL_FACTOR, inflated
from bench.support.faults import open_files, own_threads
from edgemoe import Engine, Sampling
from edgemoe.config import MIB

NAME = "close"
BAR = "after 20 engines within 50 MiB of the first; threads and files as before"
WAIT_SECONDS = 20.0
SETTINGS: dict[str, Any] = {"device": "cpu", "state_folder": "none", "context": 1024, "batch": 2}


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Engines, and how wide the experts are."""

    factor: int = 32
    engines: int = 20


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, engines=4)


def run(size: Size = FULL) -> Measurement:
    """Loads, generates, and closes or drops in turn. The first two are not counted: libraries keep memory of theirs."""
    model = inflated(size.factor)
    for number in range(2):
        _use(model, closes=number == 0)
    first, threads, files = resident_nbytes(), own_threads(), open_files()
    memory = []
    for number in range(size.engines):
        _use(model, closes=number % 2 == 0)
        memory.append(resident_nbytes())
    left = {"threads": len(own_threads()) - len(threads), "files": open_files() - files}
    grown = round((memory[-1] - first) / MIB, 1)
    value = {"grown_mib": grown, **left}
    detail = {"engines": size.engines, "first_mib": first // MIB, "mib": [each // MIB for each in memory]}
    return Measurement(NAME, value, BAR, grown <= 50 and not any(left.values()), detail)


def resident_nbytes() -> int:
    """Bytes of memory that this process holds, its shared libraries included; Linux alone tells."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _use(model: Path, *, closes: bool) -> None:
    engine = Engine.load(model, **SETTINGS)
    engine.generate("What is 48 + 31?", Sampling(max_tokens=8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        if closes:
            engine.close()
        del engine
        gc.collect()
    end = time.monotonic() + WAIT_SECONDS
    while own_threads() and time.monotonic() < end:
        time.sleep(0.01)
