"""`bad-input`: every kind of bad input ends in one clear sentence and the right exit status, and loses nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.zoo import make
from edgemoe.demo import demo_folder

NAME = "bad-input"
BAR = "one clear sentence naming the mend, exit status not 0 (or one error record), nothing lost"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Every how many-th of the cases is tried."""

    every: int = 1


FULL, SMALL = Size(), Size(small=True, every=12)


@dataclass(frozen=True)
class Case:
    """A command line, and words that its one sentence (or its error record) must contain."""

    name: str
    arguments: list[str]
    words: list[str]
    stdin: str = '{"prompt": "Hello", "max_tokens": 2}\n'
    records: bool = False
    """Whether the run goes on and the fault is an error record beside good results."""
    environment: dict[str, str] = field(default_factory=dict)


def run(size: Size = FULL) -> Measurement:
    """Runs the cases through the installed command."""
    with tempfile.TemporaryDirectory() as folder:
        found = {case.name: check(case) for case in islice(cases(Path(folder)), 0, None, size.every)}
    failed = {name: said for name, (ok, said) in found.items() if not ok}
    value = {"cases": len(found), "failed": sorted(failed)}
    return Measurement(NAME, value, BAR, not failed, {name: said for name, (_, said) in found.items()})


def cases(folder: Path) -> Iterator[Case]:
    """The cases, with the damaged checkpoints they need made in `folder`."""
    yield Case("missing folder", ["run", "-", "-m", str(folder / "none")], ["none", "does not exist", "-m"])
    truncated = _copy(folder / "truncated")
    weights = truncated / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    yield Case(
        "truncated shard", ["run", "-", "-m", str(truncated)], ["model.safetensors", "truncated", "fetch it again"]
    )
    integers = _copy(folder / "integers")
    _rewrite_header(integers / "model.safetensors", '"BF16"', '"I16" ')
    yield Case("wrong dtype", ["run", "-", "-m", str(integers)], ["int16", "bf16, fp16 and fp32"])
    dense = _copy(folder / "dense")
    (dense / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 1024, "hidden_size": 192}))
    yield Case("config without experts", ["run", "-", "-m", str(dense)], ["not a Mixture-of-Experts"])
    pickled = _copy(folder / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    yield Case("pickle weights", ["run", "-", "-m", str(pickled)], ["pickle", "safetensors"])
    remote = _copy(folder / "remote")
    (remote / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}))
    yield Case("remote code", ["run", "-", "-m", str(remote)], ["mine", "never runs"])
    yield Case(
        "unsupported family", ["run", "-", "-m", str(make("jetmoe", folder / "jetmoe"))], ["jetmoe", "cannot run"]
    )
    mixed = '{"prompt": "Hello", "max_tokens": 2}\n'
    for name, line, words in [
        ("empty prompt", '{"prompt": ""}', ["empty"]),
        ("invalid JSON line", '{"prompt": ', ["JSON"]),
        ("prompt longer than the context", json.dumps({"prompt": "a b " * 3000}), ["context", "--ctx-size"]),
        ("bad setting", '{"prompt": "Hi", "temperature": -1}', ["temperature", "at least 0"]),
        ("unknown field", '{"prompt": "Hi", "temprature": 1}', ["temprature"]),
    ]:
        yield Case(name, ["run", "-"], words, stdin=mixed + line + "\n" + mixed, records=True)
    yield Case("unwritable output", ["run", "-", "-o", str(folder / "no" / "out.jsonl")], ["out.jsonl"])
    yield Case("missing input", ["run", str(folder / "none.jsonl")], ["none.jsonl"])
    for flag, value, words in [
        ("--expert-cache", "lots", ["lots", "6GiB"]),
        ("--device", "tpu", ["tpu", "cpu"]),
        ("--dtype", "int3", ["int3", "bfloat16"]),
        ("--ctx-size", "many", ["many"]),
        ("--ctx-size", "999999", ["999999", "2048"]),
        ("--temp", "-2", ["temperature", "at least 0"]),
    ]:
        yield Case(f"{flag} {value}", ["run", "-", flag, value], words)
    yield Case("no space for the cache", ["run", "-", "--expert-cache", "1KiB"], ["1KiB", "108.0 KiB"])


def check(case: Case) -> tuple[bool, str]:
    """Whether a case behaves, and what it said."""
    command = [str(Path(sys.executable).parent / "edgemoe"), *case.arguments]
    done = subprocess.run(command, input=case.stdin, capture_output=True, text=True, check=False)
    if case.records:
        return _check_records(case, done)
    lines = [line for line in done.stderr.splitlines() if line.strip() and "no model given" not in line]
    said = next((line for line in lines if "error:" in line), done.stderr[-300:])
    clear = "Traceback" not in done.stderr and all(word in said for word in case.words)
    return done.returncode != 0 and clear and done.stdout == "", said


def _check_records(case: Case, done: subprocess.CompletedProcess[str]) -> tuple[bool, str]:
    records: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    errors = [record["error"]["message"] for record in records if record["error"]]
    good = [record for record in records if record["response"]]
    said = errors[0] if errors else done.stderr[-300:]
    clear = len(errors) == 1 and len(good) == 2 and all(word in said for word in case.words)
    return clear and done.returncode == 1 and "Traceback" not in done.stderr, said


def _copy(folder: Path) -> Path:
    shutil.copytree(demo_folder(), folder)
    return folder


def _rewrite_header(file: Path, old: str, new: str) -> None:
    """Changes the header's text without changing its length."""
    data = file.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:length].replace(old.encode(), new.encode()) + data[length:])
