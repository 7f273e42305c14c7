from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from bench.support.zoo import FAMILIES, config
from edgemoe.checkpoint import blueprint
from edgemoe.checkpoint.default_dtype import DefaultDtype
from edgemoe.config import EngineConfig
from edgemoe.quiet import quiet_transformers


def tensors(model: Any) -> dict[str, Any]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (each.dtype, each.shape, each.device.type) for name, each in named}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_is_the_one_that_transformers_builds(family: str) -> None:
    told = config(family)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(told)]
    with quiet_transformers():
        with torch.device("meta"):
            expected = model_class._from_config(copy.deepcopy(told), dtype=torch.bfloat16)
        built = blueprint.build_skeleton(model_class, told, torch.bfloat16)
    assert tensors(built) == tensors(expected)
    assert built.config.to_dict() == expected.config.to_dict()
    assert built.dtype == torch.bfloat16


def test_other_threads_have_their_own_default() -> None:
    entered, seen = threading.Event(), threading.Event()
    found: list[torch.dtype] = []

    def other() -> None:
        assert entered.wait(10)
        found.extend([torch.zeros(1).dtype, torch.tensor(0.5).dtype, torch.get_default_dtype()])
        seen.set()

    thread = threading.Thread(target=other)
    thread.start()
    with DefaultDtype(torch.bfloat16):
        assert torch.zeros(1).dtype == torch.full((2,), 1.0).dtype == torch.tensor([0.5]).dtype == torch.bfloat16
        assert torch.nn.Linear(2, 2).weight.dtype == torch.bfloat16
        assert torch.zeros(1, dtype=torch.float32).dtype == torch.float32
        assert torch.arange(3).dtype == torch.tensor([1]).dtype == torch.full((2,), 1).dtype == torch.int64
        assert torch.zeros_like(torch.zeros(1, dtype=torch.float16)).dtype == torch.float16
        entered.set()
        assert seen.wait(10)
    thread.join()
    assert found == [torch.float32] * 3
    assert torch.zeros(1).dtype == torch.float32


def test_reading_a_checkpoint_leaves_the_default_of_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan for one model must not change what a running engine, or the application, computes meanwhile."""
    changed: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", changed.append)
    blueprint.blueprint_for(None, EngineConfig())
    assert set(changed) <= {torch.float32}
