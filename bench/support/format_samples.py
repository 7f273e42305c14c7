"""Packed matrices of random and of extreme content, and what each of their values is by the definition of its format.

The definitions are written value by value, as the libraries' documents give them, and share nothing with `formats/`.
GGUF's come from the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bench.support.packing import NF4
from edgemoe.formats.bnb_format import BnbFourBitFormat, BnbInt8Format
from edgemoe.formats.fp8_format import Fp8Format
from edgemoe.formats.gguf_format import BLOCKS, IDS, GgufFormat
from edgemoe.formats.gptq_format import GptqFormat
from edgemoe.formats.int_group_format import IntGroupFormat
from edgemoe.formats.mxfp4_format import Mxfp4Format
from edgemoe.formats.nvfp4_format import Nvfp4Format
from edgemoe.formats.weight_format import WeightFormat

Views = dict[str, torch.Tensor]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
SHAPE = (24, 512)
"""Rows and columns; a GGUF row is two blocks of 256."""


@dataclass(frozen=True)
class Sample:
    """A packed matrix `w` of `shape`."""

    name: str
    format: WeightFormat
    views: Views
    shape: tuple[int, int]
    expected: Callable[[], torch.Tensor]
    """Its values by definition, float32."""


def samples(seed: int) -> Iterator[Sample]:
    """One of each format and variant, of random content; extreme bytes are frequent."""
    generator = torch.Generator().manual_seed(seed)
    for number, kind in IDS.items():
        yield _gguf(number, kind, generator)
    for block in ((128, 128), (1, 0), (0, 0), (16, 100)):
        yield _fp8(block, generator)
        yield _fp8(block, generator, (200, 288))
    yield _mxfp4(generator)
    for divides in (False, True):
        yield _nvfp4(divides, generator)
    for zeros in (False, True):
        for order in (False, True):
            yield _int_groups(4, 32, zeros, order, generator)
    yield _int_groups(8, 64, False, False, generator)
    yield _int_groups(4, 0, False, False, generator)
    for awq, offset, order in ((False, 1, False), (False, 1, True), (False, 0, False), (True, 0, False)):
        yield _gptq(awq, offset, order, generator)
    for kind in ("nf4", "fp4"):
        yield _bnb(kind, generator)
    yield _bnb_int8(generator)


def _bytes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    found = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    extreme = torch.randint(0, 8, shape, generator=generator)
    return torch.where(extreme == 0, torch.tensor(0, dtype=torch.uint8), torch.where(extreme == 1, 255, found).byte())


def _like(kind: WeightFormat, shape: tuple[int, int], generator: torch.Generator) -> Views:
    """The parts of a matrix with random bytes, or finite random floats."""
    views: Views = {}
    for part in kind.parts("w", shape):
        if part.dtype.is_floating_point and part.dtype.itemsize > 1:
            values = torch.randn(part.shape, generator=generator) * 10.0 ** torch.randint(
                -6, 4, (1,), generator=generator
            )
            views[part.name] = values.to(part.dtype)
        else:
            raw = _bytes((*part.shape[:-1], part.shape[-1] * part.dtype.itemsize), generator)
            views[part.name] = raw.view(part.dtype)
    return views


def _gguf(number: int, kind: str, generator: torch.Generator) -> Sample:
    own = GgufFormat(kind)
    views = _like(own, SHAPE, generator)

    def expected() -> torch.Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        with np.errstate(all="ignore"):
            return torch.from_numpy(dequantize(views["w"].numpy(), GGMLQuantizationType(number)))

    assert BLOCKS[kind][0] in (32, 256)
    return Sample(f"GGUF {kind}", own, views, SHAPE, expected)


def _by_value(shape: tuple[int, int], value: Callable[[int, int], float]) -> torch.Tensor:
    """A matrix value by value, each rounded to float32."""
    return torch.tensor(
        [[np.float32(value(row, column)) for column in range(shape[1])] for row in range(shape[0])], dtype=torch.float32
    )


def _fp8(block: tuple[int, int], generator: torch.Generator, shape: tuple[int, int] = (200, 260)) -> Sample:
    kind = Fp8Format(block)
    views = _like(kind, shape, generator)
    height, width = block[0] or shape[0], block[1] or shape[1]
    values, scales = views["w"].float().numpy(), views["w.scale"].numpy()
    return Sample(
        f"fp8 {block}, {shape[1]} columns",
        kind,
        views,
        shape,
        lambda: _by_value(shape, lambda r, c: values[r, c] * scales[r // height, c // width]),
    )


def _mxfp4(generator: torch.Generator) -> Sample:
    kind = Mxfp4Format()
    views = _like(kind, SHAPE, generator)
    # An exponent of 255 stands for no number.
    views["w.scale"] = views["w.scale"].clamp(0, 254)
    blocks, scales = views["w"].flatten(1).numpy(), views["w.scale"].numpy()

    def value(row: int, column: int) -> float:
        code = (int(blocks[row, column // 2]) >> (4 * (column % 2))) & 15
        return E2M1[code] * 2.0 ** (int(scales[row, column // 32]) - 127)

    def expected() -> torch.Tensor:
        with np.errstate(over="ignore"):
            return _by_value(SHAPE, value)

    return Sample("mxfp4", kind, views, SHAPE, expected)


def _nvfp4(divides: bool, generator: torch.Generator) -> Sample:
    kind = Nvfp4Format(divides)
    views = _like(kind, SHAPE, generator)
    factor = views["w.factor"].abs().clamp_min(1e-6)
    views["w.factor"] = factor
    codes, scales = views["w"].numpy(), views["w.scale"].float().numpy()
    by = np.float32(factor.item())

    def value(row: int, column: int) -> float:
        code = (int(codes[row, column // 2]) >> (4 * (column % 2))) & 15
        scale = scales[row, column // 16]
        return np.float32(E2M1[code]) * (scale / by if divides else scale * by)  # type: ignore[no-any-return]

    return Sample(
        f"nvfp4 {'divides' if divides else 'multiplies'}", kind, views, SHAPE, lambda: _by_value(SHAPE, value)
    )


def _int_groups(bits: int, group: int, zeros: bool, order: bool, generator: torch.Generator) -> Sample:
    kind = IntGroupFormat(bits, group, torch.bfloat16, zeros, order)
    views = _like(kind, SHAPE, generator)
    groups = views["w.scale"].shape[1]
    if order:
        views["w.group"] = torch.randint(0, groups, (SHAPE[1],), generator=generator, dtype=torch.int32)
    per, mask, offset = 32 // bits, (1 << bits) - 1, 1 << (bits - 1)

    def field(word: int, place: int) -> int:
        return (word >> (bits * place)) & mask

    def value(row: int, column: int) -> float:
        own = int(views["w.group"][column]) if order else column // (group or SHAPE[1])
        code = field(int(views["w"][row, column // per]), column % per) - offset
        zero = field(int(views["w.zero"][row // per, own]), row % per) - offset if zeros else 0
        # The library multiplies in the dtype of the scales.
        return float(torch.tensor(float(code - zero)).bfloat16() * views["w.scale"][row, own])

    shown = f"int{bits} group {group}{' zeros' if zeros else ''}{' ordered' if order else ''}"
    return Sample(shown, kind, views, SHAPE, lambda: _by_value(SHAPE, value))


def _gptq(awq: bool, offset: int, order: bool, generator: torch.Generator) -> Sample:
    shape = (24, 256)
    kind = GptqFormat(4, 128, torch.float16, awq, offset, order)
    views = _like(kind, shape, generator)
    if order:
        views["w.group"] = torch.randint(0, 2, (shape[1],), generator=generator, dtype=torch.int32)

    def along_outputs(name: str, line: int, row: int) -> int:
        place = AWQ_PLACES[row % 8] if awq else row % 8
        return (int(views[name][line, row // 8]) >> (4 * place)) & 15

    def value(row: int, column: int) -> float:
        own = int(views["w.group"][column]) if order else column // 128
        along_inputs = (int(views["w"][column // 8, row]) >> (4 * (column % 8))) & 15 if not awq else 0
        code = along_outputs("w", column, row) if awq else along_inputs
        zero = along_outputs("w.zero", own, row) + offset
        if offset:
            zero &= 15
        return (code - zero) * np.float32(views["w.scale"][own, row].item())  # type: ignore[no-any-return]

    shown = f"{'awq' if awq else 'gptq'} offset {offset}{' ordered' if order else ''}"
    return Sample(shown, kind, views, shape, lambda: _by_value(shape, value))


def _bnb(kind: str, generator: torch.Generator) -> Sample:
    own = BnbFourBitFormat(kind, SHAPE[1])
    views = _like(own, SHAPE, generator)
    views["w.quant_map"] = torch.tensor(NF4 if kind == "nf4" else [value / 6 for value in E2M1])
    codes, maxima = views["w"].flatten().numpy(), views["w.absmax"].numpy()
    table = views["w.quant_map"].numpy()

    def value(row: int, column: int) -> float:
        place = row * SHAPE[1] + column
        code = (int(codes[place // 2]) >> (0 if place % 2 else 4)) & 15
        return table[code] * maxima[place // 64]  # type: ignore[no-any-return]

    return Sample(f"bitsandbytes {kind}", own, views, SHAPE, lambda: _by_value(SHAPE, value))


def _bnb_int8(generator: torch.Generator) -> Sample:
    kind = BnbInt8Format()
    views = _like(kind, SHAPE, generator)
    values, scales = views["w"].numpy(), views["w.scb"].numpy()
    reciprocal = np.float32(7.874015718698502e-3)
    return Sample(
        "bitsandbytes int8",
        kind,
        views,
        SHAPE,
        lambda: _by_value(SHAPE, lambda r, c: np.float32(values[r, c]) * scales[r] * reciprocal),
    )


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two float32 tensors have the same bits, but for what is no number."""
    equal = found.view(torch.int32) == expected.view(torch.int32)
    return bool((equal | (found.isnan() & expected.isnan())).all())
