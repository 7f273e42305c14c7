"""The tests that run on a card where there is one, in a process of their own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
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
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "gemma4", "qwen3_next")
"""Different kinds: biases, transposed weights, shared experts, other attention, a state that cannot be taken back."""
TIMEOUT = 90.0
"""Seconds for each of the two commands."""
TAIL = 2500
"""Characters of what a command that failed said."""


def measure(target: Target) -> Found:
    """pytest's last line on the link's tests and on the engine's; a dry run only collects them."""
    if importlib.util.find_spec("pytest") is None:
        raise SkippedError("pytest is not installed")
    links = sorted(path.relative_to(ROOT) for path in (ROOT / "tests/cache/links").glob("test_cuda_link*.py"))
    device = "cuda" if target.cuda else "cpu"
    picks = f"{device} and (learnt_from or (tokens_and_logits and ({' or '.join(FAMILIES)})))"
    commands = {
        "links": [*map(str, links), "tests/cache/links/test_host_store.py"],
        "engines": ["tests/face/test_families.py", "tests/experts/test_prefetching.py", "-k", picks],
    }
    options = ["--collect-only"] if target.small else []
    figures, faults = {}, []
    for name, words in commands.items():
        figures[name], passed = _pytest([*words, *options], min(TIMEOUT, max(1.0, target.seconds_left())))
        if not passed:
            faults.append(f"the tests of {name} do not pass: {figures[name]}")
    return Found(figures, faults)


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
