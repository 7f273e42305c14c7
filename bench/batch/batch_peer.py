"""`batch-peer`: 16 sequences at once, all experts in memory, bf16, against transformers' padded batch."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from bench.cache.resident import make_resident
from bench.measurement import Measurement
from bench.support.checkpoints import wide
from edgemoe import Engine, Sampling
from edgemoe.quiet import quiet_transformers

NAME = "batch-peer"
BAR = "generated tokens a second >= 1.5x transformers' generate"
THREADS = 2
BATCH = 16
TOKENS = 32
ROUNDS = 3
SHORTEST, LONGEST = 16, 200


def run() -> Measurement:
    """Both models in one process, alternating, on prompts of different lengths; the median of the ratios. Warm."""
    folder = wide()
    torch.set_num_threads(THREADS)
    from transformers import AutoModelForCausalLM

    with Engine.load(folder, device="cpu", threads=THREADS, expert_cache="100%", context=1024, batch=BATCH) as engine:
        make_resident(engine)
        with quiet_transformers():
            peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        _ours(engine, _prompts(-1)[:4])
        _theirs(peer, _prompts(-1)[:4])
        rounds = [_round(engine, peer, seed) for seed in range(ROUNDS)]
    ratio = statistics.median(theirs / ours for ours, theirs in rounds)
    made = BATCH * TOKENS
    detail = {
        "tokens_per_second": made / statistics.median(ours for ours, _ in rounds),
        "peer_tokens_per_second": made / statistics.median(theirs for _, theirs in rounds),
        "prompts": f"{SHORTEST} to {LONGEST} tokens",
        "threads": THREADS,
        "cache": "warm",
    }
    return Measurement(NAME, round(ratio, 3), BAR, ratio >= 1.5, detail)


def _prompts(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed + 1)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (BATCH,), generator=generator).tolist()
    return [torch.randint(3, 32000, (length,), generator=generator).tolist() for length in lengths]


def _round(engine: Engine, peer: Any, seed: int) -> tuple[float, float]:
    prompts = _prompts(seed)
    if seed % 2:
        theirs = _theirs(peer, prompts)
        return _ours(engine, prompts), theirs
    return _ours(engine, prompts), _theirs(peer, prompts)


def _ours(engine: Engine, prompts: list[list[int]]) -> float:
    settings = Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    started = time.perf_counter()
    replies = list(engine.generate_batch((prompt, settings) for prompt in prompts))
    assert len(replies) == len(prompts)
    return time.perf_counter() - started


def _theirs(peer: Any, prompts: list[list[int]]) -> float:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    started = time.perf_counter()
    with quiet_transformers(), torch.inference_mode():
        replies = peer.generate(
            ids, attention_mask=mask, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )
    assert replies.shape[1] == longest + TOKENS
    return time.perf_counter() - started
