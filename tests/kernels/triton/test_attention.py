from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from edgemoe.kernels.triton.attention import DecodeAttention
from edgemoe.kernels.triton.launcher import Launch, Launcher
from edgemoe.kernels.triton.pass_layout import Buffer, PassLayout, PassSequence, buffer_table

CANARY = 1e6
LAYERS, LAYER, CONTEXT = 2, 1, 600


@dataclass
class Shape:
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    value_width: int = 16
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[int, int]:
        return self.width, self.value_width

    def attention(self, launcher: Launcher | None = None) -> DecodeAttention:
        sizes = self.heads, self.kv_heads, self.width, self.value_width
        return DecodeAttention(launcher or Launcher(), *sizes, torch.float32, context=CONTEXT, **self.options)

    def rows(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, heads, count, width]."""
        made = torch.Generator().manual_seed(seed)
        return (
            torch.randn(1, self.kv_heads, count, self.width, generator=made) * 2,
            torch.randn(1, self.kv_heads, count, self.value_width, generator=made),
        )

    def queries(self, count: int, seed: int) -> torch.Tensor:
        return torch.randn(1, self.heads, count, self.width, generator=torch.Generator().manual_seed(seed))


class Cached:
    """A sequence with `base` cached tokens of which the first `dropped` are gone, and `new` rows of the pass."""

    def __init__(
        self,
        shape: Shape,
        seed: int,
        base: int,
        seen: Sequence[int],
        capacity: int,
        *,
        dropped: int = 0,
        drafted: int = 0,
    ) -> None:
        self.seen, self.base, self.dropped, self.drafted = seen, base, dropped, drafted
        self.first = base + drafted - dropped
        end = base + drafted + len(seen)
        self.keys, self.values = shape.rows(end, seed)
        self.query = shape.queries(len(seen), seed + 1)
        self.layers = []
        for _ in range(LAYERS):
            keys, values = (torch.full((1, shape.kv_heads, capacity, each), CANARY) for each in shape.widths)
            self.layers.append(Buffer(keys, values, dropped))
        buffer = self.layers[LAYER]
        buffer.keys[:, :, : self.first] = self.keys[:, :, dropped : dropped + self.first]
        buffer.values[:, :, : self.first] = self.values[:, :, dropped : dropped + self.first]
        self.before = [(each.keys.clone(), each.values.clone()) for each in self.layers]

    @property
    def new(self) -> tuple[torch.Tensor, torch.Tensor]:
        begin = self.base + self.drafted
        return self.keys[:, :, begin:], self.values[:, :, begin:]

    def of_pass(self) -> PassSequence:
        return PassSequence(self.base, self.seen, buffer_table(self.layers), self.drafted)

    def expected_buffers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        after = [(keys.clone(), values.clone()) for keys, values in self.before]
        end = self.first + len(self.seen)
        for buffer, new in zip(after[LAYER], self.new, strict=True):
            buffer[:, :, self.first : end] = new
        return after


def causal(tokens: int) -> list[int]:
    return [(2 << at) - 1 for at in range(tokens)]


def run(
    shape: Shape,
    sequences: Sequence[Cached],
    tokens: int,
    sinks: torch.Tensor | None = None,
    *,
    spread: bool = False,
) -> torch.Tensor:
    """One pass of `tokens` tokens, [tokens, heads, value width]; where `spread`, no columns of inputs are adjacent."""
    layout = PassLayout(tokens, LAYERS, CONTEXT)
    metadata = torch.full((layout.size,), -1)
    layout.fill(metadata, [each.of_pass() for each in sequences])
    padding = tokens - sum(len(each.seen) for each in sequences)
    query = torch.cat([*(each.query for each in sequences), torch.full((1, shape.heads, padding, shape.width), 9.0)], 2)
    key, value = (
        torch.cat([*parts, torch.full((1, shape.kv_heads, padding, width), 9.0)], 2)
        for parts, width in zip(zip(*(each.new for each in sequences), strict=True), shape.widths, strict=True)
    )
    # As models make them: heads lie side by side in each token's row.
    query, key, value = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (query, key, value))
    if spread:
        query, key, value = (torch.stack([each, each + 1], dim=-1)[..., 0] for each in (query, key, value))
    return shape.attention().attend(query, key, value, metadata, LAYER, sinks)[0]


def plain(shape: Shape, sequence: Cached, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """[tokens, heads, value width], by masks over rows."""
    scaling = shape.options.get("scaling", shape.width**-0.5)
    softcap, window = shape.options.get("softcap"), shape.options.get("window")
    group = shape.heads // shape.kv_heads
    outputs = []
    for at, mask in enumerate(sequence.seen):
        path = [row for row in range(64) if mask >> row & 1]
        own = sequence.base + len(path) - 1
        seen = [*range(sequence.base), *(sequence.base + row for row in path)]
        positions = range(len(seen))
        seen = [row for row, position in zip(seen, positions, strict=True) if not window or position > own - window]
        keys = sequence.keys[0, :, seen].double().repeat_interleave(group, 0)
        values = sequence.values[0, :, seen].double().repeat_interleave(group, 0)
        scores = (keys @ sequence.query[0, :, at].double()[:, :, None])[..., 0] * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], 1)
        shares = scores.softmax(1)[:, : len(seen)]
        outputs.append((shares[:, None] @ values)[:, 0])
    return torch.stack(outputs).float()


TREE = [0b1, 0b11, 0b101, 0b1011, 0b10101]
SHAPES = {
    "shared keys": Shape(),
    "one head of keys": Shape(heads=6, kv_heads=1, width=24, value_width=24),
    "unequal widths": Shape(heads=2, kv_heads=2, width=48, value_width=32),
    "more values": Shape(heads=4, kv_heads=2, width=8, value_width=80),
    "scaled": Shape(options={"scaling": 0.11}),
    "softcap": Shape(options={"softcap": 3.0, "scaling": 1.0}),
    "short window": Shape(options={"window": 3}),
    "window": Shape(options={"window": 130}),
    "long window": Shape(options={"window": 300, "softcap": 5.0}),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 3.0, 12.0, 0.0, -40.0])])
def test_attention_is_that_of_plain_softmax(name: str, sinks: torch.Tensor | None) -> None:
    """Of several sequences with buffers of their own: short, over several splits, at a split's edge, a tree."""
    shape = SHAPES[name]
    own = None if sinks is None else sinks[: shape.heads]
    sequences = [
        Cached(shape, 1, base=0, seen=causal(1), capacity=5),
        Cached(shape, 3, base=530, seen=causal(2), capacity=600),
        Cached(shape, 5, base=254, seen=TREE, capacity=300),
    ]
    output = run(shape, sequences, 8, own)
    expected = torch.cat([plain(shape, each, own) for each in sequences])
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_rows_are_appended_and_nothing_else_is_written() -> None:
    shape = Shape(kv_heads=2, width=24, value_width=40)
    sequences = [
        Cached(shape, 1, base=7, seen=causal(3), capacity=11),
        Cached(shape, 2, base=0, seen=causal(1), capacity=1),
        Cached(shape, 3, base=5, seen=[0b101], drafted=2, capacity=64),
    ]
    run(shape, sequences, 8)
    for each in sequences:
        for found, expected in zip(each.layers, each.expected_buffers(), strict=True):
            assert torch.equal(found.keys, expected[0])
            assert torch.equal(found.values, expected[1])


