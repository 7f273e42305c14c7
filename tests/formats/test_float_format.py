from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from edgemoe.cache.record import Part, RecordLayout
from edgemoe.formats.float_format import NAMES, FloatFormat
from tests.support.checkpoints import Zoo, running


@pytest.mark.parametrize(("dtype", "name", "bits"), [(torch.bfloat16, "bf16", 16), (torch.float32, "fp32", 32)])
def test_a_float_is_named_after_its_dtype_and_takes_its_bits(dtype: torch.dtype, name: str, bits: float) -> None:
    weights = FloatFormat(dtype)
    assert (weights.name, weights.bits_per_weight) == (name, bits)


@pytest.mark.parametrize("dtype", NAMES)
def test_a_matrix_is_one_part_and_is_read_back_as_it_was_written(dtype: torch.dtype) -> None:
    weights = FloatFormat(dtype)
    parts = weights.parts("down_proj", (3, 8))
    assert parts == (Part("down_proj", (3, 8), dtype),)
    assert sum(part.nbytes for part in parts) * 8 == weights.bits_per_weight * 3 * 8
    layout = RecordLayout([Part("down_proj_bias", (3,), dtype), *parts])
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views = layout.views(record)
    written = torch.arange(24).view(3, 8).to(dtype)
    views["down_proj"].copy_(written)
    read = weights.dequantize(views, "down_proj")
    assert read.dtype is dtype
    assert torch.equal(read, written)
    assert read.data_ptr() == views["down_proj"].data_ptr(), "a float is not copied"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_every_weight_matrix_of_an_experts_module_has_a_format_and_biases_have_none(family: str, zoo: Zoo) -> None:
    with running(zoo(family)) as own:
        for moe in own.blueprint.experts_modules:
            assert set(moe.formats) == {"gate_up_proj", "down_proj"}
            matrices = {part.name: part for part in moe.layout.parts if not part.name.endswith("_bias")}
            assert {
                name: part for name, kept in moe.formats.items() for part in kept.parts(name, matrices[name].shape)
            } == matrices


def test_the_plain_arithmetic_reads_weights_through_their_format(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(zoo("mixtral"), plain=True) as own, torch.inference_mode():
        module = own.blueprint.experts_modules[0].module(own.model)
        inputs = torch.randn(2, 64), torch.tensor([[0], [1]]), torch.ones(2, 1)
        assert module.forward(*inputs).any()
        read: list[str] = []

        def zeros(self: FloatFormat, views: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
            read.append(name)
            return torch.zeros_like(views[name])

        monkeypatch.setattr(FloatFormat, "dequantize", zeros)
        assert not module.forward(*inputs).any()
        assert read == ["gate_up_proj", "down_proj"] * 2
