"""`give-back`: another process takes memory in steps; the expert cache gives it up, and takes it again afterwards."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.measurement import BaseSize, Measurement
from bench.support.checkpoints import SMALL_FACTOR, inflated
from edgemoe import Engine, Sampling
from edgemoe.config import MIB, EngineConfig
from edgemoe.plan.machine import ram_free

NAME = "give-back"
BAR = "the cache shrinks, what is kept free is free again within 5 s of each step, and it grows back; exact output"
HOG = "import sys\nheld = []\nfor line in sys.stdin:\n    held.append(b'x' * int(line))\n    print(flush=True)\n"
"""Takes as many bytes as each line says, and keeps them."""
SETTLED_SECONDS = 5.0
GROWN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How wide the experts are, and what the other process takes, in MiB."""

    factor: int = 32
    steps: int = 6
    step_mib: int = 150
    settle_seconds: float = SETTLED_SECONDS


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, steps=2, step_mib=1, settle_seconds=1.2)


def run(size: Size = FULL) -> Measurement:
    """Replies go on; what must stay free is what is free with the model loaded, less half of the cache."""
    sampling = Sampling(temperature=0, max_tokens=48, ignore_eos=True)
    with Engine.load(inflated(size.factor), device="cpu", state_folder="none", keep_free="off") as engine:
        expected = engine.generate("Once upon a time", sampling).token_ids
        whole = engine.plan.slots
        # It grows back to the whole while a quarter of it is free beyond that (MemoryKeeper); the rest is for others.
        keep = ram_free() - engine.plan.cache_nbytes // 2
    wrong, rows = 0, []
    config = EngineConfig(expert_cache="100%", device="cpu", state_folder="none", keep_free=keep)
    with Engine.load(inflated(size.factor), config) as engine, _hog() as other:
        wrong += engine.generate("Once upon a time", sampling).token_ids != expected
        for step in range(size.steps):
            _take(other, size.step_mib * MIB)
            end = time.monotonic() + size.settle_seconds
            while time.monotonic() < end:
                wrong += engine.generate("Once upon a time", sampling).token_ids != expected
            rows.append({"slots": engine.plan.slots, "short_mib": round(max(0, keep - ram_free()) / MIB)})
            print(f"step {step + 1}: {rows[-1]['slots']} of {whole} slots, {rows[-1]['short_mib']} MiB short")
        other.kill()
        other.wait()
        seconds = _grown(engine, whole, 1.0 if size.small else GROWN_SECONDS)
        wrong += engine.generate("Once upon a time", sampling).token_ids != expected
        least = len(engine.plan.slot_classes)
    shrinks = rows[-1]["slots"] < whole and all(row["short_mib"] == 0 or row["slots"] == least for row in rows)
    value = {"steps": rows, "grown_after_seconds": seconds, "wrong_replies": wrong}
    return Measurement(NAME, value, BAR, shrinks and seconds is not None and not wrong, {"slots": whole})


def _grown(engine: Engine, whole: int, limit: float) -> float | None:
    """Seconds until all slots are used again; None where they are not after `limit`."""
    started = time.monotonic()
    while time.monotonic() < started + limit:
        if engine.plan.slots == whole:
            return round(time.monotonic() - started, 1)
        time.sleep(0.1)
    return None


@contextmanager
def _hog() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            yield other
        finally:
            other.kill()


def _take(other: subprocess.Popen[str], nbytes: int) -> None:
    assert other.stdin is not None
    assert other.stdout is not None
    other.stdin.write(f"{nbytes}\n")
    other.stdin.flush()
    other.stdout.readline()
