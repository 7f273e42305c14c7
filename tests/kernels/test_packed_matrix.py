from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from bench.support.format_samples import Sample, same_bits, samples
from edgemoe.cache.record import RecordLayout
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.made import MADE, made_format
from edgemoe.formats.stacked_format import StackedFormat
from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.cpu.arrays import Groups
from edgemoe.kernels.cpu.dot_block import PairsOfBf16
from edgemoe.kernels.cpu.packed import packed_matrix
from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.kernels.packed_layers import PackedEmbedding, PackedLinear, PackedWeight

SAMPLES = {sample.name: sample for sample in samples(11)}
WITH_KERNEL = [name for name, own in SAMPLES.items() if packed_matrix.fits(own.format, own.shape[1])]


@pytest.fixture
def threads() -> Iterator[KernelThreads]:
    kept = KernelThreads(2)
    yield kept
    kept.close()


def placed(kind: WeightFormat, shape: tuple[int, int], *matrices: dict[str, torch.Tensor]) -> PackedMatrix:
    """Matrices `w` in records of a pool, with others around them."""
    layout = RecordLayout([*made_format("int8", 32).parts("before", (3, 32)), *kind.parts("w", shape)])
    memory = torch.full((len(matrices), layout.nbytes), 255, dtype=torch.uint8)
    for record, views in zip(memory, matrices, strict=True):
        for name, view in layout.views(record).items():
            if name.startswith("w"):
                view.copy_(views[name])
    return PackedMatrix(kind, shape, memory, layout.places("w"))


def test_the_formats_that_people_download_most_have_kernels() -> None:
    kinds = {SAMPLES[name].format.name for name in WITH_KERNEL}
    assert kinds >= {"Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "fp8", "mxfp4", "nvfp4", *MADE}


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_kernels_read_the_bits_of_the_plain_form(name: str) -> None:
    sample = SAMPLES[name]
    rows = sample.shape[0]
    matrix = placed(
        sample.format, sample.shape, {key: part.clone() for key, part in sample.views.items()}, sample.views
    )
    plain = sample.format.dequantize(sample.views, "w").contiguous()
    for record in range(2):
        assert same_bits(matrix.rows(record, 0, rows), plain)
    middle = rows // 2
    assert same_bits(matrix.rows(1, middle, middle + 3), plain[middle : middle + 3].contiguous())


def finite(sample: Sample) -> torch.Tensor:
    return sample.format.dequantize(sample.views, "w").nan_to_num(0.0, 0.0, 0.0).clamp(-1e4, 1e4)


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_a_product_has_the_same_bits_alone_and_in_a_batch_on_one_thread_and_on_two(
    name: str, threads: KernelThreads
) -> None:
    sample = SAMPLES[name]
    rows, columns = sample.shape
    matrix = placed(sample.format, sample.shape, sample.views)
    x = torch.randn(23, columns, generator=torch.Generator().manual_seed(3))
    together = matrix.multiply_one(threads, x)
    assert together.shape == (23, rows)
    alone = torch.cat([matrix.multiply_one(threads, row.unsqueeze(0)) for row in x])
    single = KernelThreads(1)
    assert same_bits(together.contiguous(), alone.contiguous())
    assert same_bits(together.contiguous(), matrix.multiply_one(single, x).contiguous())
    single.close()


@pytest.mark.parametrize("name", ["int8", "int4", "bf16", "fp16", "fp32"])
def test_long_rows_and_many_tokens_have_the_bits_of_one(name: str, threads: KernelThreads) -> None:
    """The rows are taken in pieces, the tokens in portions, and neither divides them."""
    shape = (13, 1120)
    kinds = {each.name: each for each in map(FloatFormat, (torch.bfloat16, torch.float16, torch.float32))}
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(shape, generator=generator)
    kind = kinds.get(name) or made_format(name, shape[1])
    parts = {"": values.to(kind.dtype)} if isinstance(kind, FloatFormat) else kind.quantize(values)
    views = {"w" + suffix: part for suffix, part in parts.items()}
    matrix, plain = placed(kind, shape, views), kind.dequantize(views, "w").float()
    x = torch.randn(303, shape[1], generator=generator)
    found = matrix.multiply(threads, Groups(np.array([0, 0]), np.array([0, 2, 303])), x)
    assert torch.allclose(found, x @ plain.t(), rtol=1e-4, atol=1e-4)
    alone = torch.cat([matrix.multiply_one(threads, row.unsqueeze(0)) for row in x[:150]])
    assert same_bits(found[:150].contiguous(), alone)


@pytest.mark.parametrize("name", MADE)
def test_a_product_is_near_the_plain_one(name: str, threads: KernelThreads) -> None:
    kind = made_format(name, 256)
    generator = torch.Generator().manual_seed(4)
    matrices = [torch.randn(40, 256, generator=generator) for _ in range(3)]
    views = [{"w" + suffix: part for suffix, part in kind.quantize(each).items()} for each in matrices]
    matrix = placed(kind, (40, 256), *views)
    x = torch.randn(9, 256, generator=generator)
    # Two groups of tokens, in records of another order.
    found = matrix.multiply(threads, Groups(np.array([2, 0]), np.array([0, 4, 9])), x)
    for record, first, last in ((2, 0, 4), (0, 4, 9)):
        expected = x[first:last] @ kind.dequantize(views[record], "w").t()
        assert torch.allclose(found[first:last], expected, rtol=1e-5, atol=1e-4)
        assert torch.allclose(matrix.linear(record, x[first:last]), expected, rtol=1e-5, atol=1e-4)
        error = (kind.dequantize(views[record], "w") - matrices[record]).square().mean().sqrt()
        assert error < (0.02 if name == "int8" else 0.15)


@pytest.mark.parametrize("interleaved", [False, True])
def test_stacked_formats_keep_the_order_of_their_rows(interleaved: bool, threads: KernelThreads) -> None:
    formats = made_format("int8", 64), made_format("nf4", 64)
    kind = StackedFormat(formats, 10, interleaved)
    generator = torch.Generator().manual_seed(5)
    views = {
        f"w.{at}{suffix}": part
        for at, each in enumerate(formats)
        for suffix, part in each.quantize(torch.randn(10, 64, generator=generator)).items()
    }
    matrix, plain = placed(kind, (20, 64), views), kind.dequantize(views, "w")
    x = torch.randn(5, 64, generator=generator)
    assert same_bits(matrix.rows(0, 0, 20).contiguous(), plain.contiguous())
    assert torch.allclose(matrix.multiply_one(threads, x), x @ plain.t(), rtol=1e-5, atol=1e-4)
    assert torch.allclose(matrix.linear(0, x), x @ plain.t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 7, 80])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_linear_layer_multiplies_with_and_without_kernels(
    tokens: int, bias: bool, threads: KernelThreads
) -> None:
    kind = made_format("nf4", 64)
    generator = torch.Generator().manual_seed(6)
    parts = kind.quantize(torch.randn(24, 64, generator=generator))
    weight = PackedWeight(kind, parts, (24, 64), torch.float32)
    own = nn.Parameter(torch.randn(24, generator=generator)) if bias else None
    layer = PackedLinear(weight, own)
    x = torch.randn(2, tokens, 64, generator=generator)
    expected = nn.functional.linear(x, layer.weight, own)
    with torch.inference_mode():
        assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-4)
        layer.use_kernels(threads)
        assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in WITH_KERNEL if len(SAMPLES[name].views) == 1])
