"""`device-kernels`: the kernels of experts in Triton's interpreter, every format and layout, against PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from bench.measurement import CHECKOUT, BaseSize, Measurement
from bench.support.format_samples import samples
from bench.support.no_card.quick_interpreter import quick_interpreter
from edgemoe.cache.record import Part, RecordLayout
from edgemoe.cache.slots import SlotRegion
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.experts.expert_ffn import PlainExperts, TokenGroups
from edgemoe.formats.bnb_format import BnbFourBitFormat
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.fp8_format import Fp8Format
from edgemoe.formats.gguf_format import BLOCKS, GgufFormat
from edgemoe.formats.stacked_format import StackedFormat
from edgemoe.formats.weight_format import MakeableFormat, WeightFormat
from edgemoe.kernels.cpu.threads import torch_threads
from edgemoe.kernels.triton.availability import missing

if TYPE_CHECKING:
    from edgemoe.kernels.triton.activations import GateRule
    from edgemoe.kernels.triton.grouped_ffn import GroupedFfn, GroupedMatrix

NAME = "device-kernels"
BAR = "error <= 1e-5 in float32; a token alone gives the bits it gives among others"
MAX_ERROR = 1e-5
"""Of the largest output."""
EXPERTS, TOP_K, FEW = 4, 2, 24
"""`FEW` is the short side of a matrix; the long one is what the format needs."""
GGUF_SCALES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)
}  # fmt: skip
"""The bytes where a block has fp16 scales, if not one at its beginning: random ones would be huge, or no numbers."""
MANY = 17
"""Tokens from which on the form for many is tried; in the first layout with fewer, too."""
LONG = 256
"""Columns from which on the short side is `SHORT` and few tokens are fewer: the interpreter takes 10 ms a program."""
SHORT = 16


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The numbers of tokens, and the formats by name; none stands for all."""

    tokens: tuple[int, ...] = (1, 5, 17, 64)
    formats: tuple[str, ...] = ()


FULL, SMALL = Size(), Size(small=True, tokens=(1, 2), formats=("mxfp4",))


@dataclass(frozen=True)
class Layout:
    """How the matrices of an expert lie in a record, and what is between them: the fields of a `GateRule`."""

    name: str
    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    constants: tuple[float, ...] = ()
    bias: bool = False
    transposed: bool = False
    stacked: bool = False


LAYOUTS = (
    Layout("gated"),
    Layout("gated, bias", bias=True),
    Layout("no gate", "relu2", gated=False),
    Layout("interleaved, bias", "swiglu", interleaved=True, constants=(1.702, 2.0), bias=True),
    Layout("transposed", "gelu_pytorch_tanh", transposed=True),
    Layout("stacked", "gelu", stacked=True),
    Layout("stacked, interleaved", "clamped_silu", interleaved=True, constants=(2.0,), stacked=True),
)


