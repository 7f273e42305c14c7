"""Layers of Qwen3-30B-A3B's shape with random weights: the time of a step by format and slots, and its parts."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.device.census import census
from bench.device.section import Found, Target
from bench.device.timing import device_memory, kept
from bench.device.wide.checkpoints import CONTEXT, NBYTES, SMALL_CONTEXT, card_shares, make_wide
from bench.device.wide.figures import Fixed, against_floor, decoding, draft_ms, prefill_seconds, prompt
from edgemoe import Engine
from edgemoe.checkpoint.blueprint import blueprint_for
from edgemoe.config import EngineConfig
from edgemoe.measure.card_speed import measure_card
from edgemoe.plan.plan import Plan
from edgemoe.plan.profile import CardSpeed

TOKENS, SMALL_TOKENS = 64, 8
PROMPTS, SMALL_PROMPTS = (512, 4096), (80,)
ROW_SECONDS = 10.0
"""How long one row takes, generously."""
MAX_READS, MAX_HIDDEN = 1.0, 1.0
"""Waits of the host a layer: for the routers' choices, and for what a pass needs beside them."""
MIN_LINK = 0.85
"""Of the bandwidth of pinned copies, while misses are demanded."""
MIN_MB = 5.0
"""A step, below which the link is not judged."""
SLOWER = 1.05
"""How much slower a step may be with prefetches: the spread of two runs."""


@dataclass(frozen=True)
class Row:
    """One engine that is loaded and measured."""

    format: str
    cache: float | int
    """The share of the experts that have a slot; an integer stands for the slots of a card of so many GiB."""
    prefetch: str = "auto"
    help: bool = False
    """Whether the CPU computes its share of the misses, as measured."""
    more: tuple[str, ...] = ()
    """What is measured beside steps: "prompts", "census", "drafts", "speeds"."""

    @property
    def name(self) -> str:
        """As "int4, 12 GiB, prefetch off"."""
        size = f"{self.cache} GiB" if isinstance(self.cache, int) else f"{self.cache:.0%}"
        return f"{self.format}, {size}" + ", prefetch off" * (self.prefetch == "off") + ", CPU beside" * self.help


SHORT, ALL = Row("short", 1.0), Row("bf16", 1.0, more=("speeds", "prompts", "census"))
ROWS = (
    SHORT,
    ALL,
    Row("int4", 1.0, more=("speeds", "prompts", "census")),
    Row("int4", 12, more=("prompts", "census", "drafts")),
    Row("int4", 12, prefetch="off"),
    Row("int4", 12, help=True),
    Row("int4", 8), Row("int4", 16), Row("int4", 0.3), Row("int4", 0.6), Row("int4", 0.9),
    Row("bf16", 12, more=("prompts", "census", "drafts")),
    Row("bf16", 12, prefetch="off"),
    Row("bf16", 12, help=True),
    Row("bf16", 8), Row("bf16", 16), Row("bf16", 0.3), Row("bf16", 0.6), Row("bf16", 0.9),
)  # fmt: skip
"""What others need comes first, then what the bars are for."""
SMALL_ROWS = (SHORT, ALL, Row("int4", 1.0, more=("speeds",)), Row("int4", 12, more=("prompts", "drafts")))


@dataclass
class Measured:
    """What rows have found that later ones and the verdict need."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    speeds: dict[str, CardSpeed] = field(default_factory=dict)
    """By format."""
    faults: list[str] = field(default_factory=list)

    def fixed(self) -> Fixed | None:
        """What a step takes beside its layers; None before both rows for it are there."""
        found = [(self.plans.get(row.name), self.rows.get(row.name, {}).get("ms_a_step")) for row in (SHORT, ALL)]
        (short, short_ms), (whole, ms) = found
        if short is None or whole is None or short_ms is None or ms is None:
            return None
        return Fixed.between(short, short_ms / 1e3, whole, ms / 1e3)


def measure(target: Target) -> Found:
    """A dictionary of figures for each row."""
    with tempfile.TemporaryDirectory(prefix="edgemoe-wide-", dir=_parent()) as name:
        folder, marks = Path(name), [time.perf_counter()]
        checkpoints = make_wide(folder, small=target.small)
        marks.append(time.perf_counter())
        shares = card_shares(folder, small=target.small)
        marks.append(time.perf_counter())
        figures: dict[str, Any] = {
            "made_s": round(marks[1] - marks[0], 1), "planned_s": round(marks[2] - marks[1], 1),
            "slots_over_experts": {kind: {gib: round(share, 3) for gib, share in each.items()}
                                   for kind, each in shares.items()},
        }  # fmt: skip
        seen, before = Measured(), device_memory()
        figures["MiB before"] = before
        for row in SMALL_ROWS if target.small else ROWS:
            if target.cuda and target.seconds_left() < ROW_SECONDS:
                figures[row.name] = "no time is left"
                continue
            share = shares[row.format][row.cache] if isinstance(row.cache, int) else row.cache
            with _boxed(seen, row):
                _measure_row(target, checkpoints[row.format], row, share, seen)
            gc.collect()
            after = device_memory()
            figures[row.name] = seen.rows.get(row.name, {}) | {"MiB after": after}
            if row == SHORT:
                # What the first engine leaves behind is libraries and compiled code.
                before = after
            seen.faults += [f"{row.name}: {fault}" for fault in kept(before, after)]
        figures["speeds"] = {kind: asdict(speed) for kind, speed in seen.speeds.items()}
    return Found(figures, seen.faults + (_verdict(seen) if target.cuda else []))


def _parent() -> str | None:
    """A folder in RAM where it has the room, so that no disk is measured."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > NBYTES else None