def test_rows_of_a_packed_embedding_have_the_same_bits_by_a_kernel(name: str) -> None:
    sample = SAMPLES[name]
    parts = {key.removeprefix("w"): part for key, part in sample.views.items()}
    for dtype in (torch.float32, torch.bfloat16):
        embedding = PackedEmbedding(PackedWeight(sample.format, parts, sample.shape, dtype))
        ids = torch.tensor([[3, 0, 3, sample.shape[0] - 1]])
        expected = embedding(ids)
        embedding.use_kernels()
        found = embedding(ids)
        assert found.dtype is dtype
        assert found.shape == expected.shape
        assert same_bits(found.float(), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_bf16_is_multiplied_as_it_is_in_a_model_of_bf16(dtype: torch.dtype, threads: KernelThreads) -> None:
    formats = FloatFormat(torch.bfloat16), FloatFormat(torch.bfloat16)
    kind, shape = StackedFormat(formats, 10, False), (20, 96)
    generator = torch.Generator().manual_seed(7)
    views = {f"w.{at}": torch.randn(10, 96, generator=generator).bfloat16() for at in range(2)}
    layout = RecordLayout(kind.parts("w", shape))
    memory = torch.zeros(2, layout.nbytes, dtype=torch.uint8)
    for name, view in layout.views(memory[1]).items():
        view.copy_(views[name])
    places = layout.places("w")
    matrix = PackedMatrix(kind, shape, memory, places, dtype)
    assert matrix.inputs is (torch.bfloat16 if dtype is torch.bfloat16 and PairsOfBf16.available() else torch.float32)
    x = torch.randn(150, 96, generator=generator).bfloat16().to(dtype)
    plain = torch.cat([views["w.0"], views["w.1"]]).float()
    found = matrix.multiply(threads, Groups(np.array([1, 1]), np.array([0, 3, 150])), x)
    assert torch.allclose(found, x.float() @ plain.t(), rtol=1e-4, atol=1e-4)
    alone = torch.cat([matrix.multiply(threads, Groups(np.array([1]), np.array([0, 1])), row[None]) for row in x])
    assert same_bits(found, alone)
    assert same_bits(matrix.rows(1, 0, 20), plain)