def test_padding_stores_nothing_and_gets_zeros() -> None:
    shape = Shape()
    sequence = Cached(shape, 1, base=3, seen=causal(2), capacity=16)
    output = run(shape, [sequence], 8)
    assert torch.equal(output[2:], torch.zeros(6, 4, 16))
    assert output[:2].abs().min() > 0
    assert torch.equal(sequence.layers[LAYER].keys, sequence.expected_buffers()[LAYER][0])


def test_tensors_may_have_any_strides() -> None:
    shape = SHAPES["unequal widths"]
    compact, spread = (Cached(shape, 1, base=3, seen=TREE, capacity=16) for _ in range(2))
    assert torch.equal(run(shape, [spread], 8, spread=True), run(shape, [compact], 8))
    assert torch.equal(spread.layers[LAYER].values, compact.layers[LAYER].values)


def test_rows_never_written_are_never_read() -> None:
    """Whatever lies in a buffer behind what a token sees, and at its unseen siblings."""
    shape = Shape()
    sequence = Cached(shape, 1, base=20, seen=[0b1001], drafted=3, capacity=64)
    sequence.layers[LAYER].keys[:, :, 21:] = math.nan
    sequence.layers[LAYER].values[:, :, 21:] = math.nan
    torch.testing.assert_close(run(shape, [sequence], 1), plain(shape, sequence), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["shared keys", "window"])
