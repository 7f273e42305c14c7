"""The tests that run on a card where there is one, in a process of their own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.device.layout import ROOT
from bench.device.section import Found, SkippedError, Target

PROGRAM = """
import sys
from bench.device.layout import lay_out
lay_out()
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
TIMEOUT = 150.0
"""Seconds for the commands, which run side by side."""
TILES = "tests/kernels/triton/test_tile_format.py"
"""What kernels read of every packed format, bit for bit."""
SAMPLED = "bits_of_the_plain_form"
"""The half of its cases that takes as long as the others."""
TAIL = 5000
"""Characters of what a command that failed said."""


def measure(target: Target) -> Found:
    """pytest's last line on the tests of the link, of the engine and of packed tiles; a dry run only collects them."""
    if importlib.util.find_spec("pytest") is None:
        raise SkippedError("pytest is not installed")
    links = sorted(path.relative_to(ROOT) for path in (ROOT / "tests/cache/links").glob("test_cuda_link*.py"))
    device = "cuda" if target.cuda else "cpu"
    commands = {
        "links": [*map(str, links), "tests/cache/links/test_host_store.py"],
        "prefetching": ["tests/experts/test_prefetching.py", "-k", device],
        "tiles of samples": [TILES, "-k", SAMPLED],
        "other tiles": [TILES, "-k", f"not {SAMPLED} and not compile"],
    }
    options = ["--collect-only"] if target.small else []
    seconds = min(TIMEOUT, max(1.0, target.seconds_left()))
    with ThreadPoolExecutor(len(commands)) as threads:
        results = dict(
            zip(
                commands,
                threads.map(lambda words: _pytest([*words, *options], seconds), commands.values()),
                strict=True,
            )
        )
    figures = {name: last for name, (last, _) in results.items()}
    failed = [name for name, (_, passed) in results.items() if not passed]
    return Found(figures, [f"the tests of {name} do not pass: {figures[name]}" for name in failed])


def _pytest(words: Sequence[str], seconds: float, root: Path = ROOT) -> tuple[str, bool]:
    """pytest's last line, and whether all passed and there were some."""
    options = ["--no-header", "--tb=short", "-p", "no:cacheprovider"]
    command = [sys.executable, "-c", PROGRAM, *options, *words]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s", False
    if done.returncode:
        print(done.stdout[-TAIL:], done.stderr[-TAIL:], flush=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
    return lines[-1], done.returncode == 0
