"""Runs the sections one by one, each in a box: what one raises is printed, and the next one runs."""

from __future__ import annotations

import importlib
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.device.section import Found, OnCpu, Section, SkippedError, Target
from bench.device.timing import give_back

LINE = 1500
"""Characters of a section's figures that are printed; the file has all."""


@dataclass(frozen=True)
class Outcome:
    """What became of one section: figures, or why there are none."""

    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    skipped: str = ""
    """Why it did not run."""
    failed: str = ""
    """What it raised."""

    def as_json(self) -> dict[str, Any]:
        """Its fields that hold something."""
        return {name: value for name, value in asdict(self).items() if value}


def run_sections(
    sections: Sequence[Section], target: Target, keep: Callable[[dict[str, Outcome]], None]
) -> dict[str, Outcome]:
    """The outcome of every section by its name, a line printed for each. `keep` is given those so far after each."""
    outcomes: dict[str, Outcome] = {}
    for section in sections:
        outcome = outcomes[section.name] = _boxed(section, target)
        print(_line(section.name, outcome), flush=True)
        keep(outcomes)
    return outcomes


def _boxed(section: Section, target: Target) -> Outcome:
    reason = _reason_to_skip(section, target)
    if reason:
        return Outcome(skipped=reason)
    began = time.perf_counter()
    try:
        found: Found = importlib.import_module(section.module).measure(target)
        return Outcome(round(time.perf_counter() - began, 1), found.figures, found.faults)
    except SkippedError as skipped:
        return Outcome(skipped=str(skipped))
    except Exception as error:
        # Whatever a card that was never met may raise: what the other sections say is worth having.
        print(traceback.format_exc(limit=-8), flush=True)
        return Outcome(round(time.perf_counter() - began, 1), failed=repr(error)[:300])
    finally:
        give_back()


def _reason_to_skip(section: Section, target: Target) -> str:
    if not target.cuda and (section.on_cpu is OnCpu.NEVER or (section.on_cpu is OnCpu.SMALL and not target.small)):
        return "needs a card"
    left = target.seconds_left()
    # A dry run takes seconds for what takes minutes on a card; it only has to end.
    if left < (0 if target.small else section.seconds):
        return f"takes up to {section.seconds:.0f} s, {max(0, left):.0f} s are left"
    return ""


def _line(name: str, outcome: Outcome) -> str:
    said = json.dumps(outcome.figures, default=str)[:LINE]
    if outcome.skipped:
        said = f"skipped: {outcome.skipped}"
    if outcome.failed:
        said = f"FAILED: {outcome.failed}"
    wrong = "".join(f" WRONG: {fault};" for fault in outcome.faults)
    return f"{name:16}{outcome.seconds:6.1f} s {said}{wrong}"
