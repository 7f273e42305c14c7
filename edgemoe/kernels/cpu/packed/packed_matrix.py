"""The compiled kernel for a packed format, and matrices that it reads: in the slots of a pool, or one by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemoe.formats.bnb_format import BnbFourBitFormat, BnbInt8Format
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.fp8_format import Fp8Format
from edgemoe.formats.gguf_format import GgufFormat
from edgemoe.formats.int_group_format import IntGroupFormat
from edgemoe.formats.mxfp4_format import Mxfp4Format
from edgemoe.formats.nvfp4_format import Nvfp4Format
from edgemoe.formats.stacked_format import StackedFormat
from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.cpu.arrays import Groups, Job, Matrix
from edgemoe.kernels.cpu.slot_matrix import ANY_TOKENS
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.kernels.packed_linear import TILE_VALUES, tiled_linear

if TYPE_CHECKING:
    from edgemoe.cache.compiled import Native
    from edgemoe.kernels.cpu.program import Step

FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

PORTION = 128
"""Tokens whose inputs stay in the second cache while all rows pass."""
FIRST_CACHE = 24 << 10
"""Bytes of rounded inputs that stay in the first cache of the CPU beside a row."""


@dataclass(frozen=True)
class PackedKernel:
    """A compiled loop over matrices of one format."""

    loop: Native
    """A function of `packed_kernels`, compiled."""
    parts: tuple[str, ...]
    """The suffixes of the names of the parts that it reads, in its order."""
    int16: Int16Kernel | None = None
    """What multiplies faster, where there is something."""


@dataclass(frozen=True)
class Int16Kernel:
    """Compiled loops that multiply inputs of 16-bit integers."""

    rounding: Native
    """Rounds inputs to them."""
    loop: Native
    """Multiplies what was rounded."""
    nbytes: int
    """Of a rounded token."""
    portion: int
    """Tokens that are multiplied together."""

    def rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, Step]:
        """Where the rounded rows of `x` will be, uint8 [rows, nbytes], and the step that writes them.

        `x` is float32 [rows, columns], and may be written by earlier steps. Rows that are all one are rounded once.
        """
        from edgemoe.kernels.cpu.program import Step
        from edgemoe.kernels.cpu.row_kernels import Words

        rows, columns = x.shape
        count = 1 if x.stride(0) == 0 else rows
        out = torch.empty(count, self.nbytes, dtype=torch.uint8)
        job = Job(Words(x.data_ptr(), 4 * x.stride(0), out.data_ptr(), columns), (x, out))
        return out.expand(rows, -1) if count < rows else out, Step(self.rounding, job, count, 4 * count * columns)


def packed_kernel(kind: WeightFormat, columns: int) -> PackedKernel | None:
    """The kernel for matrices of `columns` columns in the format `kind`; None when there is none."""
    found = _named(kind, columns)
    if found is None:
        return None
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu.dot_block import Widened
    from edgemoe.kernels.cpu.packed import packed_kernels

    name, parts = found
    run = getattr(packed_kernels, name, None)
    needs_halves = isinstance(kind, (GgufFormat, Fp8Format, Nvfp4Format)) or name.endswith("f16")
    if run is None or (needs_halves and not Widened.available("f16")):
        return None
    # Compiled now, and not with the first token.
    _ = run.call
    return PackedKernel(run, parts, _int16_kernel(kind, columns))


def _int16_kernel(kind: WeightFormat, columns: int) -> Int16Kernel | None:
    """The loops for integers of matrices of `columns` columns, where the format's weights are such."""
    from edgemoe.kernels.cpu.packed import int16_kernels
    from edgemoe.kernels.cpu.packed.int16_codes import BYTES, KINDS, codes_of, width
    from edgemoe.kernels.cpu.packed.int16_dots import TOGETHER

    if not isinstance(kind, GgufFormat) or kind.kind not in KINDS:
        return None
    layout = codes_of(kind.kind).layout
    if not layout.fits(columns):
        return None
    laid_out = "bytes" if kind.kind in BYTES else kind.kind.lower()
    rounding, loop = getattr(int16_kernels, f"rounded_{laid_out}"), getattr(int16_kernels, f"int16_{kind.kind.lower()}")
    _ = rounding.call, loop.call
    nbytes, portion = layout.nbytes(columns), TOGETHER[width()]
    return Int16Kernel(rounding, loop, nbytes, portion if portion * nbytes <= FIRST_CACHE else portion // 2)


def _named(kind: WeightFormat, columns: int) -> tuple[str, tuple[str, ...]] | None:
    """The name of the function in `packed_kernels`, if it is there, and the parts that it reads."""
    match kind:
        case FloatFormat() if columns % 32 == 0:
            return f"floats_{FLOATS[kind.dtype]}", ("",)
        case GgufFormat():
            return f"gguf_{kind.kind.lower()}", ("",)
        case Mxfp4Format():
            return "mxfp4", ("", ".scale")
        case Nvfp4Format():
            return f"nvfp4_{'divided' if kind.divides else 'multiplied'}", ("", ".scale", ".factor")
        case BnbFourBitFormat() if kind.block == 64 and columns % 64 == 0:
            return "four_bits", ("", ".absmax", ".quant_map")
        case BnbInt8Format() if columns % 32 == 0:
            return "rows_of_int8", ("", ".scb")
        case IntGroupFormat() if columns % 32 == 0 and kind.bits == 4 and not (kind.has_zeros or kind.reordered):
            return f"int4_{kind.group}_{FLOATS[kind.scale_dtype]}", ("", ".scale")
        case Fp8Format() if columns % 32 == 0 and kind.dtype is torch.float8_e4m3fn:
            shape = {(128, 128): "blocks", (1, 0): "rows", (0, 0): "one"}.get(kind.block, "others")
            return f"fp8_{shape}_{FLOATS[kind.scale_dtype]}", ("", ".scale")
    return None


def fits(kind: WeightFormat, columns: int) -> bool:
    """Whether there are kernels for matrices of `columns` columns in the format `kind`."""
    return all(packed_kernel(each, columns) is not None for each in _stacked(kind))


class PackedMatrix:
    """A matrix [rows, columns] at one place of records in memory, which kernels read packed. On the CPU."""

    max_tokens = ANY_TOKENS
    """Tokens up to which products are summed in one order."""

    def __init__(
        self,
        kind: WeightFormat,
        shape: tuple[int, int],
        memory: torch.Tensor,
        places: Mapping[str, int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`fits` must hold. `memory` is uint8 [records, bytes]; `places` are the offsets of the format's parts.

        Their names are those of `kind.parts("", shape)`. They may lie outside of a record, as long as it is the only
        one. `dtype` is that of the model: where it is bf16, so are what is multiplied and the weights, if a kernel can.
        """
        self._rows, self._columns = shape
        self._memory = memory
        formats = _stacked(kind)
        self.interleaved = isinstance(kind, StackedFormat) and kind.interleaved
        """Whether the rows of two matrices take turns, so that products have to be put in order."""
        self._height = self._rows // len(formats)
        self._pieces: list[tuple[PackedKernel, Matrix]] = []
        for number, each in enumerate(formats):
            kernel = packed_kernel(each, self._columns)
            assert kernel is not None, f"there is no kernel for {each}"
            prefix = f".{number}" if isinstance(kind, StackedFormat) else ""
            offsets = tuple(places[prefix + suffix] for suffix in kernel.parts)
            self._pieces.append((kernel, Matrix(memory.data_ptr(), memory.stride(0), self._columns, offsets)))
        self._nbytes = sum(part.nbytes for part in kind.parts("", shape))
        halves = dtype is torch.bfloat16 and all(_are_pairs(each, self._columns) for each in formats)
        self.inputs = torch.bfloat16 if halves else torch.float32
        """The dtype of what is multiplied."""

    @classmethod
    def of_views(cls, kind: WeightFormat, views: Mapping[str, torch.Tensor], name: str, columns: int) -> PackedMatrix:
        """The matrix `name` of one record, given by its parts, which must stay where they are."""
        rows = kind.height(views, name)
        names = [part.name for part in kind.parts("", (rows, columns))]
        base = views[name + names[0]]
        memory = base.flatten().view(torch.uint8).view(1, -1)
        return cls(
            kind, (rows, columns), memory, {each: views[name + each].data_ptr() - base.data_ptr() for each in names}
        )

    def product(self, groups: Groups, x: torch.Tensor) -> tuple[torch.Tensor, list[Step]]:
        """See `SlotMatrix.product`. Of interleaved matrices the rows of one follow those of the other."""
        from edgemoe.kernels.cpu.gemv_kernels import ROWS_TOGETHER, grouped_gemv_bf16_pairs, results
        from edgemoe.kernels.cpu.packed.packed_dots import tile_values
        from edgemoe.kernels.cpu.program import Step

        out, steps = results(len(x), self._rows), []
        nbytes, rounded = self._nbytes * len(groups.slots) // len(self._pieces), {}
        for number, (kernel, matrix) in enumerate(self._pieces):
            if self.inputs is torch.bfloat16:
                job = matrix.only_part.product(groups.in_portions(PORTION), x, out, number * self._height)
                steps.append(Step(grouped_gemv_bf16_pairs, job, self._height, nbytes, ROWS_TOGETHER))
                continue
            if kernel.int16 is None:
                own = groups.in_portions(PORTION)
                job, needed = (
                    matrix.product(own, x, out, number * self._height),
                    tile_values(self._columns, own.largest),
                )
                steps.append(Step(kernel.loop, job, self._height, nbytes, ROWS_TOGETHER, 4 * needed))
                continue
            if kernel.int16 not in rounded:
                rounded[kernel.int16], rounding = kernel.int16.rounded(x)
                steps.append(rounding)
            own = groups.in_portions(kernel.int16.portion)
            job = matrix.product(own, rounded[kernel.int16], out, number * self._height)
            steps.append(Step(kernel.int16.loop, job, self._height, nbytes, ROWS_TOGETHER))
        return out, steps

    def multiply(self, threads: KernelThreads, groups: Groups, x: torch.Tensor) -> torch.Tensor:
        """See `SlotMatrix.multiply`."""
        out, steps = self.product(groups, x.to(self.inputs).contiguous())
        threads.run(steps)
        return self._in_turn(out, 1) if self.interleaved else out

    def multiply_one(self, threads: KernelThreads, x: torch.Tensor) -> torch.Tensor:
        """The products of `x`, [tokens, columns], with the matrix of the first record, float32 [tokens, rows]."""
        return self.multiply(threads, Groups.of_one(len(x)), x)

    def rows(self, record: int, first: int, last: int) -> torch.Tensor:
        """The rows first ≤ r < last of the matrix in one record, float32 [rows, columns]: bits of the format's `rows`.

        Of interleaved matrices all rows alone.
        """
        assert not self.interleaved or (first, last) == (0, self._rows)
        tile = torch.empty(last - first, self._columns)
        number = np.array([record])
        for piece, low, high in self._within(first, last):
            kernel, matrix = self._pieces[piece]
            widening = matrix.widening(number)
            into = tile[piece * self._height + low - first :]
            kernel.loop.call(widening.address, into.data_ptr(), low, high)
        return self._in_turn(tile, 0) if self.interleaved else tile

    def linear(self, record: int, x: torch.Tensor) -> torch.Tensor:
        """x · Wᵀ in float32, [..., rows], for many tokens: by PyTorch, tile by tile."""
        tile = self._rows if self.interleaved else max(1, TILE_VALUES // self._columns)
        return tiled_linear(x, self._rows, tile, lambda *span: self.rows(record, *span))

    def _within(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """The pieces that have rows first ≤ r < last, with their own numbers of these."""
        for piece in range(len(self._pieces)):
            start = piece * self._height
            low, high = max(first - start, 0), min(last - start, self._height)
            if low < high:
                yield piece, low, high

    def _in_turn(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """`values` of one piece after the other, in the order of an interleaved matrix along `dim`."""
        pieces: torch.Tensor = values.unflatten(dim, (len(self._pieces), self._height))
        return pieces.transpose(dim, dim + 1).flatten(dim, dim + 1)


def _are_pairs(kind: WeightFormat, columns: int) -> bool:
    """Whether matrices are multiplied by inputs of bf16 as they are."""
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu import gemv_kernels

    if not isinstance(kind, FloatFormat) or kind.dtype is not torch.bfloat16:
        return False
    own = gemv_kernels.row_kernel(kind.dtype, columns)
    return own is not None and own.inputs is torch.bfloat16


def _stacked(kind: WeightFormat) -> tuple[WeightFormat, ...]:
    return kind.formats if isinstance(kind, StackedFormat) else (kind,)