def test_a_token_alone_has_the_bits_that_it_has_among_others(name: str) -> None:
    shape, sinks = SHAPES[name], torch.tensor([0.5, -1.0, 3.0, 0.0])
    single = Cached(shape, 5, base=300, seen=causal(1), capacity=310)
    alone = run(shape, [single], 1, sinks)
    others = [
        Cached(shape, 1, base=550, seen=causal(3), capacity=580),
        Cached(shape, 5, base=300, seen=causal(1), capacity=420),
        Cached(shape, 3, base=2, seen=TREE, capacity=9),
    ]
    among = run(shape, others, 16, sinks)
    assert torch.equal(among[3], alone[0])


@pytest.mark.parametrize("name", ["shared keys", "short window"])
def test_a_drafted_token_has_the_bits_of_plain_decoding(name: str) -> None:
    """Rows between those of a path, of its siblings, change nothing: also where they cross a split's edge."""
    shape = SHAPES[name]
    base, path = 254, [0, 2, 4]
    tree = Cached(shape, 7, base=base, seen=TREE, capacity=300)
    drafted = run(shape, [tree], 8)
    for depth, row in enumerate(path):
        step = Cached(shape, 7, base=base + depth, seen=causal(1), capacity=300)
        rows = [*range(base), *(base + each for each in path[: depth + 1])]
        step.keys, step.values = tree.keys[:, :, rows], tree.values[:, :, rows]
        buffer = step.layers[LAYER]
        buffer.keys[:, :, : step.first], buffer.values[:, :, : step.first] = (
            step.keys[:, :, : step.first],
            step.values[:, :, : step.first],
        )
        step.query = tree.query[:, :, row : row + 1]
        assert torch.equal(run(shape, [step], 1)[0], drafted[row])


def test_a_tree_that_grows_over_passes_has_the_bits_of_one_pass() -> None:
    shape = Shape()
    whole = Cached(shape, 7, base=30, seen=TREE, capacity=64)
    second = Cached(shape, 7, base=30, seen=TREE[3:], drafted=3, capacity=64)
    second.query = whole.query[:, :, 3:]
    assert torch.equal(run(shape, [second], 2), run(shape, [whole], 5)[3:])


def test_a_buffer_that_has_dropped_rows_has_the_bits_of_one_that_kept_them() -> None:
    shape = SHAPES["window"]
    kept = Cached(shape, 7, base=400, seen=TREE, capacity=430)
    dropped = Cached(shape, 7, base=400, seen=TREE, capacity=200, dropped=271)
    assert torch.equal(run(shape, [dropped], 8), run(shape, [kept], 8))
    assert torch.equal(dropped.layers[LAYER].keys, dropped.expected_buffers()[LAYER][0])


def test_windows_have_grids_of_their_own_size() -> None:
    """A pass is three launches, whose grids do not follow lengths."""
    grids: list[tuple[int, ...]] = []

    def observe(launch: Launch) -> None:
        grids.append(launch.grid)

    for shape in (SHAPES["shared keys"], SHAPES["short window"]):
        launcher = Launcher()
        launcher.observer = observe
        key, value = shape.rows(4, 1)
        shape.attention(launcher).attend(shape.queries(4, 2), key, value, torch.zeros(999, dtype=torch.int64), 0)
    assert grids == [(4, 2), (4, 2, 3), (4, 4), (4, 2), (4, 2, 2), (4, 4)]


def test_the_workspace_is_what_is_said() -> None:
    shape, taken = Shape(value_width=32), []
    launcher = Launcher()
    launcher.observer = lambda launch: taken.append(launch.args)
    key, value = shape.rows(4, 1)
    attention = shape.attention(launcher)
    attention.attend(shape.queries(4, 2), key, value, torch.zeros(999, dtype=torch.int64), 0)
    assert sum(each.nbytes for each in taken[1][1:3]) == attention.workspace_nbytes(4)


