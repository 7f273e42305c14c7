"""`field`: situations from public reports about other engines, each with its right result."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bench.field import (
    generation_cases,
    hub_cases,
    layout_cases,
    logprob_cases,
    machine_cases,
    reply_cases,
    text_cases,
)
from bench.field.case import Case
from bench.measurement import BaseSize, Measurement
from edgemoe.quiet import quiet_transformers

NAME = "field"
BAR = "every situation comes out right"
KINDS: Mapping[str, Sequence[Case]] = {
    "generation": generation_cases.CASES,
    "text": text_cases.CASES,
    "replies": reply_cases.CASES,
    "logprobs": logprob_cases.CASES,
    "layouts": layout_cases.CASES,
    "hub": hub_cases.CASES,
    "machines": machine_cases.CASES,
}


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The kinds, and the cases of each, that are tried."""

    kinds: tuple[str, ...] = tuple(KINDS)
    cases: int | None = None


FULL, SMALL = Size(), Size(small=True, kinds=("generation", "text", "replies"), cases=1)


def run(size: Size = FULL) -> Measurement:
    """Tries the cases one after the other."""
    wrong: dict[str, str] = {}
    counts: dict[str, int] = {}
    for kind in size.kinds:
        for case in islice(KINDS[kind], size.cases):
            said = tried(case)
            counts[kind] = counts.get(kind, 0) + 1
            if said:
                wrong[f"{kind}: {case.name} ({case.report})"] = said
            print(f"{kind:12}{case.name:70.70}{'WRONG ' + said[:300] if said else 'right'}", flush=True)
    value = {"cases": sum(counts.values()), "wrong": sorted(wrong)}
    return Measurement(NAME, value, BAR, not wrong, {"kinds": counts, "said": wrong})


def tried(case: Case) -> str:
    """What is wrong, or an empty text."""
    with tempfile.TemporaryDirectory(prefix="edgemoe-field-") as folder, quiet_transformers():
        try:
            return case.check(Path(folder))
        except Exception:
            return traceback.format_exc(limit=-3)
