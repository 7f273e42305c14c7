"""What packed formats read back, against their definitions, and what they refuse to hold."""

from __future__ import annotations

import pytest
import torch

from bench.exactness.formats import faults
from bench.support.format_samples import Sample, samples
from edgemoe.cache.record import RecordLayout
from edgemoe.formats.bnb_format import BnbFourBitFormat
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.gguf_format import GgufFormat
from edgemoe.formats.gptq_format import GptqFormat
from edgemoe.formats.int_group_format import IntGroupFormat
from edgemoe.formats.mxfp4_format import Mxfp4Format
from edgemoe.formats.nvfp4_format import Nvfp4Format
from edgemoe.formats.stacked_format import StackedFormat
from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.packed_linear import packed_linear

SAMPLES = list(samples(7))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_values_are_those_of_the_definition(sample: Sample) -> None:
    assert faults(sample) == []


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_bits_are_those_of_the_parts(sample: Sample) -> None:
    rows, columns = 256, 4096
    kind = sample.format
    if isinstance(kind, BnbFourBitFormat):
        kind = BnbFourBitFormat(kind.kind, columns)
    nbytes = sum(part.nbytes for part in kind.parts("w", (rows, columns)))
    # Tables, factors and orders count for a whole matrix, not for a weight.
    assert kind.bits_per_weight == pytest.approx(8 * nbytes / (rows * columns), rel=0.04)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_a_record_holds_the_parts(sample: Sample) -> None:
    layout = RecordLayout(sample.format.parts("w", sample.shape))
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views = layout.views(record)
    for name, view in views.items():
        view.view(torch.uint8).copy_(
            sample.views[name].contiguous().view(torch.uint8).view(view.view(torch.uint8).shape)
        )
    found = sample.format.dequantize(views, "w")
    assert torch.equal(found.nan_to_num(), sample.format.dequantize(sample.views, "w").nan_to_num())


@pytest.mark.parametrize("interleaved", [False, True])
def test_stacked_matrices(interleaved: bool) -> None:
    """Rows of two formats, one after the other or in turns; by rows as a whole."""
    chosen = {sample.name: sample for sample in SAMPLES}
    parts = [chosen["GGUF Q4_K"], chosen["GGUF Q6_K"]]
    kind = StackedFormat(tuple(each.format for each in parts), 24, interleaved)
    views = {f"w.{at}": torch.nan_to_num(each.views["w"]) for at, each in enumerate(parts)}
    single = [each.format.dequantize({"w": each.views["w"]}, "w") for each in parts]
    expected = torch.stack(single, dim=1).flatten(0, 1) if interleaved else torch.cat(single)
    assert torch.equal(kind.dequantize(views, "w").nan_to_num(), expected.nan_to_num())
    for first, last in ((0, 10), (10, 30), (24, 48), (30, 48)):
        assert torch.equal(kind.rows(views, "w", first, last).nan_to_num(), expected[first:last].nan_to_num())
    assert [part.name for part in kind.parts("w", (48, 512))] == ["w.0", "w.1"]
    assert kind.name == "Q4_K+Q6_K"


def test_a_product_is_that_with_the_widened_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemoe.kernels.packed_linear.TILE_VALUES", 5 * 512)
    sample = next(each for each in SAMPLES if each.name == "int4 group 32 zeros")
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    found = packed_linear(x, sample.format, sample.views, "w", 24)
    assert found.dtype is torch.float32
    exact = x.double() @ sample.expected().double().t()
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (GgufFormat("Q4_K"), (8, 300)),
        (Mxfp4Format(), (8, 40)),
        (Nvfp4Format(False), (8, 40)),
        (IntGroupFormat(4, 32), (8, 40)),
        (GptqFormat(), (12, 256)),
        (BnbFourBitFormat("nf4", 64), (8, 32)),
    ],
)
def test_a_shape_that_it_cannot_hold_is_refused(kind: WeightFormat, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        kind.parts("w", shape)


def test_a_float_is_read_by_rows_too() -> None:
    weights = torch.arange(12.0).view(4, 3)
    assert torch.equal(FloatFormat(torch.float32).rows({"w": weights}, "w", 1, 3), weights[1:3])