def test_refusals() -> None:
    def refusal(
        heads: int, kv_heads: int, width: int, value_width: int, kind: torch.dtype = torch.float16, **options: Any
    ) -> str:
        return DecodeAttention.refusal(heads, kv_heads, width, value_width, kind, options)

    usual: dict[str, Any] = {
        "dropout": 0.0,
        "is_causal": True,
        "sliding_window": 128,
        "softcap": 30.0,
        "position_bias": None,
    }
    assert refusal(64, 8, 64, 64, s_aux=torch.zeros(64), position_ids=torch.zeros(1), **usual) == ""
    assert "position_bias" in refusal(4, 2, 16, 16, position_bias=torch.zeros(1))
    assert "indices" in refusal(4, 2, 16, 16, indices=torch.zeros(1))
    assert "0.1" in refusal(4, 2, 16, 16, dropout=0.1)
    assert "later tokens" in refusal(4, 2, 16, 16, is_causal=False)
    assert "5 heads" in refusal(5, 2, 16, 16)
    assert "65 heads" in refusal(65, 1, 16, 16)
    assert "513 wide" in refusal(4, 2, 16, 513)
    assert "float64" in refusal(4, 2, 16, 16, torch.float64)
    with pytest.raises(ValueError, match="513 wide"):
        Shape(width=513).attention()


def test_tensors_of_another_shape_or_dtype_are_refused() -> None:
    shape = Shape()
    key, value = shape.rows(2, 1)
    query, metadata = shape.queries(2, 1), torch.zeros(999, dtype=torch.int64)
    for wrong, name in (
        ((query[..., :8], key, value), "query"),
        ((query, key[:, :1], value), "key"),
        ((query, key, value.half()), "value"),
    ):
        with pytest.raises(ValueError, match=f"the {name} is"):
            shape.attention().attend(*wrong, metadata, 0)


COMPILE = """
import sys
from typing import Any
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from edgemoe.kernels.triton.attention import DecodeAttention
from edgemoe.kernels.triton.launcher import Launch, Launcher

backend, arch, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32)
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}

def kind(value):
    return NAMES[value.dtype] if isinstance(value, torch.Tensor) else "i32"

def compiled(launch):
    names = launch.kernel.arg_names
    signature = dict(zip(names, map(kind, launch.args))) | dict.fromkeys(launch.constants, "constexpr")
    # What a launch finds out by itself: the columns of all tensors follow one another.
    ones = {names[at]: 1 for at, value in enumerate(launch.args) if isinstance(value, int) and value == 1}
    signature |= dict.fromkeys(ones, "constexpr")
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(launch.kernel, signature, launch.constants | ones, aligned)
    made = triton.compile(source, target=target)
    assert made.metadata.shared <= limit, (launch.kernel, launch.constants, made.metadata.shared)
    # Only where the compiler knows addresses to be aligned.
    assert launch.kernel.fn.__name__ != "_attend" or backend == "hip" or "cp.async.cg" in made.asm["ptx"]
    print(launch.kernel.fn.__name__)

for heads, kv, width, values, dtype, options in (
    (32, 4, 128, 128, torch.bfloat16, {}),
    (16, 16, 192, 128, torch.float16, {"window": 4096}),
    (64, 8, 64, 64, torch.bfloat16, {"window": 128}),
    (16, 4, 512, 512, torch.bfloat16, {"softcap": 50.0}),
    (8, 4, 128, 128, torch.float32, {}),
):
    launcher = Launcher()
    launcher.observer = compiled
    attention = DecodeAttention(launcher, heads, kv, width, values, dtype, context=8192, **options)
    query, key, value = (
        torch.empty(1, 4, number, size, dtype=dtype).transpose(1, 2)
        for number, size in ((heads, width), (kv, width), (kv, values))
    )
    sinks = torch.zeros(heads, dtype=dtype) if heads == 64 else None
    attention.attend(query, key, value, torch.zeros(9999, dtype=torch.int64), 1, sinks)
"""


@pytest.mark.slow
@pytest.mark.parametrize("card", [("cuda", "80", "65536"), ("cuda", "90", "65536"), ("hip", "gfx1100", "65536")])
def test_kernels_compile_for_cards(card: tuple[str, str, str], tmp_path: Path) -> None:
    """In a process without the interpreter, which accepts what the compiler refuses. The limit is shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *card], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") == 15
