"""`batch-memory`: the peak memory of `edgemoe run` on 100,000 lines against that on 100."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.measurement import BaseSize, Measurement

NAME = "batch-memory"
BAR = "peak RSS with 100,000 lines <= 1.05 x that with 100"
BATCH = 16
"""Stated, so that both runs decode as many together: the few lines end before "auto" has measured much."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Lines of the two runs."""

    warm: int = 1
    """Runs that come before: the first one compiles the kernels, which takes memory of its own."""
    few: int = 100
    many: int = 100_000


FULL, SMALL = Size(), Size(small=True, warm=0, few=3, many=12)


def run(size: Size = FULL) -> Measurement:
    """Prompts of one length, replies of one or two tokens: only the number of lines differs."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(size.warm):
            _peak(Path(folder), size.few)
        few, _ = _peak(Path(folder), size.few)
        many, seconds = _peak(Path(folder), size.many)
    value = round(many / few, 3)
    detail = {
        "few_mib": round(few / 1024, 1),
        "many_mib": round(many / 1024, 1),
        "lines": [size.few, size.many],
        "batch": BATCH,
        "requests_per_second": round(size.many / seconds),
    }
    return Measurement(NAME, value, BAR, value <= 1.05, detail)


def _peak(folder: Path, lines: int) -> tuple[int, float]:
    """The largest resident set of a run, in KiB, and its seconds. Raises RuntimeError unless it served every line."""
    prompts, out = folder / f"{lines}.jsonl", folder / "out.jsonl"
    with prompts.open("w") as file:
        draw = random.Random(0)
        for number in range(lines):
            prompt = f"{draw.randrange(10**6):06} "
            request = {"custom_id": f"request-{number:06}", "prompt": prompt, "max_tokens": 1 + number % 2}
            file.write(json.dumps(request) + "\n")
    command = [str(Path(sys.executable).parent / "edgemoe"), "run", str(prompts), "-o", str(out), "--overwrite"]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--temp", "0", "--batch", str(BATCH)], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    with out.open("rb") as file:
        results = sum(1 for _ in file)
    if process.returncode != 0 or results != lines:
        raise RuntimeError(f"exit status {process.returncode}, {results} results of {lines}")
    return usage.ru_maxrss, time.perf_counter() - started
