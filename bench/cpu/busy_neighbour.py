"""`busy-neighbour`: a long prompt beside one other process that is always busy, against the same prompt alone."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench.cache.resident import engine_steps, make_resident
from bench.measurement import CHECKOUT, BaseSize, Measurement
from bench.support.checkpoints import wide

NAME = "busy-neighbour"
MOST = 2.2
BAR = f"<= {MOST:g}x the time"
THREADS = 2
BUSY = "while True: pass"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Rounds, and tokens of the prompt."""

    rounds: int = 3
    prompt: int = 1800


FULL, SMALL = Size(), Size(small=True, rounds=1, prompt=48)


def run(size: Size = FULL) -> Measurement:
    """The wide checkpoint in memory, with the threads of the command line, which wait passively. Warm, alternating."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.cpu.busy_neighbour", *["small"] * size.small], cwd=CHECKOUT, capture_output=True,
        text=True, env=os.environ | {"OMP_WAIT_POLICY": "passive"}, check=False,
    )  # fmt: skip
    if done.returncode:
        return Measurement(NAME, None, BAR, False, {"error": done.stderr[-2000:]})
    found = json.loads(done.stdout.splitlines()[-1])
    ratio = statistics.median(busy / alone for alone, busy in zip(found["alone"], found["busy"], strict=True))
    return Measurement(NAME, {"times": round(ratio, 2)}, BAR, ratio <= MOST, found)


def measured(size: Size) -> dict[str, Any]:
    """The seconds of each prompt, without and with the other process."""
    from edgemoe import Engine

    found: dict[str, list[float]] = {"alone": [], "busy": []}
    settings: dict[str, Any] = {"device": "cpu", "threads": THREADS, "expert_cache": "100%", "state_folder": "none"}
    with Engine.load(wide(small=size.small), context=2048, **settings) as engine:
        make_resident(engine)
        for seed in range(-1, size.rounds):
            prompt = torch.randint(3, 32000, (size.prompt,), generator=torch.Generator().manual_seed(seed + 1)).tolist()
            alone = _seconds(engine, prompt)
            with _busy_process():
                busy = _seconds(engine, prompt)
            if seed >= 0:
                found["alone"].append(alone)
                found["busy"].append(busy)
    return found


def _seconds(engine: Any, prompt: list[int]) -> float:
    step = engine_steps(engine, len(prompt))
    started = time.perf_counter()
    step(prompt)
    return time.perf_counter() - started


@contextmanager
def _busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        # Until it has started and computes.
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    print(json.dumps(measured(SMALL if "small" in sys.argv[1:] else FULL)))
