"""`resident`: all experts in memory, bf16, two threads: decode and prefill against transformers and the floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.measurement import BaseSize, Measurement
from bench.support.checkpoints import wide
from bench.support.decode_round import decode_round, read_bandwidth, timed
from bench.support.engine_parts import cache_of, runner_of, weights_nbytes_per_token
from edgemoe import Engine
from edgemoe.cache import ExpertId
from edgemoe.quiet import quiet_transformers

NAME = "resident"
BAR = "decode >= 1.15x transformers and >= 0.65 of its floor; prefill (512) >= 1.0x transformers"
THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Rounds, and in each the tokens of a prompt and the steps after it."""

    rounds: int = 5
    prompt: int = 512
    steps: int = 12


FULL, SMALL = Size(), Size(small=True, rounds=1, prompt=16, steps=2)


def run(size: Size = FULL) -> Measurement:
    """Both models in one process, alternating; medians of ratios."""
    folder = wide(small=size.small)
    torch.set_num_threads(THREADS)
    from transformers import AutoModelForCausalLM

    with Engine.load(folder, device="cpu", threads=THREADS, expert_cache="100%", context=1024) as engine:
        make_resident(engine)
        with quiet_transformers():
            peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        rounds = [
            decode_round(
                {"ours": timed(engine_steps(engine, size.prompt + size.steps)), "peer": timed(peer_steps(peer))},
                seed, size.prompt, size.steps,
            ) | {"bandwidth": read_bandwidth(cache_of(engine).pool.memory)}
            for seed in range(size.rounds)
        ]  # fmt: skip
        floor_bytes = weights_nbytes_per_token(engine)
    bandwidth = statistics.median(item["bandwidth"] for item in rounds)
    ours = statistics.median(item["ours decode"] for item in rounds)
    decode = statistics.median(item["peer decode"] / item["ours decode"] for item in rounds)
    prefill = statistics.median(item["peer prefill"] / item["ours prefill"] for item in rounds)
    of_floor = statistics.median(floor_bytes / item["bandwidth"] / item["ours decode"] for item in rounds)
    detail = {
        "tokens_per_second": 1 / ours,
        "peer_tokens_per_second": 1 / statistics.median(item["peer decode"] for item in rounds),
        "prefill_tokens_per_second": size.prompt / statistics.median(item["ours prefill"] for item in rounds),
        "peer_prefill_tokens_per_second": size.prompt / statistics.median(item["peer prefill"] for item in rounds),
        "bytes_per_token": floor_bytes,
        "read_bandwidth_gb_per_second": bandwidth / 1e9,
        "threads": THREADS,
        "cache": "warm",
    }
    value = {"decode": round(decode, 3), "of_floor": round(of_floor, 3), "prefill": round(prefill, 3)}
    return Measurement(NAME, value, BAR, decode >= 1.15 and of_floor >= 0.65 and prefill >= 1.0, detail)


def make_resident(engine: Engine) -> None:
    """Waits until every expert is in its slot."""
    cache = cache_of(engine)
    for layer, count in enumerate(cache.store.experts):
        for _ in cache.borrow(layer, range(count)):
            pass
        assert all(cache.is_resident(ExpertId(layer, number)) for number in range(count))


def engine_steps(engine: Engine, length: int) -> Callable[[list[int]], object]:
    """Appends tokens to a sequence of ours, at most `length`."""
    runner = runner_of(engine)
    cache = runner.start(length)
    return lambda tokens: runner.step(cache, tokens)


def peer_steps(peer: Any) -> Callable[[list[int]], object]:
    """Appends tokens to a sequence of transformers'."""
    from transformers import DynamicCache

    cache = DynamicCache(config=peer.config)

    def step(tokens: list[int]) -> object:
        with torch.inference_mode():
            return peer(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    return step
