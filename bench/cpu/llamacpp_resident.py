"""`llamacpp-resident`: the wide checkpoint as GGUF files, all in memory, two threads: edgemoe against llama.cpp."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cache.resident import engine_steps, make_resident
from bench.measurement import BaseSize, Measurement
from bench.support.decode_round import TimedStep, decode_round, read_bandwidth, timed
from bench.support.engine_parts import cache_of, weights_nbytes_per_token
from bench.support.llama_cpp_files import wide_gguf
from bench.support.llama_cpp_peer.llama_cpp import INSTALL, LlamaCpp, llama_cpp
from edgemoe import Engine
from edgemoe.kernels.cpu.cpu_features import has

NAME = "llamacpp-resident"
DECODE = {"BF16": 0.95, "Q8_0": 1.05, "Q4_K_M": 1.2}
"""Times as fast as llama.cpp, by type."""
OF_FLOOR = 0.85
"""Of the time that reading the weights takes, in BF16."""
PREFILL = {"BF16": 1.3, "Q4_K_M": 1.0}
PREFILL_OF_AVX512_BF16 = {"BF16": 2.0, "Q4_K_M": 1.5}
BAR = (
    "decode: BF16 >= 0.95x llama.cpp and >= 0.85 of the floor, Q8_0 >= 1.05x, Q4_K_M >= 1.2x; prefill 512: BF16 >= "
    "1.3x, Q4_K_M >= 1.0x, and with AVX512-BF16 or AMX >= 2x and >= 1.5x"
)
THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Types, rounds, and in each the tokens of a prompt and the steps after it."""

    types: tuple[str, ...] = tuple(DECODE)
    rounds: int = 5
    prompt: int = 512
    steps: int = 12


FULL, SMALL = Size(), Size(small=True, types=("Q8_0",), rounds=1, prompt=16, steps=2)


def run(size: Size = FULL) -> Measurement:
    """The same files, tokens and threads for both, alternating; medians of ratios. Warm."""
    peer = llama_cpp()
    if peer is None:
        return Measurement(NAME, None, BAR, None, {"why": INSTALL})
    torch.set_num_threads(THREADS)
    table = {kind: _measured(peer, wide_gguf(peer, kind, small=size.small), size) for kind in size.types}
    prefill = PREFILL_OF_AVX512_BF16 if has("avx512bf16") else PREFILL
    ok = all(
        row["decode"] >= DECODE[kind]
        and row["prefill"] >= prefill.get(kind, 0.0)
        and (kind != "BF16" or row["of_floor"] >= OF_FLOOR)
        for kind, row in table.items()
    )
    value = {kind: {name: row[name] for name in ("decode", "of_floor", "prefill")} for kind, row in table.items()}
    return Measurement(NAME, value, BAR, ok, table | {"peer": peer.features()})


def _measured(peer: LlamaCpp, file: Path, size: Size) -> dict[str, float]:
    length = size.prompt + size.steps
    settings: dict[str, Any] = {"device": "cpu", "threads": THREADS, "expert_cache": "100%", "state_folder": "none"}
    with Engine.load(file, context=length, **settings) as engine, peer.serving(file, THREADS, length) as session:
        make_resident(engine)
        nbytes, rounds = weights_nbytes_per_token(engine), []
        for seed in range(size.rounds):
            session.clear()
            contenders: dict[str, TimedStep] = {"ours": timed(engine_steps(engine, length)), "peer": session.append}
            found = decode_round(contenders, seed, size.prompt, size.steps)
            rounds.append(found | {"bandwidth": read_bandwidth(cache_of(engine).pool.memory)})

    def median(of: Callable[[dict[str, float]], float]) -> float:
        return round(statistics.median(map(of, rounds)), 3)

    row = {
        "decode": median(lambda each: each["peer decode"] / each["ours decode"]),
        "of_floor": median(lambda each: nbytes / each["bandwidth"] / each["ours decode"]),
        "prefill": median(lambda each: each["peer prefill"] / each["ours prefill"]),
        "read_bandwidth_gb_per_second": median(lambda each: each["bandwidth"] / 1e9),
        "tokens_per_second": median(lambda each: 1 / each["ours decode"]),
        "peer_tokens_per_second": median(lambda each: 1 / each["peer decode"]),
        "prefill_tokens_per_second": median(lambda each: size.prompt / each["ours prefill"]),
        "peer_prefill_tokens_per_second": median(lambda each: size.prompt / each["peer prefill"]),
        "bytes_per_token": nbytes,
    }
    if not size.small:
        print(f"{file.stem:16} {row}", flush=True)
    return row
