"""Tasks of a section in several processes: kernels compile side by side, and what ends one process spares the others.

After an error a process ends: what the card reports once it may report for everything that follows.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.device.layout import ROOT
from bench.device.section import Target

PROGRAM = """
import sys
from bench.device.layout import lay_out
lay_out()
from bench.device.processes import work
work(*sys.argv[1:4], sys.argv[4:])
"""
MARK = "found: "
"""What a line with a task's result begins with."""
TAIL = 300
"""Characters of what a process said that ended without a result."""


def in_processes(
    module: str, target: Target, tasks: Sequence[str], count: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """What `module.found(task, device, small)` gives for each of `tasks`, by the task; `count` processes share them.

    A task that raises gives {"error": ...}. Tasks that no process has come to within `seconds` are left out: the last
    ones of `tasks`. `found` gives a dictionary that JSON can hold.
    """
    ends = time.perf_counter() + min(seconds, max(1.0, target.seconds_left()))
    count = max(1, min(count, len(tasks)))
    with ThreadPoolExecutor(count) as threads:
        parts = threads.map(lambda first: _share(module, target, tasks[first::count], ends), range(count))
    found = {task: result for part in parts for task, result in part.items()}
    return {task: found[task] for task in tasks if task in found}


def _share(module: str, target: Target, tasks: Sequence[str], ends: float) -> dict[str, dict[str, Any]]:
    """One process after the other, until all of `tasks` are done or the time is over."""
    found: dict[str, dict[str, Any]] = {}
    while left := [task for task in tasks if task not in found]:
        seconds = ends - time.perf_counter()
        if seconds <= 0:
            break
        more, said, late = _process([module, target.device, "small" if target.small else "full", *left], seconds)
        found |= more
        if late:
            break
        if not more:
            found[left[0]] = {"error": f"the process ended: {said}"}
    return found


def _process(words: Sequence[str], seconds: float) -> tuple[dict[str, dict[str, Any]], str, bool]:
    """What a process found before it ended, the end of what else it said, and whether it ran out of time."""
    late = False
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words], cwd=ROOT, capture_output=True, text=True, timeout=seconds
        )
        printed, said = done.stdout, done.stderr.strip()[-TAIL:]
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        said, late = "", True
    lines = [line.removeprefix(MARK) for line in printed.splitlines(keepends=True) if line.startswith(MARK)]
    # The last line of a process that was stopped may be half a line.
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line.endswith("\n"):
            task, result = json.loads(line)
            found[task] = result
    return found, said, late


def work(module: str, device: str, size: str, tasks: Sequence[str]) -> None:
    """Prints what is found for `tasks`, one after the other. Run in a process of its own."""
    import torch

    torch.set_num_threads(1)
    find: Callable[[str, str, bool], dict[str, Any]] = importlib.import_module(module).found
    for task in tasks:
        try:
            result = find(task, device, size == "small")
        except Exception as error:
            # Whatever a card that was never met may raise: the other tasks go on in a new process.
            result = {"error": repr(error)[:300]}
        print(MARK + json.dumps([task, result], default=str), flush=True)
        if "error" in result:
            return
