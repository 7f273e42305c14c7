"""Samplers of tests."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from edgemoe import Sampling
from edgemoe.request.sampler import Sampler
from edgemoe.sampling import resolve

NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "seed": 1}


def sampler(vocabulary: int = 5, prompt_length: int = 1, **changed: Any) -> Sampler:
    """A sampler of a request with `changed` settings: by default every token may be drawn."""
    settings = resolve(Sampling(**{**NEUTRAL, **changed}), GenerationConfig(), 10, 10, prompt_length)
    return Sampler(settings, prompt_length, vocabulary)
