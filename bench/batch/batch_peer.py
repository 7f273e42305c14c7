"""`batch-peer`: 16 sequences at once, all experts in memory, bf16, against transformers' padded batch."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from bench.cache.resident import make_resident
from bench.measurement import BaseSize, Measurement
from bench.support.checkpoints import wide
from edgemoe import Engine, Sampling
from edgemoe.quiet import quiet_transformers

NAME = "batch-peer"
BAR = "generated tokens a second >= 1.5x transformers' generate"
THREADS = 2
SHORTEST = 16
"""Tokens of the shortest prompt."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Sequences, generated tokens of each, the longest prompt, and rounds."""

    batch: int = 16
    tokens: int = 32
    longest: int = 200
    rounds: int = 3


FULL, SMALL = Size(), Size(small=True, batch=4, tokens=3, longest=24, rounds=1)


def run(size: Size = FULL) -> Measurement:
    """Both models in one process, alternating, on prompts of different lengths; the median of the ratios. Warm."""
    folder = wide(small=size.small)
    torch.set_num_threads(THREADS)
    from transformers import AutoModelForCausalLM

    with Engine.load(
        folder, device="cpu", threads=THREADS, expert_cache="100%", context=1024, batch=size.batch
    ) as engine:
        make_resident(engine)
        with quiet_transformers():
            peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        _ours(engine, _prompts(-1, size)[:4], size.tokens)
        _theirs(peer, _prompts(-1, size)[:4], size.tokens)
        rounds = [_round(engine, peer, seed, size) for seed in range(size.rounds)]
    ratio = statistics.median(theirs / ours for ours, theirs in rounds)
    made = size.batch * size.tokens
    detail = {
        "tokens_per_second": made / statistics.median(ours for ours, _ in rounds),
        "peer_tokens_per_second": made / statistics.median(theirs for _, theirs in rounds),
        "prompts": f"{SHORTEST} to {size.longest} tokens",
        "threads": THREADS,
        "cache": "warm",
    }
    return Measurement(NAME, round(ratio, 3), BAR, ratio >= 1.5, detail)


def _prompts(seed: int, size: Size) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed + 1)
    lengths = torch.randint(SHORTEST, size.longest + 1, (size.batch,), generator=generator).tolist()
    return [torch.randint(3, 32000, (length,), generator=generator).tolist() for length in lengths]


def _round(engine: Engine, peer: Any, seed: int, size: Size) -> tuple[float, float]:
    prompts = _prompts(seed, size)
    if seed % 2:
        theirs = _theirs(peer, prompts, size.tokens)
        return _ours(engine, prompts, size.tokens), theirs
    return _ours(engine, prompts, size.tokens), _theirs(peer, prompts, size.tokens)


def _ours(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    settings = Sampling(temperature=0, max_tokens=tokens, ignore_eos=True)
    started = time.perf_counter()
    replies = list(engine.generate_batch((prompt, settings) for prompt in prompts))
    assert len(replies) == len(prompts)
    return time.perf_counter() - started


def _theirs(peer: Any, prompts: list[list[int]], tokens: int) -> float:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    started = time.perf_counter()
    with quiet_transformers(), torch.inference_mode():
        replies = peer.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    assert replies.shape[1] == longest + tokens
    return time.perf_counter() - started
