"""`before-after`: this checkout against another version of edgemoe in an environment of its own.

The other environment's Python is named in $EDGEMOE_BENCH_OTHER. Both versions run as processes that hold the same
model and answer the same requests in turns; only the public API is used, so any two versions can be compared.
Of two processes the one that loads first was up to 6 % slower, of one version too, so each part runs in both orders.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated, wide
from edgemoe.demo.tasks import HELD_OUT_SEED, TASKS

NAME = "before-after"
BAR = ">= 0.98x the other version's speed: decoding and prefill all resident, and default speculation in two cells"
THREADS = 2
VARIABLE = "EDGEMOE_BENCH_OTHER"

CELLS: Mapping[str, Mapping[str, Any]] = {
    "default speculation, 100 %": {"expert_cache": "100%"},
    "default speculation, 50 %, 4 GB/s": {"expert_cache": "50%", "link_gbps": 4.0},
}

CHILD = """
import json, sys, time
from edgemoe import Engine, Sampling
model, settings = sys.argv[1], json.loads(sys.argv[2])
with Engine.load(model, **settings) as engine:
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompt = asked.pop("prompt")
        prompt = engine.chat_prompt([{"role": "user", "content": prompt}]) if isinstance(prompt, str) else prompt
        started = time.perf_counter()
        marks = [time.perf_counter() for _ in engine.stream(prompt, Sampling(**asked))]
        print(json.dumps([marks[0] - started, marks[-1] - marks[0], len(marks)]), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Orders of loading, cells, rounds of the resident model, questions of each task, and how wide experts are."""

    orders: tuple[bool, ...] = (False, True)
    cells: tuple[str, ...] = tuple(CELLS)
    tasks: int = len(TASKS)
    rounds: int = 6
    prompt: int = 512
    tokens: int = 48
    questions: int = 6
    factor: int = FACTOR


FULL, SMALL = (
    Size(),
    Size(
        small=True,
        orders=(True,),
        cells=tuple(CELLS)[:1],
        tasks=2,
        rounds=1,
        prompt=16,
        tokens=4,
        questions=1,
        factor=SMALL_FACTOR,
    ),
)


@dataclass
class Side:
    """One version's process, and what its replies took: seconds to the first token, seconds after it, tokens."""

    process: subprocess.Popen[str]

    def ask(self, request: Mapping[str, Any]) -> tuple[float, float, int]:
        """Answers one request; the process is idle before and afterwards."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        first, rest, tokens = json.loads(self.process.stdout.readline())
        return first, rest, tokens


def run(size: Size = FULL) -> Measurement:
    """Ratios of speeds, medians over rounds or sums over questions; above 1 this checkout is faster."""
    other = os.environ.get(VARIABLE, sys.executable if size.small else "")
    if not other:
        missing = {"reason": f"name the Python of the other version's environment in {VARIABLE}"}
        return Measurement(NAME, None, BAR, None, missing)
    parts = [_resident(other, size, swapped) for swapped in size.orders]
    found = {name: _mean([part[name] for part in parts]) for name in parts[0]}
    detail: dict[str, Any] = {"resident, by order of loading": parts}
    for cell in size.cells:
        detail[cell] = [_speculating(other, CELLS[cell], size, swapped) for swapped in size.orders]
        found[cell] = _mean(detail[cell])
    return Measurement(NAME, found, BAR, min(found.values()) >= 0.98, detail)


def _mean(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return round(statistics.geometric_mean(ratios), 3)


def _resident(other: str, size: Size, swapped: bool) -> dict[str, float]:
    """Decoding and prefill with every expert in memory and without drafts."""
    settings = {"expert_cache": "100%", "context": 1024, "speculate": "off", "batch": 1}
    decode, prefill = [], []
    with _sides(other, str(wide(small=size.small)), settings, swapped) as sides:
        for number in range(-1, size.rounds):
            asked: dict[str, Any] = {"prompt": [3 + (7 * number + place) % 200 for place in range(size.prompt)]}
            asked |= {"max_tokens": size.tokens, "temperature": 0.0, "ignore_eos": True}
            (first, rest, tokens), (other_first, other_rest, other_tokens) = _in_turn(sides, asked, number)
            assert tokens == other_tokens
            if number >= 0:  # the first round reads the experts
                decode.append(other_rest / rest)
                prefill.append(other_first / first)
    return {"decode": round(statistics.median(decode), 3), "prefill": round(statistics.median(prefill), 3)}


def _speculating(other: str, settings: Mapping[str, Any], size: Size, swapped: bool) -> float:
    """Seconds of all replies of the shipped model's tasks, widened, after a question of each to warm up."""
    totals, logs = [0.0, 0.0], []
    settings = {**settings, "batch": 1, "state_folder": "none"}
    with _sides(other, str(inflated(size.factor)), settings, swapped) as sides:
        for task in TASKS[: size.tasks]:
            items = task.items(HELD_OUT_SEED, held_out=True)
            for number in range(-1, size.questions):
                asked = {"prompt": next(items).user, "max_tokens": size.tokens, "temperature": 0.0}
                own, others = _in_turn(sides, asked, number)
                if number >= 0:
                    totals = [totals[0] + own[1], totals[1] + others[1]]
                    logs.append(math.log(others[1] / own[1]) if own[1] and others[1] else 0.0)
    return round(totals[1] / totals[0] if totals[0] else math.exp(statistics.fmean(logs)), 3)


def _in_turn(sides: Sequence[Side], asked: Mapping[str, Any], number: int) -> tuple[Any, Any]:
    """Both sides' answers, this checkout's first; who begins changes with each number."""
    order = (0, 1) if number % 2 else (1, 0)
    answers = {side: sides[side].ask(asked) for side in order}
    return answers[0], answers[1]


@contextmanager
def _sides(other: str, model: str, settings: Mapping[str, Any], swapped: bool) -> Iterator[tuple[Side, Side]]:
    """This checkout's process and the other version's, in a folder that neither is imported from.

    This checkout's loads first, or second where `swapped`.
    """
    sides: dict[str, Side] = {}
    arguments = ["-c", CHILD, model, json.dumps({"device": "cpu", "threads": THREADS, **settings})]
    pythons = {"own": sys.executable, "other": other}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in reversed(pythons) if swapped else pythons:
                process = subprocess.Popen(
                    [pythons[name], *arguments], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                sides[name] = Side(process)
                assert process.stdout is not None
                if process.stdout.readline().strip() != "ready":
                    raise RuntimeError(f"{pythons[name]} cannot load {model}")
            yield sides["own"], sides["other"]
        finally:
            for side in sides.values():
                side.process.communicate()
