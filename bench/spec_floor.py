"""`spec-floor`: how close a cycle comes to its floor, the link's time or the memory's, whichever is longer."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.alternating import answer, loaded, questions
from bench.checkpoints import inflated
from bench.link_cells import CELLS, Cell
from bench.measurement import Measurement
from edgemoe import Engine, Sampling

NAME = "spec-floor"
BAR = "time of a cycle <= 1.3x max(bytes moved / link bandwidth, bytes read / memory bandwidth) in every cell"
SETTINGS = Sampling(temperature=0, max_tokens=40)


def run() -> Measurement:
    """The default settings, one held-out question of every task in every cell. Warm."""
    cells = [measure(cell) for cell in CELLS]
    worst = max(at["over_floor"] for at in cells)
    return Measurement(NAME, {"worst": round(worst, 2)}, BAR, worst <= 1.3, {"cells": cells})


def measure(cell: Cell) -> dict[str, Any]:
    """All steps of one cell, prompts included, against their floor."""
    with loaded(inflated(), **cell.settings) as engine:
        asked = questions(1)
        for question in asked[:2]:
            answer(engine, question, SETTINGS)
        memory = _read_bandwidth(engine)
        runtime, before = engine._loaded(), engine.stats
        busy, moved = runtime.link.busy_seconds, runtime.link.bytes_moved
        for question in asked:
            answer(engine, question, SETTINGS)
        after = engine.stats
        moved, busy = runtime.link.bytes_moved - moved, runtime.link.busy_seconds - busy
        plan, memory = engine.plan, min(memory, _read_bandwidth(engine))
    read = (after.hits + after.misses - before.hits - before.misses) * plan.slot_nbytes
    read += (after.steps - before.steps) * plan.dense_nbytes
    link = cell.gbps * 1e9 if cell.gbps else moved / busy
    seconds = after.seconds - before.seconds
    floors = {"link": moved / link, "memory": read / memory}
    at = {
        "cell": cell.name,
        "over_floor": seconds / max(floors.values()),
        "over_both": seconds / sum(floors.values()),
        "bound_by": max(floors, key=lambda name: floors[name]),
        "ms_per_step": 1e3 * seconds / (after.steps - before.steps),
        "memory_gb_per_second": memory / 1e9,
        "link_gb_per_second": link / 1e9,
        "link_busy": busy / seconds,
    }
    print(
        f"{cell.name:32} {at['over_floor']:.2f}x its floor ({at['bound_by']}), {at['over_both']:.2f}x the sum of both; "
        f"link {at['link_busy']:.0%} busy, memory {at['memory_gb_per_second']:.1f} GB/s",
        flush=True,
    )
    return at


def _read_bandwidth(engine: Engine) -> float:
    """Bytes a second at which the slots' memory can be read now, by as many threads as compute."""
    torch.set_num_threads(engine.plan.threads)
    memory = engine._loaded().cache.pool.memory.view(torch.int64)
    best = min(_timed(memory) for _ in range(3))
    return memory.nbytes / best


def _timed(memory: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.sum(memory)
    return time.perf_counter() - started