@contextmanager
def _boxed(seen: Measured, row: Row) -> Iterator[None]:
    """A row that raises is a fault; the others are measured all the same."""
    try:
        yield
    except Exception as error:
        # Whatever a card that was never met may raise.
        seen.faults.append(f"{row.name}: {error!r}"[:300])


def _measure_row(target: Target, checkpoint: Path, row: Row, share: float, seen: Measured) -> None:
    if target.cuda:
        torch.cuda.empty_cache()
    began, found = time.perf_counter(), seen.rows.setdefault(row.name, {})
    speed = seen.speeds.get(row.format)
    config = EngineConfig(
        device=target.device, expert_cache=f"{100 * share:.4f}%", batch=1, speculate="off", state_folder="none",
        context=SMALL_CONTEXT if target.small else CONTEXT, prefetch=row.prefetch, host_tier="ram",
        cpu_share=speed.cpu_share if row.help and speed is not None else "off",
    )  # fmt: skip
    with Engine.load(checkpoint, config) as engine:
        plan = seen.plans[row.name] = engine.plan
        found |= {"load_s": round(time.perf_counter() - began, 1), "slots": plan.slots}
        found |= decoding(engine, SMALL_TOKENS if target.small else TOKENS)
        _measure_more(target, engine, row, found)
        if "speeds" in row.more and target.cuda:
            moe = blueprint_for(checkpoint, config).experts_modules[0]
            seen.speeds[row.format] = measure_card(engine._loaded(), moe, plan.top_k)
    speed, fixed = seen.speeds.get(row.format), seen.fixed()
    if speed is not None and fixed is not None:
        found |= against_floor(found, plan, speed, fixed) | {"fixed_ms": round(1e3 * fixed.seconds, 3)}
        if "step" in found and found["step"]["expert_kernel_ms_a_step"]:
            nbytes = plan.layers * plan.top_k * plan.record_nbytes
            speed_of_experts = nbytes / found["step"]["expert_kernel_ms_a_step"] * 1e3
            found["experts_of_vram"] = round(speed_of_experts / speed.vram, 3)
    if target.cuda and plan.host_tier != "pinned":
        seen.faults.append(f"{row.name}: the experts wait in the tier {plan.host_tier!r}, not in locked memory")


def _measure_more(target: Target, engine: Engine, row: Row, found: dict[str, Any]) -> None:
    if "census" in row.more and target.cuda:
        found["step"] = census(engine, prompt(24))
    if "drafts" in row.more:
        found["draft_ms"] = draft_ms(engine)
    if "prompts" in row.more:
        prompts = SMALL_PROMPTS if target.small else PROMPTS
        found["prefill_s"] = {str(tokens): prefill_seconds(engine, tokens) for tokens in prompts}
        planned = engine.plan.total_nbytes >> 20
        found["MiB reserved and planned"] = [device_memory().get("reserved"), planned]


def _verdict(seen: Measured) -> list[str]:
    """What is judged on any card: waits, the link while it is demanded from, and prefetches against none.

    Not judged here is what belongs to a consumer's card, whose memory and link are slow against its host: experts at
    60 % of the memory's bandwidth, and a step within 1.5 of its floor.
    """
    faults = []
    for name, row in seen.rows.items():
        step = row.get("step", {})
        if step and (step["reads_a_layer"] > MAX_READS or step["hidden_waits_a_layer"] > MAX_HIDDEN):
            faults.append(
                f"{name}: the host waits {step['reads_a_layer']} times a layer for choices, "
                f"{step['hidden_waits_a_layer']} times for something else"
            )
        if "prefetch off" in name and row.get("MB_a_step", 0) > MIN_MB and row.get("link_of_pinned", 1) < MIN_LINK:
            faults.append(f"{name}: the link is at {row['link_of_pinned']:.0%} of pinned copies while demanded")
        other = seen.rows.get(f"{name}, prefetch off", {})
        if "ms_a_step" in row and row["ms_a_step"] > SLOWER * other.get("ms_a_step", float("inf")):
            faults.append(f"{name}: {row['ms_a_step']} ms a step, {other['ms_a_step']} without prefetches")
    return faults
