"""Memory for KV caches, and when it is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgemoe import Engine, Sampling
from edgemoe.model.row_layers import GrowingLayer
from edgemoe.worker import loaded
from tests.support.checkpoints import Zoo

LENGTHS = [(3, 200), (20, 90), (7, 40)]
"""Tokens of prompts and of replies."""


def buffers(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every buffer of keys that requests of `LENGTHS` take, run together."""
    made: list[int] = []
    reserve = GrowingLayer._reserve

    def noted(layer: GrowingLayer, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        before = layer._buffers
        after = reserve(layer, *arguments)
        if after is not before:
            made.append(after[0].shape[-2])
        return after

    monkeypatch.setattr(GrowingLayer, "_reserve", noted)
    with Engine.load(zoo("mixtral"), context=256, threads=1, batch=3, speculate="off", state_folder="none") as loaded:
        made.clear()
        prompts = [list(range(3, 3 + prompt)) for prompt, _ in LENGTHS]
        for prompt, (_, reply) in zip(prompts, LENGTHS, strict=True):
            loaded.generate(prompt, Sampling(max_tokens=reply, ignore_eos=True))
        assert loaded.stats.preemptions == 0
    return made


def test_on_a_device_a_cache_is_taken_at_its_planned_length_and_never_grows(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "is_accelerator", lambda device: True)
    layers = 4
    made = buffers(zoo, monkeypatch)
    assert len(made) == layers * len(LENGTHS)
    assert set(made) == {prompt + reply for prompt, reply in LENGTHS}


def test_elsewhere_it_grows_with_what_is_in_it(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    made = buffers(zoo, monkeypatch)
    assert 64 in made
    assert len(made) > 4 * len(LENGTHS)
