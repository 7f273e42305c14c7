"""Samplers of tests."""

from __future__ import annotations

from typing import Any

from edgemoe.request.sampler import Sampler
from edgemoe.sampling import ResolvedSampling

NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 1,
    "stop": (),
    "max_tokens": 1,
    "logprobs": None,
    "eos": frozenset[int](),
}


def sampler(**changed: Any) -> Sampler:
    return Sampler(ResolvedSampling(**{**NEUTRAL, **changed}))