def content(kind: WeightFormat, shape: tuple[int, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The parts of a random matrix by the suffixes of their names; its values are finite."""
    values = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    if isinstance(kind, FloatFormat):
        return {"": values.to(kind.dtype)}
    if isinstance(kind, StackedFormat):
        own = (kind.part_height, shape[1])
        pieces = [(at, content(each, own, generator)) for at, each in enumerate(kind.formats)]
        return {f".{at}{name}": part for at, parts in pieces for name, part in parts.items()}
    found = {part.name: _random_part(part, shape[1], kind, generator) for part in kind.parts("", shape)}
    if isinstance(kind, MakeableFormat) and set(made := kind.quantize(values)) == set(found):
        return made
    return found


def _random_part(part: Part, columns: int, kind: WeightFormat, generator: torch.Generator) -> torch.Tensor:
    if part.name == ".group":
        # Columns in the order of their groups, shuffled.
        order = torch.randperm(columns, generator=generator)
        return (torch.arange(columns) // (getattr(kind, "group", 0) or columns))[order].to(part.dtype)
    if part.dtype.is_floating_point:
        scale = 100.0 if part.dtype.itemsize == 1 else 0.1
        values = scale * torch.randn(part.shape, generator=generator)
        return (values.abs() + 0.1 * scale if part.name else values).clamp(-400, 400).to(part.dtype)
    # Exponents alone, of about 1.
    bounds = (117, 127) if part.name == ".scale" else (0, 256)
    raw = torch.randint(*bounds, (part.nbytes,), generator=generator, dtype=torch.uint8)
    if isinstance(kind, GgufFormat):
        blocks = raw.view(-1, BLOCKS[kind.kind][1])
        if kind.kind == "MXFP4":
            blocks[:, 0] = 117 + blocks[:, 0] % 10
        else:
            for at in GGUF_SCALES.get(kind.kind, (0,)):
                scales = 0.1 + torch.rand(len(blocks), generator=generator)
                blocks[:, at : at + 2] = scales.half().view(torch.uint8).view(-1, 2)
    return raw.view(part.dtype).view(part.shape)


class Case:
    """Random experts of one format and layout in slots, their plain form, and the kernels of them.

    `outer` and `inner` are the sizes of the hidden states and of what is between the matrices.
    """

    def __init__(
        self, up: WeightFormat, down: WeightFormat, outer: int, inner: int, layout: Layout, seed: int = 0
    ) -> None:
        self.layout = layout
        self._generator = torch.Generator().manual_seed(seed)
        self.name = "gate_up_proj" if layout.gated else "up_proj"
        both = 2 * inner if layout.gated else inner
        self.outer, self.formats = outer, {self.name: up, "down_proj": down}
        self.shapes = {self.name: (both, outer), "down_proj": (outer, inner)}
        stored = {name: self._stored(name) for name in self.shapes}
        parts = [part for name, kind in self.formats.items() for part in kind.parts(name, stored[name])]
        if layout.bias:
            parts += [Part(f"{name}_bias", shape[:1], torch.float32) for name, shape in self.shapes.items()]
        self.records = RecordLayout(parts)
        # Slot 1 is nobody's, and the slots are in another order than the experts.
        self.slots = [3, 0, 4, 2]
        self.memory = torch.full((EXPERTS + 1, self.records.nbytes), 255, dtype=torch.uint8)
        for slot in self.slots:
            self._fill(self.records.views(self.memory[slot]), stored)
        module = SimpleNamespace(
            has_gate=layout.gated, has_bias=layout.bias, _apply_gate=self._activate, act_fn=self._activate
        )
        transposed = frozenset(self.shapes if layout.transposed else ())
        moe = ExpertsModule("experts", EXPERTS, self.records, self.formats, stored, transposed)
        self._plain = PlainExperts(module, moe, SlotRegion(self.memory, 0))
        first = self._plain.region.views(self.slots[0], self.records)
        weights = up.dequantize(first, self.name).float()
        self._scale = float(weights.square().mean().sqrt()) * outer**0.5

    def _stored(self, name: str) -> tuple[int, int]:
        rows, columns = self.shapes[name]
        return (columns, rows) if self.layout.transposed else (rows, columns)

    def _fill(self, views: Mapping[str, torch.Tensor], stored: Mapping[str, tuple[int, int]]) -> None:
        for name, kind in self.formats.items():
            for suffix, part in content(kind, stored[name], self._generator).items():
                views[name + suffix].copy_(part)
            if self.layout.bias:
                views[f"{name}_bias"].normal_(generator=self._generator)

    @property
    def rule(self) -> GateRule:
        """What is between the matrices."""
        from edgemoe.kernels.triton.activations import GateRule

        layout = self.layout
        return GateRule(layout.activation, layout.gated, layout.interleaved, layout.constants)

    def _activate(self, values: torch.Tensor) -> torch.Tensor:
        from edgemoe.kernels.triton.activations import plain_activation

        return plain_activation(self.rule, values)

    def matrix(self, name: str) -> GroupedMatrix:
        """The matrix `name` as kernels read it. Raises ValueError if none does."""
        from edgemoe.kernels.triton.grouped_ffn import GroupedMatrix

        kind, shape, records = self.formats[name], self.shapes[name], self.records
        bias = records.part_offset(f"{name}_bias") if self.layout.bias else None
        device, transposed = torch.device("cpu"), self.layout.transposed
        return GroupedMatrix(kind, shape, records.places(name), device, transposed=transposed, bias=bias)

    def ffn(self, dtype: torch.dtype = torch.float32) -> GroupedFfn:
        """The kernels."""
        from edgemoe.kernels.triton.grouped_ffn import GroupedFfn
        from edgemoe.kernels.triton.launcher import Launcher

        matrices = self.matrix(self.name), self.matrix("down_proj")
        return GroupedFfn(Launcher(), self.memory, *matrices, self.rule, dtype)

    def tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states whose products with the first matrix are about 1, [tokens, outer]; and choices, [tokens, k]."""
        hidden = torch.randn(count, self.outer, generator=self._generator) / self._scale
        chosen = [torch.randperm(EXPERTS, generator=self._generator)[:TOP_K] for _ in range(count)]
        return hidden, torch.stack(chosen)

    def pair_slots(self, ids: torch.Tensor) -> torch.Tensor:
        """The slot of each pair, int32 [pairs]."""
        return torch.tensor(self.slots, dtype=torch.int32)[ids.flatten()]

    def expected(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The plain form's outputs, [pairs, outer]."""
        groups = TokenGroups(hidden, ids, torch.ones(ids.shape), EXPERTS)
        self._plain.compute(groups, groups.wanted, [self.slots[expert] for expert in groups.wanted])
        return groups.outputs

    def computed(self, ffn: GroupedFfn, hidden: torch.Tensor, ids: torch.Tensor, *, many: bool) -> torch.Tensor:
        """The kernels' outputs, [pairs, outer]: those for many tokens, or for few."""
        slots = self.pair_slots(ids)
        outputs = torch.full((len(slots), self.outer), float("nan"), dtype=hidden.dtype)
        if many:
            ffn.run_many(hidden, ids, slots, outputs, TOP_K, EXPERTS)
        else:
            ffn.run(hidden, slots, outputs, TOP_K)
        return outputs


def cases(kind: WeightFormat, columns: int) -> Iterator[Case]:
    """Every layout that the format has, as the first matrix, and as the second one; the other one is float32."""
    other, few = FloatFormat(torch.float32), SHORT if columns >= LONG else FEW
    # What 16-bit floats alone give is rounded, which the interpreter does not do right: as parts of others it is not.
    narrow = isinstance(kind, FloatFormat) and kind != other
    for layout in LAYOUTS:
        if layout.stacked:
            yield Case(StackedFormat((kind, other), few, layout.interleaved), other, columns, few, layout)
        elif not narrow and not (layout.transposed and kind != other):
            yield Case(kind, other, columns, few, layout)
    if not narrow:
        yield Case(other, kind, few, columns, Layout("second, bias", bias=True))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference against the largest value; no number where one of the values is none."""
    return float((found - expected).abs().max() / expected.abs().max())


def faults_of(case: Case, rows: Sequence[int], tiles: Sequence[int]) -> tuple[float, list[str]]:
    """The largest error of a case, and what is wrong with it.

    `rows` are the numbers of tokens that the form for few is tried with, `tiles` those for many; ascending. Those of a
    smaller number are the first ones of a larger one, and have to have the same bits there.
    """
    ffn, worst, faults = case.ffn(), 0.0, []
    hidden, ids = case.tokens(max(*rows, *tiles, 1))
    expected = case.expected(hidden, ids)
    for form, counts in (("rows", rows), ("tiles", tiles)):
        before = torch.empty(0, case.outer)
        for count in counts:
            found = case.computed(ffn, hidden[:count], ids[:count], many=form == "tiles")
            own = error(found, expected[: count * TOP_K])
            # Not by `max`, which may pass a NaN over.
            worst = worst if own <= worst else own
            if not own <= MAX_ERROR:
                faults.append(f"{count} tokens, {form}: an error of {own:.1e}")
            if not torch.equal(before, found[: len(before)]):
                faults.append(f"{count} tokens, {form}: other bits than those of fewer")
            before = found
    return worst, faults


def tried(layout: Layout, columns: int, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """The numbers of tokens that each of the two forms is tried with: both with most of them in the first layout."""
    if layout == LAYOUTS[0]:
        return [count for count in tokens if count < MANY or (count == MANY and columns < LONG)], list(tokens)
    return [count for count in tokens if count < MANY], [count for count in tokens if count >= MANY]


def formats() -> Iterator[tuple[str, WeightFormat, int]]:
    """Every format, its name, and columns that it has rows of, as few as show all of its blocks and groups."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield FloatFormat(dtype).name, FloatFormat(dtype), 136
    for kind, sample in {sample.format: sample for sample in samples(0)}.items():
        if isinstance(kind, GgufFormat):
            yield sample.name, kind, max(64, BLOCKS[kind.kind][0])
        elif isinstance(kind, BnbFourBitFormat):
            yield sample.name, replace(kind, columns=64), 64
        else:
            group = getattr(kind, "group", 0)
            # Names say the columns where a format has samples of several; here it has one.
            columns = 136 if isinstance(kind, Fp8Format) else max(64, 2 * group)
            yield sample.name.removesuffix(f", {sample.shape[1]} columns"), kind, columns


def run(size: Size = FULL) -> Measurement:
    """Formats one after the other, in the interpreter, which is chosen when Triton is first imported: in a process."""
    command = [sys.executable, "-m", __name__, json.dumps(asdict(size))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def main(size: str) -> None:
    """Measures what `run` asks for, a `Size` in JSON, and prints it."""
    chosen: dict[str, Any] = json.loads(size)
    chosen |= {name: tuple(value) for name, value in chosen.items() if isinstance(value, list)}
    if reason := missing():
        measurement = Measurement(NAME, None, BAR, None, {"why": reason})
    else:
        with torch_threads(1), quick_interpreter():
            measurement = _measured(Size(**chosen))
    print(measurement.to_json())


def _measured(size: Size) -> Measurement:
    from edgemoe.kernels.triton.grouped_ffn import GroupedMatrix

    wrong: list[str] = []
    unread: list[str] = []
    errors: dict[str, Any] = {}
    for name, kind, columns in formats():
        if size.formats and name not in size.formats:
            continue
        if not GroupedMatrix.fits(kind, (2 * FEW, columns)):
            unread.append(name)
            continue
        began, largest = time.perf_counter(), 0.0
        for case in cases(kind, columns):
            own, faults = faults_of(case, *tried(case.layout, columns, size.tokens))
            wrong += [f"{name}, {case.layout.name}: {fault}" for fault in faults]
            largest = largest if own <= largest else own
        errors[name] = float(f"{largest:.1e}")
        if not size.small:
            print(f"{name:30} {largest:.1e} {time.perf_counter() - began:6.1f} s", file=sys.stderr, flush=True)
    value = {"formats": len(errors), "wrong": wrong, "without_kernel": unread}
    detail = {"errors": errors, "layouts": [each.name for each in LAYOUTS], "tokens": size.tokens}
    return Measurement(NAME, value, BAR, not wrong, detail)


if __name__ == "__main__":
    main(sys.argv[1])
