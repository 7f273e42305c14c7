"""One round of a race in decoding: everybody appends the same prompt, and the same tokens one by one, and is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

TimedStep = Callable[[list[int]], float]
"""Appends tokens to a sequence; the seconds that it took."""


def timed(step: Callable[[list[int]], object]) -> TimedStep:
    """`step`, timed."""

    def run(tokens: list[int]) -> float:
        started = time.perf_counter()
        step(tokens)
        return time.perf_counter() - started

    return run


def decode_round(contenders: Mapping[str, TimedStep], seed: int, prompt: int, steps: int) -> dict[str, float]:
    """By "NAME prefill" and "NAME decode": the seconds of `prompt` tokens, and the median of `steps` after them.

    Who begins changes from one seed to the next.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, 32000, (count,), generator=generator).tolist() for count in (prompt, steps)]
    found: dict[str, float] = {}
    for name in list(contenders) if seed % 2 else [*contenders][::-1]:
        found[f"{name} prefill"] = contenders[name](texts[0])
        found[f"{name} decode"] = statistics.median(contenders[name]([token]) for token in texts[1])
    return found


def read_bandwidth(memory: torch.Tensor) -> float:
    """Bytes a second at which `memory`, of whole words, is summed by PyTorch's threads: the best of three."""
    words = memory.view(torch.int64)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        torch.sum(words)
        seconds.append(time.perf_counter() - started)
    return memory.nbytes / min(seconds)
