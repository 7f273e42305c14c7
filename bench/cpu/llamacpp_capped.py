"""`llamacpp-capped`: GGUF files of twice the memory that there is, cold: edgemoe against llama.cpp's memory map."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.cache import larger_than_memory
from bench.cache.larger_than_memory import forget_pages, random_tokens
from bench.measurement import CHECKOUT, BaseSize, Measurement
from bench.support.alternating import loaded, questions
from bench.support.cgroup import MemoryGroup
from bench.support.checkpoints import SMALL_FACTOR, inflated
from bench.support.decode_round import read_bandwidth, timed
from bench.support.engine_parts import cache_of, runner_of, weights_nbytes_per_token
from bench.support.llama_cpp_files import gguf_by_peer, wide_gguf
from bench.support.llama_cpp_peer.llama_cpp import INSTALL, LlamaCpp, llama_cpp
from edgemoe import Engine, Sampling

NAME = "llamacpp-capped"
FASTER = {"BF16": 3.0, "Q4_K_M": 1.5}
"""Times as fast as llama.cpp, by type."""
OVER_FLOOR = 1.2
BAR = "BF16 >= 3x llama.cpp, Q4_K_M >= 1.5x; a step <= 1.2 of max(bytes loaded / disk, bytes read / memory)"
CAPS = {"BF16": 4.0 / 7.75, "Q4_K_M": 1.3 / 2.31}
"""Memory of both, as a share of the file: 4 GB and 1.3 GB for the wide checkpoint."""
THREADS = 2
PROMPT = 16


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Types, rounds, decoded tokens of each, how wide the experts of the demo are, and the disk's measurement."""

    types: tuple[str, ...] = tuple(FASTER)
    rounds: int = 2
    steps: int = 32
    factor: int = 256
    disk: larger_than_memory.Size = larger_than_memory.FULL
    least: int = 0
    """Bytes of memory at least."""


FULL = Size()
SMALL = Size(
    small=True, types=("Q8_0",), rounds=1, steps=2, factor=SMALL_FACTOR, disk=larger_than_memory.SMALL, least=4 << 30
)


def run(size: Size = FULL) -> Measurement:
    """Processes under one cap, alternating; medians. Plain decoding of given tokens by both. Needs root."""
    peer = llama_cpp()
    if peer is None:
        return Measurement(NAME, None, BAR, None, {"why": INSTALL})
    if not MemoryGroup.available():
        return Measurement(NAME, None, BAR, None, {"why": "a memory control group needs root and a writable hierarchy"})
    table: dict[str, Any] = {}
    for kind in size.types:
        files = {"random": wide_gguf(peer, kind, small=size.small), "text": _demo(peer, kind, size)}
        for text, file in files.items():
            tokens = random_tokens(PROMPT + size.steps) if text == "random" else _demo_tokens(PROMPT + size.steps)
            table[f"{kind}, {text}"] = found = _measured(peer, file, kind, tokens, size)
            if not size.small:
                print(f"{kind}, {text}: {found}", flush=True)
    ok = all(
        row["speedup"] >= FASTER.get(name.split(",")[0], 0.0) and row["over_floor"] <= OVER_FLOOR
        for name, row in table.items()
    )
    value = {name: {each: row[each] for each in ("speedup", "over_floor")} for name, row in table.items()}
    return Measurement(NAME, value, BAR, ok, table | {"cache": "cold"})


def _demo(peer: LlamaCpp, kind: str, size: Size) -> Path:
    return gguf_by_peer(peer, inflated(size.factor), kind)


def _demo_tokens(count: int) -> list[int]:
    """What the shipped model says to held-out questions, with the questions."""
    tokens: list[int] = []
    with Engine.load(None, device="cpu", state_folder="none") as engine:
        for question in questions(4):
            prompt = engine.chat_prompt([{"role": "user", "content": question.text}])
            reply = engine.generate(prompt, Sampling(temperature=0.0, max_tokens=count))
            tokens += [*prompt, *reply.token_ids]
            if len(tokens) >= count:
                break
    return tokens[:count]


def _measured(peer: LlamaCpp, file: Path, kind: str, tokens: Sequence[int], size: Size) -> dict[str, float]:
    """Both in turns, and what the disk brings under the same cap."""
    cap = max(int(CAPS.get(kind, 0.5) * file.stat().st_size), size.least)
    ours: list[dict[str, float]] = []
    theirs: list[float] = []
    with MemoryGroup("edgemoe-bench", cap) as group:
        for _ in range(size.rounds):
            forget_pages(file)
            ours.append(json.loads(_output(group, [__name__, "ours", str(file)], json.dumps(tokens))[-1]))
            forget_pages(file)
            lines = [json.dumps(tokens[:PROMPT]), *(json.dumps([token]) for token in tokens[PROMPT:])]
            command = [*peer.server(file, THREADS, len(tokens)), "mapped"]
            seconds = _output(group, command, "\n".join(lines))[2:]
            theirs.append(statistics.fmean(map(float, seconds)))
        disk = json.loads(_output(group, [__name__, "disk", str(file), *["small"] * size.small], "")[-1])["value"]

    def median(name: str) -> float:
        return statistics.median(each[name] for each in ours)

    floor = max(median("loaded") / disk, median("read") / median("memory"))
    return {
        "speedup": round(statistics.median(theirs) / median("seconds"), 2),
        "over_floor": round(median("seconds") / floor, 2),
        "tokens_per_second": round(1 / median("seconds"), 2),
        "peer_tokens_per_second": round(1 / statistics.median(theirs), 2),
        "cap_gb": round(cap / 1e9, 2),
        "disk_gb_per_second": round(disk / 1e9, 2),
        "loaded_mb_per_token": round(median("loaded") / 1e6, 1),
        "waited": round(median("waited") / median("seconds"), 2),
    }


def _output(group: MemoryGroup, arguments: list[str], input: str) -> list[str]:
    """The lines of a process in the group; raises RuntimeError where it fails."""
    done = group.run(arguments, CHECKOUT, input)
    if done.returncode:
        raise RuntimeError(f"{arguments[:2]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout.splitlines()


def ours(file: Path, tokens: Sequence[int]) -> dict[str, float]:
    """Means a token after the prompt: seconds, bytes loaded, seconds waited for them, and bytes read from memory."""
    with loaded(file, threads=THREADS, context=len(tokens)) as engine:
        runner, cache = runner_of(engine), cache_of(engine)
        sequence = runner.start(len(tokens))
        runner.step(sequence, tokens[:PROMPT])
        before = cache.counters.copy()
        step = timed(lambda chosen: runner.step(sequence, chosen))
        seconds = [step([token]) for token in tokens[PROMPT:]]
        did = cache.counters
        return {
            "seconds": statistics.fmean(seconds),
            "loaded": (did.bytes_loaded - before.bytes_loaded) / len(seconds),
            "waited": (did.link_wait_seconds - before.link_wait_seconds) / len(seconds),
            "read": weights_nbytes_per_token(engine),
            "memory": read_bandwidth(cache.pool.memory),
        }


def disk(file: Path, size: larger_than_memory.Size) -> dict[str, Any]:
    """See `larger_than_memory.disk`, in pieces of the same size."""
    return larger_than_memory.disk(file, replace(size, disk_sample=min(size.disk_sample, file.stat().st_size // 2)))


if __name__ == "__main__":
    role, file, *rest = sys.argv[1:]
    if role == "ours":
        print(json.dumps(ours(Path(file), json.loads(sys.stdin.read()))))
    else:
        print(json.dumps(disk(Path(file), larger_than_memory.SMALL if rest else larger_than_memory.FULL)))
