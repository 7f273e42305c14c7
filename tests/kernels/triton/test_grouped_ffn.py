from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from bench.no_card.device_kernels import (
    EXPERTS,
    FEW,
    LAYOUTS,
    TOP_K,
    Case,
    Layout,
    content,
    error,
    faults_of,
)
from bench.support.no_card.quick_interpreter import quick_interpreter
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.gguf_format import GgufFormat
from edgemoe.formats.made import made_format
from edgemoe.formats.mxfp4_format import Mxfp4Format
from edgemoe.formats.stacked_format import StackedFormat
from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.triton import grouped_ffn
from edgemoe.kernels.triton.activations import PLAIN, WHOLE, GateRule
from edgemoe.kernels.triton.grouped_ffn import GroupedMatrix, combine, packed_linear_gemv, patch, resolve
from edgemoe.kernels.triton.launcher import Launch, Launcher
from edgemoe.kernels.triton.tile_format import tile_format
from edgemoe.kernels.weighted_sum import weighted_sum
from tests.support import ROOT

FP32 = FloatFormat(torch.float32)
WIDE = 136
"""No multiple of what a program reads at a time."""


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


class Recorder:
    """Counts launches, and queues them."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.launcher = Launcher()
        self.launcher.observer = self._take

    def _take(self, launch: Launch) -> None:
        self.launches.append(launch)
        launch.run()


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if not each.stacked], ids=lambda each: each.name)
def test_each_layout_gives_what_the_plain_form_gives_and_the_same_bits_for_fewer_tokens(layout: Layout) -> None:
    assert faults_of(Case(FP32, FP32, WIDE, FEW, layout), (1, 5), (1, 5, 17))[1] == []


@pytest.mark.parametrize("name", PLAIN)
def test_each_activation_with_and_without_a_gate(name: str) -> None:
    for gated in (False, True):
        assert faults_of(Case(FP32, FP32, 40, FEW, Layout(name, name, gated=gated)), (2,), (2,))[1] == []


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("interleaved", [False, True])
def test_each_gate_with_values_beyond_its_limit(name: str, interleaved: bool) -> None:
    constants = {"swiglu": (1.702, 0.5), "wide_silu": ()}.get(name, (0.5,))
    case = Case(FP32, FP32, 40, FEW, Layout(name, name, interleaved=interleaved, constants=constants))
    assert faults_of(case, (2,), (2,))[1] == []


PACKED: list[tuple[WeightFormat, int]] = [(GgufFormat("Q4_0"), 64), (Mxfp4Format(), 64), (made_format("int4", 64), 64)]


@pytest.mark.parametrize(("kind", "columns"), PACKED, ids=lambda value: getattr(value, "name", str(value)))
def test_packed_matrices(kind: WeightFormat, columns: int) -> None:
    assert faults_of(Case(kind, FP32, columns, FEW, LAYOUTS[1]), (1, 5), (1, 5))[1] == []
    assert faults_of(Case(FP32, kind, FEW, columns, LAYOUTS[1]), (1, 5), (1, 5))[1] == []


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each.stacked], ids=lambda each: each.name)
def test_gate_and_up_of_other_formats(layout: Layout) -> None:
    up = StackedFormat((GgufFormat("Q8_0"), made_format("int8", 64)), FEW, layout.interleaved)
    assert faults_of(Case(up, FP32, 64, FEW, layout), (1, 5), (1, 5))[1] == []


def test_rows_of_17_tokens() -> None:
    assert faults_of(Case(FP32, FP32, 40, FEW, LAYOUTS[0]), (1, 17), ())[1] == []


def test_matrices_in_bfloat16() -> None:
    """Without tiles: the interpreter cannot multiply them. It cuts off where a card rounds."""
    kind = FloatFormat(torch.bfloat16)
    case = Case(kind, kind, 64, FEW, LAYOUTS[0])
    hidden, ids = case.tokens(3)
    found = case.computed(case.ffn(torch.bfloat16), hidden.bfloat16(), ids, many=False)
    assert found.dtype == torch.bfloat16
    assert error(found.float(), case.expected(hidden.bfloat16(), ids).float()) < 0.05


@pytest.mark.parametrize("many", [False, True])
def test_pairs_without_a_slot_keep_their_rows_and_change_no_others(many: bool) -> None:
    case = Case(FP32, FP32, 40, FEW, LAYOUTS[0])
    ffn = case.ffn()
    hidden, ids = case.tokens(5)
    whole = case.computed(ffn, hidden, ids, many=many)
    slots = case.pair_slots(ids)
    slots[[0, 3, 9]] = -1
    found = torch.full_like(whole, 7.0)
    if many:
        ffn.run_many(hidden, ids, slots, found, TOP_K, EXPERTS)
    else:
        ffn.run(hidden, slots, found, TOP_K)
    assert torch.equal(found, torch.where((slots < 0).unsqueeze(1), 7.0, whole))


def test_more_pairs_of_an_expert_than_a_block_has_and_experts_without_any() -> None:
    case = Case(FP32, FP32, 40, FEW, LAYOUTS[0])
    ids = torch.tensor([[2, 0]] * 150)
    hidden = case.tokens(150)[0]
    slots = case.pair_slots(ids)
    found = case.computed(case.ffn(), hidden, ids, many=True)
    assert error(found, case.expected(hidden, ids)) < 1e-5
    order, bounds = grouped_ffn._sorted_blocks(ids, slots, EXPERTS, 64)
    spans = [(first, last) for first, last in bounds.tolist() if first < last]
    assert spans == [(0, 64), (64, 128), (128, 150), (150, 214), (214, 278), (278, 300)]
    assert order.tolist() == [*range(1, 300, 2), *range(0, 300, 2)]


def test_no_pair_with_a_slot() -> None:
    case = Case(FP32, FP32, 40, FEW, LAYOUTS[0])
    hidden, ids = case.tokens(2)
    outputs = torch.full((4, 40), 7.0)
    case.ffn().run_many(hidden, ids, torch.full((4,), -1, dtype=torch.int32), outputs, TOP_K, EXPERTS)
    assert (outputs == 7.0).all()


def test_few_tokens_take_two_launches() -> None:
    case, recorder = Case(FP32, FP32, 40, FEW, LAYOUTS[0]), Recorder()
    ffn = case.ffn()
    ffn._launcher = recorder.launcher
    case.computed(ffn, *case.tokens(2), many=False)
    assert [launch.grid[0] for launch in recorder.launches] == [4, 4]


def test_what_does_not_fit_is_refused() -> None:
    case = Case(FP32, FP32, 40, FEW, LAYOUTS[0])
    up, down = case.matrix("gate_up_proj"), case.matrix("down_proj")
    with pytest.raises(ValueError, match="gives 48 values and the second one takes 24"):
        grouped_ffn.GroupedFfn(Launcher(), case.memory, up, down, GateRule("silu", False), torch.float32)
    stacked = Case(StackedFormat((FP32, FP32), FEW), FP32, 40, FEW, LAYOUTS[5])
    with pytest.raises(ValueError, match="not the gate and up"):
        grouped_ffn.GroupedFfn(
            Launcher(),
            stacked.memory,
            stacked.matrix("gate_up_proj"),
            down,
            GateRule("silu", True, True),
            torch.float32,
        )
    assert not GroupedMatrix.fits(StackedFormat((FP32, FP32, FP32), 8), (24, 40))
    assert not GroupedMatrix.fits(Mxfp4Format(), (32, 64), transposed=True)
    with pytest.raises(ValueError, match="32 x 64 weights of the format mxfp4"):
        GroupedMatrix(Mxfp4Format(), (32, 64), {"": 0, ".scale": 0}, torch.device("cpu"), transposed=True)


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("live", [None, 90])
def test_resolve_against_a_loop(ids_dtype: torch.dtype, weights_dtype: torch.dtype, live: int | None) -> None:
    torch.manual_seed(0)
    tokens, top_k, experts = 100, 3, 7
    ids = torch.randint(-1, experts + 2, (tokens, top_k), dtype=ids_dtype)
    weights = torch.rand(tokens, top_k).where(torch.rand(tokens, top_k) > 0.2, 0.0).to(weights_dtype)
    table = torch.full((3, experts), 99, dtype=torch.int32)
    table[1] = torch.tensor([5, -1, 0, 3, -1, 8, 1])
    limit = None if live is None else torch.tensor([live], dtype=torch.int32)
    slots, done, chosen = (torch.full((tokens * top_k,), 77, dtype=torch.int32) for _ in range(3))
    computed = [False] * len(slots)
    named = []
    for turn in range(3):
        expected = []
        for pair, (expert, weight) in enumerate(zip(ids.flatten().tolist(), weights.flatten().tolist(), strict=True)):
            wanted = 0 <= expert < experts and weight != 0 and pair // top_k < (live or tokens) and not computed[pair]
            expected.append(int(table[1, expert]) if wanted else -1)
            if turn == 0:
                named.append(expert if wanted else -1)
        computed = [before or slot >= 0 for before, slot in zip(computed, expected, strict=True)]
        resolve(Launcher(), ids, weights, table[1], slots, done, chosen, first=turn == 0, live=limit, top_k=top_k)
        assert slots.tolist() == expected
        assert chosen.tolist() == named
        assert [bool(each) for each in done.tolist()] == computed
        assert set(done.tolist()) == {0, 1}
        table[1, [1, 4][turn % 2]] = 11 + turn
    assert 12 in expected
    assert 11 not in expected


def test_patch_against_a_loop() -> None:
    torch.manual_seed(0)
    for count in (1, 15, 16, 17, 30):
        table = torch.randint(-1, 50, (5, 6), dtype=torch.int32)
        expected, recorder = table.clone(), Recorder()
        changes = list(
            zip(torch.randint(0, 30, (count,)).tolist(), torch.randint(-1, 99, (count,)).tolist(), strict=True)
        )
        for place, value in changes:
            expected.view(-1)[place] = value
        patch(recorder.launcher, table, changes)
        assert torch.equal(table, expected)
        assert len(recorder.launches) == math.ceil(len(dict(changes)) / 16)
    before = table.clone()
    patch(Launcher(), table, [])
    assert torch.equal(table, before)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float16])
def test_combine_against_the_plain_sum(weights_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    outputs, weights = torch.randn(5 * 3, 300), torch.rand(5, 3).to(weights_dtype)
    done = torch.ones(15, dtype=torch.int32)
    out = torch.full((5, 300), float("nan"))
    combine(Launcher(), outputs, weights, done, out)
    assert torch.allclose(out, weighted_sum(outputs, weights), rtol=1e-6, atol=1e-6)
    done[[0, 7, 12, 13, 14]] = 0
    known = torch.where((done == 0).unsqueeze(1), 0.0, outputs)
    combine(Launcher(), torch.where((done == 0).unsqueeze(1), float("nan"), outputs), weights, done, out)
    assert torch.allclose(out, weighted_sum(known, weights), rtol=1e-6, atol=1e-6)
    assert (out[4] == 0).all()


def test_products_are_rounded_as_the_multiplication_of_pytorch_does() -> None:
    """In float16, whose rounding the interpreter has."""
    torch.manual_seed(0)
    outputs, weights = torch.randn(4, 50).half(), torch.rand(2, 2).half()
    out = torch.empty(2, 50, dtype=torch.float16)
    combine(Launcher(), outputs, weights, torch.ones(4, dtype=torch.int32), out)
    assert torch.equal(out, weighted_sum(outputs, weights))


@pytest.mark.parametrize("kind", [FP32, GgufFormat("Q4_0")], ids=lambda each: each.name)
def test_a_dense_product(kind: WeightFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = content(kind, (40, 96), generator)
    form = tile_format(kind, (40, 96), {"": 0}, torch.device("cpu"))
    assert form is not None
    x = torch.randn(5, 200, generator=generator)[:, 50:146]
    memory = parts[""].view(torch.uint8).flatten()
    found = packed_linear_gemv(Launcher(), x, form, memory, 40, torch.float32)
    expected = x @ kind.dequantize({"w": parts[""]}, "w").t()
    assert error(found, expected) < 1e-5
    for token in range(5):
        alone = packed_linear_gemv(Launcher(), x[token : token + 1], form, memory, 40, torch.float32)
        assert torch.equal(alone[0], found[token])
    assert packed_linear_gemv(Launcher(), x, form, memory, 40, torch.float16).dtype == torch.float16


# --- the compiler --------------------------------------------------------------------------------

COMPILE = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.mxfp4_format import Mxfp4Format
from edgemoe.kernels.triton.activations import GateRule
from edgemoe.kernels.triton.grouped_ffn import (
    GroupedFfn, GroupedMatrix, combine, packed_linear_gemv, patch, resolve
)
from edgemoe.kernels.triton.launcher import Launcher

NAMES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
}
target = GPUTarget(sys.argv[1], int(sys.argv[2]) if sys.argv[2].isdigit() else sys.argv[2], 32)
compiled = []

def compile(launch):
    types = [
        NAMES[each.dtype] if isinstance(each, torch.Tensor) else "i64" if each >> 31 else "i32"
        for each in launch.args
    ]
    constants = {name: value for name, value in launch.constants.items() if name.isupper()}
    options = {name: value for name, value in launch.constants.items() if not name.isupper()}
    signature = dict(zip(launch.kernel.arg_names, types)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants)
    found = triton.compile(source, target=target, options=options)
    assert found.metadata.shared <= 65536, (launch.kernel.__name__, found.metadata.shared)
    compiled.append(launch.kernel.__name__)

launcher = Launcher()
launcher.observer = compile
dtype, cpu = torch.bfloat16, torch.device("cpu")
memory, slots = torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(10, dtype=torch.int32)
hidden, ids, weights = torch.zeros(5, 128).to(dtype), torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2)
outputs = torch.zeros(10, 128).to(dtype)
plain = FloatFormat(dtype)
for kind, rule, transposed, bias in (
    (plain, GateRule("silu", True), False, None),
    (plain, GateRule("swiglu", True, True, (1.702, 7.0)), True, 64),
    (plain, GateRule("gelu", False), False, None),
    (Mxfp4Format(), GateRule("clamped_silu", True, False, (7.0,)), False, 64),
    (Mxfp4Format(), GateRule("gelu_pytorch_tanh", True), False, None),
):
    places = {part.name: 0 for part in kind.parts("", (128, 128))}
    more = {"transposed": transposed, "bias": bias, "bias_dtype": dtype}
    up = GroupedMatrix(kind, (128 if rule.gated else 64, 128), places, cpu, **more)
    down = GroupedMatrix(plain, (128, 64), {"": 0}, cpu, **more)
    ffn = GroupedFfn(launcher, memory, up, down, rule, dtype)
    ffn.run(hidden, slots, outputs, 2)
    ffn.run_many(hidden, ids, slots, outputs, 2, 4)
for first in (True, False):
    resolve(launcher, ids, weights, slots, slots, slots, slots, first=first, live=slots, top_k=2)
combine(launcher, outputs, weights, slots, hidden)
patch(launcher, slots, [(3, 4)])
packed_linear_gemv(launcher, hidden, up.forms[0], memory[0], 128, dtype)
print(*sorted(set(compiled)))
"""


@pytest.mark.parametrize("target", [("cuda", "80"), ("cuda", "90"), ("hip", "gfx1100")], ids=lambda each: each[1])
def test_kernels_compile_for_cards(target: Sequence[str]) -> None:
    """The interpreter, which the other tests use, accepts what the compiler refuses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *target], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "_combine",
        "_down",
        "_down_tile",
        "_linear",
        "_patch",
        "_resolve",
        "_up",
        "_up_tile",
    ]
