"""How compiled code reads packed weights as 16-bit integers with scales, in the order of the inputs' integers.

Vectors are as wide as the CPU's registers. A lane of 32 bits holds two integers, so that scales are given by lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from llvmlite import ir

from edgemoe.formats.gguf_format import BLOCKS
from edgemoe.kernels.cpu.cpu_features import has
from edgemoe.kernels.cpu.packed import widen_gguf
from edgemoe.kernels.cpu.packed.int16_inputs import GROUP, SHORT, Layout
from edgemoe.kernels.cpu.vector_ir import INT, joined, load, load_bytes, offset, part, same

Set = tuple[Any, list[Any]]
"""Scales, a float32 for each lane, and the vectors of integers that they belong to, in the order of the inputs."""


def width() -> int:
    """16-bit integers in the widest register."""
    return 32 if has("avx512bw") else 16


class Codes(Protocol):
    """The reading of one format."""

    nbytes: int
    """Of a unit of columns."""

    @property
    def layout(self) -> Layout:
        """How inputs are laid out."""

    def emit(self, builder: Any, address: Any) -> tuple[Iterator[Set], Any]:
        """The weights of the unit at `address`, and what the sums of the inputs are multiplied by: float32, or None."""


class Bytes:
    """Blocks of 32 columns with one scale, whose codes are made to be bytes in the order of the columns."""

    unit = 64

    def __init__(self, kind: str) -> None:
        columns, self._block = BLOCKS[kind]
        self._codes = BYTES[kind]
        self.nbytes = self.unit // columns * self._block
        self.layout = Layout(self.unit, tuple((at,) for at in range(0, self.unit, GROUP)))

    def emit(self, builder: Any, address: Any) -> tuple[Iterator[Set], Any]:
        """See `Codes`."""
        return self._sets(builder, address), None

    def _sets(self, builder: Any, address: Any) -> Iterator[Set]:
        for number in range(self.unit // GROUP):
            block = offset(builder, address, self._block * number)
            step = widen_gguf.first(builder, block, width() // 2)
            codes = builder.sext(self._codes(builder, offset(builder, block, 2)), ir.VectorType(SHORT, GROUP))
            yield step, [part(builder, codes, at, width()) for at in range(0, GROUP, width())]


def _q8_0(builder: Any, address: Any) -> Any:
    return load_bytes(builder, address, GROUP)


def _q4_0(builder: Any, address: Any) -> Any:
    codes = widen_gguf.halves(builder, address)
    return builder.sub(codes, same(codes, 8))


def _q5_0(builder: Any, address: Any) -> Any:
    codes = widen_gguf.five_bits(builder, address)
    return builder.sub(codes, same(codes, 16))


BYTES: dict[str, Callable[[Any, Any], Any]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q5_0": _q5_0}
"""Of a builder and the address behind a block's scale: the signed codes, 32 bytes."""


class High(NamedTuple):
    """Where the upper bits of codes lie: in 32 bytes, a few bits of each for one group of 32 columns."""

    at: int
    """Where the bytes are in a block."""
    bits: int
    step: int = 0
    """Bytes from those of one half of the columns to those of the other."""


class Scales(NamedTuple):
    """What a block of 256 columns is scaled by."""

    steps: Any
    """Float32, one for every group of columns."""
    lows: Any = None
    """What the sums of the inputs are multiplied by; None where these are the steps."""


class KType(NamedTuple):
    """One of GGUF's types of 256 columns in groups of 32: pieces of 32 bytes, whose codes lie one above the other."""

    at: int
    """Where the pieces begin."""
    pieces: int
    bits: int
    """Of the lower part of a code."""
    number: Callable[[int, int], int]
    """Of a piece and the number of a code in its bytes: the group of columns."""
    scales: Callable[[Any, Any], Scales]
    each: int
    """Columns of a scale, 16 or 32."""
    times: int = 1
    """See `Layout`: 1, or what is added to every code."""
    sums: int = 16
    high: High | None = None


