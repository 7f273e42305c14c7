"""`load`: bytes a second from a cold disk into slots, for packed safetensors and GGUF, against the disk's own."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.measurement import BaseSize, Measurement
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from bench.support.packed_models import gguf_of, packed
from edgemoe.cache import ExpertId, SlotPool
from edgemoe.cache.link import Priority, Transfer
from edgemoe.cache.reader_link import ReaderLink
from edgemoe.cache.safetensors_store import SafetensorsStore
from edgemoe.cache.slot_classes import SlotClass
from edgemoe.checkpoint.blueprint import Blueprint, open_blueprint
from edgemoe.config import EngineConfig

NAME = "load"
BAR = ">= 0.8 of the disk's own bandwidth, measured in the same call"
BLOCK = 8 << 20
"""Bytes of a read of the disk alone."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How wide the experts are, and the rounds."""

    factor: int = FACTOR
    rounds: int = 5


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, rounds=1)


def run(size: Size = FULL) -> Measurement:
    """All records into one slot after the other, past the page cache; before and after it the files alone."""
    source = inflated(size.factor)
    models: dict[str, dict[str, Any]] = {
        "nf4, safetensors": {"model": packed(source, "nf4")},
        "Q8_0, GGUF": gguf_of(source, "Q8_0", "Q8_0", "Q8_0"),
    }
    figures = {name: _compared(open_blueprint(**own), size.rounds) for name, own in models.items()}
    worst = min(at["of the disk"] for at in figures.values())
    return Measurement(NAME, {"worst": round(worst, 3)}, BAR, worst >= 0.8, figures)


def _compared(blueprint: Blueprint, rounds: int) -> dict[str, float]:
    loads, disks = [], []
    for _ in range(rounds):
        before = _disk(blueprint.checkpoint.files)
        loads.append(_load(blueprint))
        disks.append((before + _disk(blueprint.checkpoint.files)) / 2)
    ratio = statistics.median(load / disk for load, disk in zip(loads, disks, strict=True))
    return {"GBps": statistics.median(loads) / 1e9, "disk_GBps": statistics.median(disks) / 1e9, "of the disk": ratio}


def _load(blueprint: Blueprint) -> float:
    """Bytes a second of all records over the link, into slots."""
    threads = EngineConfig().reader_threads
    layouts = [moe.layout for moe in blueprint.experts_modules]
    store = SafetensorsStore(blueprint.checkpoint.files, layouts, blueprint.records, direct=True)
    experts = [ExpertId(layer, number) for layer, count in enumerate(store.experts) for number in range(count)]
    slots = min(len(experts), 4 * threads)
    with SlotPool([SlotClass(store.slot_nbytes, slots)], torch.device("cpu")) as pool:
        region = pool.region(store.slot_nbytes)
        region.memory.zero_()
        link = ReaderLink(store, threads)
        started = time.perf_counter()
        flying: list[Transfer] = []
        for at, expert in enumerate(experts):
            if len(flying) == slots:
                link.wait_any(flying[:1])
                assert flying.pop(0).error is None
            flying.append(link.start(expert, at % slots, region.memory[at % slots], Priority.DEMAND))
        for transfer in flying:
            link.wait_any([transfer])
        seconds = time.perf_counter() - started
        link.close()
    nbytes = store.nbytes
    store.close()
    return nbytes / seconds


def _disk(files: tuple[Path, ...]) -> float:
    """Bytes a second of the same files, read past the page cache in large blocks by as many threads."""
    handles = [os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0)) for file in files]
    blocks = [(at, start) for at, file in enumerate(files) for start in range(0, os.path.getsize(file), BLOCK)]
    threads = EngineConfig().reader_threads
    buffers = [mmap.mmap(-1, BLOCK) for _ in range(threads)]

    def read(thread: int) -> int:
        return sum(os.preadv(handles[at], [buffers[thread]], start) for at, start in blocks[thread::threads])

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        nbytes = sum(pool.map(read, range(threads)))
        seconds = time.perf_counter() - started
    for handle in handles:
        os.close(handle)
    return nbytes / seconds
