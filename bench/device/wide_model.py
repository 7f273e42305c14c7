"""Layers of Qwen3-30B-A3B's shape with random weights: the time of a step by hit rate, and what it is made of."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.device.census import census
from bench.device.section import Found, Target
from bench.device.timing import device_memory, kept
from bench.support import checkpoints
from bench.support.engine_parts import link_of
from edgemoe import Engine, Sampling
from edgemoe.plan.machine import ram_free

LAYERS = 4
EMBEDDING_SCALE = 45.0
"""The square root of the hidden size: the routing follows the token, so that a cache of 30 % does miss."""
NBYTES = 6 << 30
"""What their checkpoint takes at most."""
ROWS = ((1.0, "off"), (0.9, "off"), (0.6, "off"), (0.6, "auto"), (0.3, "off"), (0.3, "auto"))
"""The share of the experts that have a slot, and the prefetching."""
DRAWN = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=1, ignore_eos=True)
"""Greedy tokens of random weights go in circles, and so always need the same experts."""
PREFILLED = {1.0, 0.3}
"""Shares at which a prompt is timed as well."""
COUNTED = {(1.0, "off"), (0.6, "off")}
"""Rows of which the steps are also taken apart."""
ROW_SECONDS = 30.0
"""How long one row takes, generously."""
RAM_AT_LEAST = 24 << 30


def measure(target: Target) -> Found:
    """A dictionary of figures for each row."""
    figures: dict[str, Any] = {}
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="edgemoe-wide-", dir=_parent()) as folder, _at_least_this_ram():
        began = time.perf_counter()
        checkpoint = _checkpoint(folder, small=target.small)
        figures["made_s"] = round(time.perf_counter() - began, 1)
        before = device_memory()
        for share, prefetch in ROWS:
            name = f"{share:.0%} {prefetch}"
            if target.cuda and target.seconds_left() < ROW_SECONDS:
                figures[name] = "no time is left"
                continue
            figures[name] = _row(target, checkpoint, share, prefetch)
            gc.collect()
            after = figures[name]["MiB after"] = device_memory()
            faults += [f"{name}: {fault}" for fault in kept(before, after)]
            if target.cuda and figures[name]["tier"] != "pinned":
                faults.append(f"{name}: the experts wait in the tier {figures[name]['tier']!r}, not in locked memory")
    return Found(figures, faults)


def _checkpoint(folder: str, *, small: bool) -> Path:
    """Made in `folder`, where it goes with the folder, and not kept with the checkpoints of other measurements."""
    with (
        mock.patch.dict(os.environ, {"EDGEMOE_BENCH_DIR": folder}),
        mock.patch.dict(checkpoints.WIDE, {"num_hidden_layers": LAYERS}),
    ):
        return checkpoints.wide(small=small, embedding_scale=EMBEDDING_SCALE)


def _parent() -> str | None:
    """A folder in RAM where it has the room, so that no disk is measured."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > NBYTES else None


def _at_least_this_ram() -> Any:
    """A machine whose RAM grows as it is used reports little, and the experts would stay in their files."""
    return mock.patch("edgemoe.planner.ram_free", lambda *given: max(ram_free(*given), RAM_AT_LEAST))


def _row(target: Target, folder: Path, share: float, prefetch: str) -> dict[str, Any]:
    if target.cuda:
        torch.cuda.empty_cache()
    began = time.perf_counter()
    with Engine.load(
        folder,
        device=target.device,
        expert_cache=f"{share:.0%}",
        batch=1,
        context=512,
        speculate="off",
        prefetch=prefetch,
        state_folder="none",
    ) as engine:
        figures: dict[str, Any] = {"load_s": round(time.perf_counter() - began, 1)}
        figures |= _decoding(engine, prompt(24), 8 if target.small else 40)
        if target.cuda and (share, prefetch) in COUNTED:
            figures["a step"] = census(engine, prompt(24))
        if share in PREFILLED:
            began = time.perf_counter()
            next(engine.stream(prompt(440), Sampling(max_tokens=1)))
            figures["prefill_440_s"] = round(time.perf_counter() - began, 3)
            planned = engine.plan.total_nbytes >> 20
            figures["MiB reserved and planned"] = [device_memory().get("reserved"), planned]
    return figures


def prompt(tokens: int) -> list[int]:
    """Token ids drawn at random, always the same."""
    ids = torch.randint(3, 1000, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    return [int(each) for each in ids]


def _decoding(engine: Engine, ids: Sequence[int], tokens: int) -> dict[str, Any]:
    """Steps of one sequence, and what the link did meanwhile."""
    link = link_of(engine)
    _step_seconds(engine, ids[:16], 12)
    before, busy, moved, began = engine.stats, link.busy_seconds, link.bytes_moved, time.perf_counter()
    step = _step_seconds(engine, ids, tokens)
    after, wall = engine.stats, time.perf_counter() - began
    busy, moved = link.busy_seconds - busy, link.bytes_moved - moved
    hits, misses = after.hits - before.hits, after.misses - before.misses
    return {
        "ms_a_step": round(1e3 * step, 2),
        "ms_a_layer": round(1e3 * step / engine.plan.layers, 3),
        "hit_rate": round(hits / max(1, hits + misses), 3),
        "tier": engine.plan.host_tier,
        "link_GBps": round(moved / max(1e-9, busy) / 1e9, 1),
        "link_busy": round(busy / wall, 2),
        "MB_a_step": round(moved / tokens / 1e6, 1),
        "waited": round((after.link_wait_seconds - before.link_wait_seconds) / wall, 3),
        "wait_share": round(engine._loaded().predictor._prefetcher._gauge.wait_share, 3),
    }


def _step_seconds(engine: Engine, ids: Sequence[int], tokens: int) -> float:
    """The median time between tokens, without the first third of them."""
    marks = []
    for _ in engine.stream(list(ids), replace(DRAWN, max_tokens=tokens)):
        marks.append(time.perf_counter())
    steps = [later - sooner for sooner, later in zip(marks, marks[1:], strict=False)]
    return statistics.median(steps[len(marks) // 3 :])
