"""`device`: what the CUDA path does on a card, in at most eight minutes; with `small`, a dry run on the CPU."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from bench.device.layout import lay_out
from bench.device.runner import Outcome, run_sections
from bench.device.section import OnCpu, Section, Target
from bench.measurement import BaseSize, Measurement, work_folder

NAME = "device"
BAR = (
    "no section fails; no record is read wrongly; kernels give what their plain forms give, and passes the CPU's "
    "tokens however they are drafted and replayed; the link is at 85 % of pinned copies while demanded; prefetches "
    "cost nothing; all memory is given back"
)
SECTIONS = [
    Section("environment", "bench.device.environment", 12, OnCpu.ALWAYS),
    Section("link-costs", "bench.device.link_costs", 8, OnCpu.NEVER),
    Section("zero-copy", "bench.device.zero_copy", 8),
    Section("link-races", "bench.device.link_races", 10),
    Section("graphs", "bench.device.graphs", 50),
    Section("kernel-checks", "bench.device.kernels.checks", 60),
    Section("tests", "bench.device.card_tests", 50),
    Section("shipped-model", "bench.device.shipped_model", 25),
    Section("packed-formats", "bench.device.packed_formats", 40),
    Section("every-family", "bench.device.every_family", 90),
    Section("kernel-speed", "bench.device.kernels.speed", 25),
    Section("wide-model", "bench.device.wide.section", 100),
]
"""What is right comes before what is fast, and what may be cut short comes last."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Seconds that all sections may take together. A small run is on the CPU."""

    budget: float = 480.0


FULL, SMALL = Size(), Size(small=True)


def run(size: Size = FULL) -> Measurement:
    """Every section on the card, or for a small run those that can on the CPU, with tiny shapes."""
    # Read by Triton when it is first imported: without a card its kernels are interpreted.
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"} if size.small else {}):
        lay_out()
        began = time.perf_counter()
        target = Target("cpu" if size.small else _device(), size.small, began + size.budget)
        path = _figures_path()
        outcomes = run_sections(SECTIONS, target, lambda so_far: _write(path, so_far))
    return _measurement(target, outcomes, path, time.perf_counter() - began)


def _device() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _figures_path() -> Path:
    """$OUT/device.json, which is what comes back from a machine that is lent, or one in the folder of this bench."""
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else work_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "device.json"


def _write(path: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Written after each section: a run that is cut off leaves what it had found."""
    path.write_text(json.dumps({name: each.as_json() for name, each in outcomes.items()}, indent=1, default=str))


def _measurement(target: Target, outcomes: Mapping[str, Outcome], path: Path, seconds: float) -> Measurement:
    failed = {name: each.failed for name, each in outcomes.items() if each.failed}
    faults = [f"{name}: {fault}" for name, each in outcomes.items() for fault in each.faults]
    skipped = {name: each.skipped for name, each in outcomes.items() if each.skipped}
    done = len(outcomes) - len(failed) - len(skipped)
    value = {"sections": done, "failed": failed, "faults": faults}
    detail = {"device": target.device, "seconds": round(seconds, 1), "figures": str(path), "skipped": skipped}
    ok: bool | None = not failed and not faults
    if not target.cuda:
        ok, detail["why"] = None, "a dry run on the CPU" if target.small else "torch finds no CUDA device"
    elif ok and skipped:
        ok, detail["why"] = None, "some sections were skipped"
    return Measurement(NAME, value, BAR, ok, detail)
