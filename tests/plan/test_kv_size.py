"""The measured size of a KV cache; the sizes of the families are in tests/model/test_kv_cache.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.plan import kv_size
from edgemoe.plan.kv_size import KvSize, kv_from_config, measure_kv
from tests.support.checkpoints import Zoo


def test_bytes_grow_with_the_tokens_up_to_a_layers_window() -> None:
    size = KvSize(fixed=7, layers=((10, None), (10, None), (4, 8)))
    assert [size.nbytes(tokens) for tokens in (0, 1, 8, 100)] == [7, 7 + 24, 7 + 192, 7 + 2000 + 32]


def raise_in_the_probe(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*of: Any) -> None:
        raise error

    monkeypatch.setattr(kv_size, "_probe", fail)


def test_a_family_that_cannot_run_without_data_is_sized_by_its_configuration(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint = open_blueprint(zoo("mixtral"))
    raise_in_the_probe(monkeypatch, RuntimeError("Tensor.item() cannot be called on meta tensors"))
    assert measure_kv(blueprint) == kv_from_config(blueprint.config, blueprint.dtype.itemsize)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_running_out_of_memory_in_the_probe_is_raised(
    zoo: Zoo, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    raise_in_the_probe(monkeypatch, error)
    with pytest.raises(type(error)):
        measure_kv(open_blueprint(zoo("mixtral")))
