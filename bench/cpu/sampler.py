"""`sampler`: the time of one sample of a large vocabulary, with every usual setting at once, and with less."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from bench.measurement import BaseSize, Measurement
from edgemoe import Sampling
from edgemoe.kernels.cpu.threads import torch_threads
from edgemoe.request.sampler import Sampler
from edgemoe.sampling import resolve

NAME = "sampler"
MOST_SECONDS = 1e-3
BAR = "with all settings at once at most 1.0 ms"
SETTINGS: dict[str, Sampling] = {
    "all": Sampling(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.05, presence_penalty=0.5,
        frequency_penalty=0.2, logit_bias={17: 2.0, 40: -100.0}, seed=1,
    ),
    "temperature, top-k and top-p": Sampling(temperature=0.6, top_k=20, top_p=0.95, seed=1),
    "temperature": Sampling(temperature=0.6, top_k=0, top_p=1.0, seed=1),
    "greedy": Sampling(temperature=0.0),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Tokens of the vocabulary and of the text, and samples."""

    vocabulary: int = 151936
    text: int = 512
    samples: int = 200


FULL, SMALL = Size(), Size(small=True, vocabulary=500, text=16, samples=3)


def run(size: Size = FULL) -> Measurement:
    """One thread, random logits of bf16; warm, medians."""
    with torch_threads(1):
        found = {name: _seconds(sampling, size) for name, sampling in SETTINGS.items()}
    value = {name: round(1e3 * seconds, 3) for name, seconds in found.items()}
    return Measurement(NAME, {"milliseconds": value}, BAR, found["all"] <= MOST_SECONDS)


def _seconds(sampling: Sampling, size: Size) -> float:
    settings = resolve(sampling, GenerationConfig(), default_max_tokens=1, room=size.text)
    sampler = Sampler(settings, size.text // 2, size.vocabulary)
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(size.vocabulary, (size.text,), generator=generator).tolist()
    taken = []
    for _ in range(size.samples):
        logits = (3 * torch.randn(size.vocabulary, generator=generator)).bfloat16().float()
        started = time.perf_counter()
        sampler.draw(text, logits)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
