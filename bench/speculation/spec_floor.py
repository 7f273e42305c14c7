"""`spec-floor`: how close a cycle comes to its floor, the link's time or the memory's, whichever is longer."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from bench.measurement import Measurement
from bench.support.alternating import Question, loaded, questions, warm_up
from bench.support.checkpoints import inflated
from bench.support.link_cells import CELLS, Cell
from edgemoe import Engine, Sampling
from edgemoe.cache import ExpertId
from edgemoe.config import EngineConfig

NAME = "spec-floor"
BAR = "time of a cycle <= 1.3x max(bytes moved / link bandwidth, bytes read / memory bandwidth) in every cell"
SETTINGS = Sampling(temperature=0, max_tokens=40)


def run() -> Measurement:
    """The default settings, one held-out question of every task in every cell. Decoding alone, warm."""
    cells = [measure(cell) for cell in CELLS]
    worst = max(at["over_floor"] for at in cells)
    return Measurement(NAME, {"worst": round(worst, 2)}, BAR, worst <= 1.3, {"cells": cells})


class Reading(NamedTuple):
    """What an engine has done up to a moment."""

    seconds: float
    steps: int
    asked: int
    """Experts that steps asked for."""
    moved: int
    busy: float
    """Seconds in which the link moved something."""

    @classmethod
    def of(cls, engine: Engine) -> Reading:
        """Up to now."""
        stats, link = engine.stats, engine._loaded().link
        return cls(stats.seconds, stats.steps, stats.hits + stats.misses, link.bytes_moved, link.busy_seconds)


def measure(cell: Cell) -> dict[str, Any]:
    """All steps of one cell that decode, against their floor."""
    with loaded(inflated(), **cell.settings) as engine:
        warm_up(engine, SETTINGS)
        memory, link = _read_bandwidth(engine), _link_bandwidth(engine)
        decoded = [_decode(engine, question) for question in questions(1)]
        memory, plan = max(memory, _read_bandwidth(engine)), engine.plan
    did = Reading(*(sum(each) for each in zip(*decoded, strict=True)))
    # What this machine reads, and no more than a simulated link brings.
    link = max(link, did.moved / max(did.busy, 1e-9))
    link = min(link, cell.gbps * 1e9) if cell.gbps else link
    floors = {
        "link": did.moved / link,
        "memory": (did.asked * plan.slot_nbytes + did.steps * plan.dense_nbytes) / memory,
    }
    at = {
        "cell": cell.name,
        "over_floor": did.seconds / max(floors.values()),
        "over_both": did.seconds / sum(floors.values()),
        "bound_by": max(floors, key=lambda name: floors[name]),
        "ms_per_step": 1e3 * did.seconds / did.steps,
        "memory_gb_per_second": memory / 1e9,
        "link_gb_per_second": link / 1e9,
        "link_busy": did.busy / did.seconds,
    }
    print(
        f"{cell.name:32} {at['over_floor']:.2f}x its floor ({at['bound_by']}), {at['over_both']:.2f}x the sum of both; "
        f"{at['ms_per_step']:.1f} ms a step, link {link / 1e9:.1f} GB/s and {at['link_busy']:.0%} busy, "
        f"memory {memory / 1e9:.1f} GB/s",
        flush=True,
    )
    return at


def _decode(engine: Engine, question: Question) -> Reading:
    """What the engine did for an answer after its first token."""
    prompt = engine.chat_prompt([{"role": "user", "content": question.text}])
    chunks = engine.stream(prompt, SETTINGS)
    next(chunks)
    before = Reading.of(engine)
    for _ in chunks:
        pass
    return Reading(*(after - first for after, first in zip(Reading.of(engine), before, strict=True)))


def _link_bandwidth(engine: Engine) -> float:
    """Bytes a second at which experts can be read now, by as many threads as the link has."""
    store, threads = engine._loaded().cache.store, EngineConfig().reader_threads
    buffers = [torch.empty(store.record_nbytes(ExpertId(0, 0)), dtype=torch.uint8) for _ in range(threads)]
    numbers = range(len(buffers), store.experts[0])

    def read(worker: int) -> int:
        own = numbers[worker::threads]
        for number in own:
            store.read(ExpertId(0, number), 0, buffers[worker])
        return len(own) * buffers[worker].nbytes

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            started = time.perf_counter()
            best = max(best, sum(pool.map(read, range(threads))) / (time.perf_counter() - started))
    return best


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