class KCodes:
    """Codes of a `KType`: a word of 16 bits holds the codes of two columns, the even one lower."""

    def __init__(self, kind: str) -> None:
        self._type = K_TYPES[kind]
        self.nbytes = BLOCKS[kind][1]

    @cached_property
    def layout(self) -> Layout:
        """See `Codes`: the even columns of as many groups as a vector holds, then the odd ones."""
        places: dict[int, tuple[int, int]] = {}
        at = 0
        for pieces, code in self._vectors():
            for place, piece in enumerate(pieces):
                even = at + GROUP // 2 * place
                places[self._type.number(piece, code)] = even, even + width()
            at += 2 * width()
        of = self._type
        return Layout(256, tuple(places[group] for group in range(8)), of.each, of.times, of.sums)

    def emit(self, builder: Any, address: Any) -> tuple[Iterator[Set], Any]:
        """See `Codes`."""
        scales = self._type.scales(builder, address)
        lows = scales.steps if scales.lows is None else scales.lows
        return self._sets(builder, address, scales.steps), lows

    def _vectors(self) -> Iterator[tuple[list[int], int]]:
        """The pieces of a vector, and the number of the codes in their bytes, in the order of the inputs."""
        wide, of = width() // 16, self._type
        for first in range(0, of.pieces, wide):
            for code in range(8 // of.bits):
                yield list(range(first, first + wide)), code

    def _sets(self, builder: Any, address: Any, steps: Any) -> Iterator[Set]:
        of = self._type
        loaded: tuple[int, Any] = (-1, None)
        for pieces, code in self._vectors():
            if loaded[0] != pieces[0]:
                at = offset(builder, address, of.at + 32 * pieces[0])
                loaded = pieces[0], load(builder, at, ir.VectorType(SHORT, width()), align=1)
            groups = [of.number(piece, code) for piece in pieces]
            upper = self._upper(builder, address, groups)
            codes = [self._codes(builder, loaded[1], of.bits * code + byte, byte, upper, groups) for byte in (0, 8)]
            yield self._lanes(builder, steps, groups), codes

    def _codes(self, builder: Any, words: Any, shift: int, byte: int, upper: Any, groups: Sequence[int]) -> Any:
        """The codes of the even columns, or of the odd ones, which are the upper `byte` of each of the `words`."""
        bits = self._type.bits
        codes = builder.lshr(words, same(words, shift)) if shift else words
        if shift + bits < 16:
            codes = builder.and_(codes, same(codes, (1 << bits) - 1))
        if upper is None:
            return codes
        assert self._type.high is not None
        width_ = self._type.high.bits
        shifts = [byte + width_ * (group % (8 // width_)) - bits for group in groups]
        return builder.or_(codes, _moved(builder, upper, shifts, ((1 << width_) - 1) << bits))

    def _upper(self, builder: Any, address: Any, groups: Sequence[int]) -> Any:
        """The words of the upper bits, for every piece of a vector; None where codes have none."""
        high = self._type.high
        if high is None:
            return None
        at = offset(builder, address, high.at + high.step * (groups[0] // 4))
        words = load(builder, at, ir.VectorType(SHORT, 16), align=1)
        return joined(builder, words, words) if width() == 32 else words

    def _lanes(self, builder: Any, steps: Any, groups: Sequence[int]) -> Any:
        """The scale of every lane of a vector with the `groups`, of which each has 8 lanes."""
        per = GROUP // self._type.each
        places = [per * group + each for group in groups for each in range(per) for _ in range(8 // per)]
        return builder.shuffle_vector(steps, steps, ir.Constant(ir.VectorType(INT, len(places)), places))


def _moved(builder: Any, words: Any, shifts: Sequence[int], mask: int) -> Any:
    """`words` moved right, each of its parts by one of the `shifts` (left where that is negative), under `mask`."""
    by = [shift for shift in shifts for _ in range(16)]
    if min(by) < 0 < max(by):
        # Nothing is lost: the mask is of the lowest bits.
        raised = builder.shl(words, ir.Constant(words.type, [max(0, -each) for each in by]))
        words, by = raised, [max(0, each) for each in by]
    if max(by) > 0:
        words = builder.lshr(words, ir.Constant(words.type, by))
    elif min(by) < 0:
        words = builder.shl(words, ir.Constant(words.type, [-each for each in by]))
    return builder.and_(words, same(words, mask))


def _q4_scales(builder: Any, block: Any) -> Scales:
    # The second half of the 16 is what is added: its products with sums, of which the first half are 0.
    return Scales(widen_gguf.steps_and_lows(builder, block))


K_TYPES = {
    "Q2_K": KType(16, 2, 2, lambda piece, code: 4 * piece + code, lambda *of: Scales(*widen_gguf.q2_scales(*of)), 16),
    "Q3_K": KType(
        32, 2, 2, lambda piece, code: 4 * piece + code, lambda *of: Scales(widen_gguf.q3_scales(*of)), 16, -4,
        high=High(0, 1),
    ),
    "Q4_K": KType(16, 4, 4, lambda piece, code: 2 * piece + code, _q4_scales, 32),
    "Q5_K": KType(48, 4, 4, lambda piece, code: 2 * piece + code, _q4_scales, 32, high=High(16, 1)),
    "Q6_K": KType(
        0, 4, 4, lambda piece, code: 4 * (piece // 2) + piece % 2 + 2 * code,
        lambda *of: Scales(widen_gguf.q6_scales(*of)), 16, -32, high=High(128, 2, 32),
    ),
}  # fmt: skip


def codes_of(kind: str) -> Codes:
    """The reading of GGUF's type `kind`, one of `KINDS`."""
    return KCodes(kind) if kind in K_TYPES else Bytes(kind)


KINDS = (*BYTES, *K_TYPES)
"""GGUF's types that are read so."""
