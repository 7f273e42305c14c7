"""`spec-floor`: how close a cycle comes to its floor, the link's time or the memory's, whichever is longer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import Question, loaded, questions, warm_up
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from bench.support.decode_round import read_bandwidth
from bench.support.engine_parts import TimedKernels, cache_of, link_of
from bench.support.link_cells import CELLS, Cell
from edgemoe import Engine, Sampling
from edgemoe.cache import ExpertId
from edgemoe.cache.safetensors_store import SafetensorsStore
from edgemoe.config import EngineConfig

NAME = "spec-floor"
BAR = "time of a cycle <= 1.3x max(bytes moved / link bandwidth, bytes read / memory bandwidth) in every cell"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Cells, how wide the experts are, and what is asked in each."""

    cells: tuple[Cell, ...] = tuple(CELLS)
    factor: int = FACTOR
    tasks: tuple[str, ...] = ()
    """Of the shipped model; all of them where none is named."""
    tokens: int = 40


FULL, SMALL = (
    Size(),
    Size(
        small=True,
        cells=(Cell("25%", 4.0), Cell("25%", None)),
        factor=SMALL_FACTOR,
        tasks=("repeat", "count"),
        tokens=6,
    ),
)


def run(size: Size = FULL) -> Measurement:
    """The default settings, one held-out question of every task in every cell. Decoding alone, warm."""
    cells = [measure(cell, size) for cell in size.cells]
    worst = max(at["over_floor"] for at in cells)
    return Measurement(NAME, {"worst": round(worst, 2)}, BAR, worst <= 1.3, {"cells": cells})


@dataclass(frozen=True)
class Reading:
    """What an engine has done up to a moment."""

    seconds: float
    steps: int
    asked: int
    """Experts that steps asked for."""
    moved: int
    busy: float
    """Seconds in which the link moved something."""
    waited: float
    """Seconds in which steps waited for the link."""
    kernels: float
    """Seconds in which steps ran kernels."""

    @classmethod
    def of(cls, engine: Engine, kernels: TimedKernels) -> Reading:
        """Up to now."""
        stats, link, waited = engine.stats, link_of(engine), cache_of(engine).counters.link_wait_seconds
        asked = stats.hits + stats.misses
        return cls(stats.seconds, stats.steps, asked, link.bytes_moved, link.busy_seconds, waited, kernels.seconds)

    def __add__(self, other: Reading) -> Reading:
        return self._with(other, 1)

    def __sub__(self, other: Reading) -> Reading:
        return self._with(other, -1)

    def _with(self, other: Reading, sign: int) -> Reading:
        return Reading(**{name: value + sign * getattr(other, name) for name, value in vars(self).items()})


def measure(cell: Cell, size: Size, variant: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All steps of one cell that decode, against their floor: of the widened demo, or of a `variant` of it."""
    sampling = Sampling(temperature=0, max_tokens=size.tokens)
    settings = {"model": inflated(size.factor), **cell.settings, **(variant or {})}
    with loaded(**settings) as engine, TimedKernels(engine) as kernels:
        warm_up(engine, sampling)
        memory, link = _read_bandwidth(engine), _link_bandwidth(engine)
        decoded = [_decode(engine, question, sampling, kernels) for question in questions(1, size.tasks)]
        memory, plan = max(memory, _read_bandwidth(engine)), engine.plan
    did = sum(decoded[1:], decoded[0])
    # What this machine reads, and no more than a simulated link brings.
    link = max(link, did.moved / max(did.busy, 1e-9))
    link = min(link, cell.gbps * 1e9) if cell.gbps else link
    floors = {
        "link": did.moved / link,
        "memory": (did.asked * plan.record_nbytes + did.steps * plan.dense_nbytes) / memory,
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
        "waited": did.waited / did.seconds,
        "kernels": did.kernels / did.seconds,
    }
    print(
        f"{cell.name:32} {at['over_floor']:.2f}x its floor ({at['bound_by']}), {at['over_both']:.2f}x the sum of both; "
        f"{at['ms_per_step']:.1f} ms a step, link {link / 1e9:.1f} GB/s and {at['link_busy']:.0%} busy, "
        f"memory {memory / 1e9:.1f} GB/s; waited {at['waited']:.0%}, kernels {at['kernels']:.0%}",
        flush=True,
    )
    return at


def _decode(engine: Engine, question: Question, sampling: Sampling, kernels: TimedKernels) -> Reading:
    """What the engine did for an answer after its first token."""
    prompt = engine.chat_prompt([{"role": "user", "content": question.text}])
    chunks = engine.stream(prompt, sampling)
    next(chunks)
    before = Reading.of(engine, kernels)
    for _ in chunks:
        pass
    return Reading.of(engine, kernels) - before


def _link_bandwidth(engine: Engine) -> float:
    """Bytes a second at which experts can be read now, by as many threads as the link has."""
    store, threads = cache_of(engine).store, EngineConfig().reader_threads
    assert isinstance(store, SafetensorsStore)
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
    return read_bandwidth(cache_of(engine).pool.memory)
