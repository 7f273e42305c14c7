"""`start`: seconds to the first result of `edgemoe run` on the shipped model, and of `edgemoe --help`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.measurement import BaseSize, Measurement

NAME = "start"
BAR = "first token <= 8 s; --help <= 0.5 s"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Runs of each command."""

    rounds: int = 5


FULL, SMALL = Size(), Size(small=True, rounds=1)


def run(size: Size = FULL) -> Measurement:
    """The first run compiles the kernels into a fresh folder (cold); the others find them there (warm)."""
    command = str(Path(sys.executable).parent / "edgemoe")
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text(json.dumps({"prompt": "Hello", "max_tokens": 1}) + "\n")
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        first = [_seconds([command, "run", str(prompts)], environment) for _ in range(size.rounds)]
        help_ = [_seconds([command, "--help"], environment) for _ in range(size.rounds)]
    value = {
        "first_token": round(max(first[0], statistics.median(first[1:] or first)), 2),
        "help": round(statistics.median(help_), 3),
    }
    detail = {"cold": first[0], "warm": first[1:], "help": help_}
    return Measurement(NAME, value, BAR, value["first_token"] <= 8 and value["help"] <= 0.5, detail)


def _seconds(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started
