"""`batch-resume`: a run that is killed twenty times and resumed each time, against one that is left alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bench.measurement import BaseSize, Measurement
from edgemoe.demo.tasks import HELD_OUT_SEED, TASKS

NAME = "batch-resume"
BAR = "200 of 200 lines, none twice, the same texts"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Lines, how often the run is killed, and the longest reply in tokens."""

    lines: int = 200
    kills: int = 20
    max_new_lines: int = 12
    """Results between two kills: 0 to so many, so that all kills come before the end."""
    tokens: int = 64


FULL, SMALL = Size(), Size(small=True, lines=9, kills=1, max_new_lines=2, tokens=8)


def run(size: Size = FULL) -> Measurement:
    """float32, greedy: then a reply does not depend on which other requests were in its batch."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        prompts, out, straight = (Path(folder) / name for name in ("prompts.jsonl", "out.jsonl", "straight.jsonl"))
        prompts.write_text("".join(json.dumps(request) + "\n" for request in _requests(size.lines)))
        subprocess.run(_command(prompts, straight, size.tokens), check=True, capture_output=True)
        states = [
            _kill(_command(prompts, out, size.tokens), out, draw.randint(0, size.max_new_lines), draw)
            for _ in range(size.kills)
        ]
        subprocess.run(_command(prompts, out, size.tokens), check=True, capture_output=True)
        expected, found = _texts(straight), _texts(out)
    times = Counter(custom_id for custom_id, _ in found)
    value = {
        "lines": len(times),
        "twice": sum(count > 1 for count in times.values()),
        "same": sum(a == b for a, b in zip(sorted(expected), sorted(found), strict=False)),
    }
    ok: bool | None = value == {"lines": size.lines, "twice": 0, "same": size.lines} and len(expected) == size.lines
    detail: dict[str, Any] = {"results_at_each_kill": [state["lines"] for state in states]}
    detail |= {name: sum(state[name] for state in states) for name in ("killed", "torn")}
    if ok and detail["killed"] < size.kills:
        ok, detail["why"] = None, "a run ended before it could be killed"
    return Measurement(NAME, value, BAR, ok, detail)


def _requests(lines: int) -> list[dict[str, Any]]:
    """Held-out questions of every task in turn, every third for two replies."""
    count = -(-lines // len(TASKS))
    asked = zip(*(islice(task.items(HELD_OUT_SEED, held_out=True), count) for task in TASKS), strict=True)
    questions = [item.user for items in asked for item in items][:lines]
    return [
        {"id": f"question-{number}", "messages": [{"role": "user", "content": text}], "n": 1 + (number % 3 == 0)}
        for number, text in enumerate(questions)
    ]


def _command(prompts: Path, out: Path, tokens: int) -> list[str]:
    edgemoe = str(Path(sys.executable).parent / "edgemoe")
    flags = ["--resume", "--temp", "0", "-n", str(tokens), "--dtype", "float32", "--batch", "8"]
    return [edgemoe, "run", str(prompts), "-o", str(out), *flags]


def _kill(command: list[str], out: Path, new_lines: int, draw: random.Random) -> dict[str, Any]:
    """Kills a run a moment after `new_lines` new results, or while it starts; what it left."""
    delay = draw.uniform(0, 0.05 if new_lines else 1.5)
    wanted = _lines(out) + new_lines
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and _lines(out) < wanted:
        time.sleep(0.001)
    time.sleep(delay)
    killed = process.poll() is None
    process.kill()
    process.wait()
    left = out.read_bytes() if out.exists() else b""
    return {"killed": killed, "lines": left.count(b"\n"), "torn": not left.endswith(b"\n") and bool(left)}


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _texts(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Each result's id, and the texts of its choices."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        (
            record["custom_id"],
            tuple(choice["message"]["content"] for choice in record["response"]["body"]["choices"]),
        )
        for record in records
    ]
