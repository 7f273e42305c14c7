"""Gumbel noise by counter: that of any token of any sample by itself, so that nothing is drawn that nobody needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_STEP = np.uint64(0x9E3779B97F4A7C15)
_BITS = 52


def gumbel_noise(seed: int, sample: int, tokens: torch.Tensor) -> torch.Tensor:
    """The noise of `tokens`, int64 [tokens], in the sample number `sample`: float32 [tokens], finite.

    The same whichever other tokens are asked for. `seed` is from 0 to 2^64 - 1. The numbers are those of SplitMix64
    (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), a stream for each sample.
    """
    with np.errstate(over="ignore"):
        stream = _mixed(_mixed(np.array([seed], np.uint64)) + np.array([sample + 1], np.uint64) * _STEP)
        bits = _mixed(stream + (tokens.numpy().astype(np.uint64) + np.uint64(1)) * _STEP)
    # In the middle of 2^52 equal parts of (0, 1): neither end is reached.
    uniform = ((bits >> np.uint64(64 - _BITS)).astype(np.float64) + 0.5) * 2.0**-_BITS
    return torch.from_numpy(-np.log(-np.log(uniform))).float()


def _mixed(values: Any) -> Any:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
