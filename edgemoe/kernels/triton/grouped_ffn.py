"""The experts' feed-forward networks over slots on the device, by Triton's kernels, and the launches around them.

No function here reads the device or copies to it: a step is queued whole. What runs in a launch is in
`grouped_kernels`, `grouped_tile_kernels` and `table_kernels`. Block sizes were chosen without a card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.stacked_format import StackedFormat
from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.triton import grouped_kernels, grouped_tile_kernels, table_kernels
from edgemoe.kernels.triton.activations import GateRule, activation_kernel
from edgemoe.kernels.triton.language import tl
from edgemoe.kernels.triton.launcher import Launcher
from edgemoe.kernels.triton.tile_format import TileFormat, tile_format

KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
"""The dtypes that kernels compute in."""
GEMV = {"ROWS": 32, "BLOCK": 64, "num_warps": 4}
"""Rows of a program and columns that it reads at a time, for few tokens. With these the compiled loops of most formats
keep a tile in the registers of the threads that load it."""
TILE = {
    2: {"ROWS": 64, "PAIRS": 64, "BLOCK": 64, "num_warps": 4},
    4: {"ROWS": 32, "PAIRS": 64, "BLOCK": 64, "num_warps": 4},
}
"""The same and pairs of a program, for many tokens, by the bytes of a hidden state's value."""
COMBINE_BLOCK, RESOLVE_BLOCK = 256, 128


class GroupedMatrix:
    """One matrix of all experts: where its parts lie in a record, and what reads them."""

    def __init__(
        self,
        kind: WeightFormat,
        shape: tuple[int, int],
        places: Mapping[str, int],
        device: torch.device,
        *,
        transposed: bool = False,
        bias: int | None = None,
        bias_dtype: torch.dtype = torch.float32,
    ) -> None:
        """`shape` is (outputs, inputs); `places` has the byte offset in a record of each part, by its name's suffix.

        `transposed` matrices are stored as [inputs, outputs]. `bias` is the byte offset of the bias, of `bias_dtype`.
        Raises ValueError for a format that no kernel reads.
        """
        self.kind, self.shape, self.bias, self.bias_dtype = kind, shape, bias, bias_dtype
        forms = _forms(kind, shape, places, device, transposed)
        if not forms:
            raise ValueError(f"no kernel reads {shape[0]} x {shape[1]} weights of the format {kind.name}")
        self.forms = forms
        """What reads the matrix, or each of the two that a `StackedFormat` is made of."""

    @staticmethod
    def fits(kind: WeightFormat, shape: tuple[int, int], *, transposed: bool = False) -> bool:
        """Whether kernels read matrices of `shape`, (outputs, inputs), in the format `kind`."""
        places = dict.fromkeys((part.name for part in kind.parts("", shape)), 0)
        return bool(_forms(kind, shape, places, torch.device("cpu"), transposed))

    def product_dtype(self, inputs: torch.dtype) -> torch.dtype:
        """What products with inputs of this dtype are rounded to; inputs as well."""
        return self.kind.dtype if isinstance(self.kind, FloatFormat) else inputs

    def result_dtype(self, inputs: torch.dtype) -> torch.dtype:
        """What products are with the bias added."""
        own = self.product_dtype(inputs)
        return own if self.bias is None else torch.promote_types(own, self.bias_dtype)

    def constants(self, inputs: torch.dtype) -> dict[str, Any]:
        """What kernels need to know of the matrix when they are compiled."""
        return {
            "WIDTH": self.shape[1],
            "LOAD": self.forms[0].load,
            "META": self.forms[0].meta,
            "BIAS": (-1 if self.bias is None else self.bias, KINDS[self.bias_dtype]),
            "KIND": KINDS[self.product_dtype(inputs)],
            "SUM": KINDS[self.result_dtype(inputs)],
        }


def _forms(
    kind: WeightFormat, shape: tuple[int, int], places: Mapping[str, int], device: torch.device, transposed: bool
) -> tuple[TileFormat, ...]:
    """What reads a matrix, or each of two stacked ones; empty if something is not read."""
    if not isinstance(kind, StackedFormat):
        found = [tile_format(kind, shape, places, device, transposed=transposed)]
    elif transposed or len(kind.formats) != 2:
        return ()
    else:
        own = (kind.part_height, shape[1])
        found = [
            tile_format(each, own, {part.name: places[f".{at}{part.name}"] for part in each.parts("", own)}, device)
            for at, each in enumerate(kind.formats)
        ]
    present = tuple(form for form in found if form is not None)
    return present if len(present) == len(found) else ()


class GroupedFfn:
    """The two matrices of one layer's experts and the activation between them, for all pairs of a pass at once.

    A pair is a token and one of its choices; pairs are numbered as [tokens, top-k] is laid out.
    """

    def __init__(
        self,
        launcher: Launcher,
        memory: torch.Tensor,
        up: GroupedMatrix,
        down: GroupedMatrix,
        gate: GateRule,
        dtype: torch.dtype,
    ) -> None:
        """`memory` is uint8 [slots, slot bytes], the records; `dtype` that of hidden states, one of `KINDS`.

        Raises ValueError where the matrices do not fit together, or gate and up lie in an order that no kernel reads.
        """
        self._launcher, self._memory = launcher, memory
        self._up, self._down, self._dtype = up, down, dtype
        self._inner_dtype = up.result_dtype(dtype)
        inner = up.shape[0] // (2 if gate.gated else 1)
        if inner != down.shape[1]:
            raise ValueError(f"the first matrix gives {inner} values and the second one takes {down.shape[1]}")
        function, whole = activation_kernel(gate)
        self._up_constants = {
            **up.constants(dtype),
            "INNER": inner,
            "SECOND_LOAD": up.forms[-1].load,
            "SECOND_META": up.forms[-1].meta,
            "LAYOUT": _layout(up.kind, gate, inner),
            "ACTIVATION": function,
            "CONSTANTS": gate.constants,
            "GATE": 2 if whole else int(gate.gated),
        }
        self._down_constants = {**down.constants(self._inner_dtype), "HEIGHT": down.shape[0]}

    def run(self, hidden: torch.Tensor, slots: torch.Tensor, outputs: torch.Tensor, top_k: int) -> None:
        """Writes `outputs`, [pairs, hidden size], for the pairs that have a slot, in two launches: for few tokens.

        `hidden` is [tokens, hidden size]; `slots` is int32 [pairs], -1 for a pair to be left out, whose row keeps what
        it holds. Rounds as the plain form does.
        """
        pairs, inner = len(slots), self._scratch(hidden, len(slots))
        grid = pairs, _blocks(self._up_constants["INNER"], GEMV["ROWS"])
        first, second = self._up.forms[0].tables, self._up.forms[-1].tables
        self._launcher(
            grouped_kernels.up, grid, hidden, slots, self._memory, first, second, inner,
            hidden.stride(0), self._memory.stride(0), TOP_K=top_k, **self._up_constants, **GEMV,
        )  # fmt: skip
        grid = pairs, _blocks(self._down.shape[0], GEMV["ROWS"])
        self._launcher(
            grouped_kernels.down, grid, inner, slots, self._memory, self._down.forms[0].tables, outputs,
            self._memory.stride(0), **self._down_constants, **GEMV,
        )  # fmt: skip

    def run_many(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        slots: torch.Tensor,
        outputs: torch.Tensor,
        top_k: int,
        experts: int,
    ) -> None:
        """As `run`, for many tokens: weights are read once for a block of pairs of one expert.

        `ids` is [tokens, top-k], the chosen ones of `experts` experts: pairs of the same one have the same slot.
        Packed weights are rounded to the dtype of what they multiply, which the plain form does not do: in float32 the
        results are equal to those of `run` up to the order of the sums, in 16 bits up to that rounding.
        """
        inner = self._scratch(hidden, len(slots))
        tile = TILE[self._dtype.itemsize]
        order, bounds = _sorted_blocks(ids, slots, experts, tile["PAIRS"])
        grid = len(bounds), _blocks(self._up_constants["INNER"], tile["ROWS"])
        first, second = self._up.forms[0].tables, self._up.forms[-1].tables
        self._launcher(
            grouped_tile_kernels.up_tile, grid, hidden, order, bounds, slots, self._memory, first, second, inner,
            hidden.stride(0), self._memory.stride(0), TOP_K=top_k, **self._up_constants, **tile,
        )  # fmt: skip
        grid = len(bounds), _blocks(self._down.shape[0], tile["ROWS"])
        self._launcher(
            grouped_tile_kernels.down_tile, grid, inner, order, bounds, slots, self._memory,
            self._down.forms[0].tables, outputs, self._memory.stride(0), **self._down_constants, **tile,
        )  # fmt: skip

    def _scratch(self, hidden: torch.Tensor, pairs: int) -> torch.Tensor:
        """What the first matrix gives, [pairs, columns of the second one]."""
        return hidden.new_empty(pairs, self._up_constants["INNER"], dtype=self._inner_dtype)


def _layout(kind: WeightFormat, gate: GateRule, inner: int) -> tuple[int, int, int, int]:
    """Where the rows of gate and up lie: see `grouped_kernels.up`."""
    own = (2, 1) if gate.interleaved else (1, inner)
    if not isinstance(kind, StackedFormat):
        return (*own, *own)
    if not gate.gated or kind.interleaved != gate.interleaved or kind.part_height != inner:
        raise ValueError("the stacked matrices are not the gate and up of this activation")
    return (1, 0, *own)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _sorted_blocks(
    ids: torch.Tensor, slots: torch.Tensor, experts: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs by expert, those without a slot last, and the bounds of blocks of at most `size` pairs of one expert.

    Both on the device: int32 [pairs], and int32 [blocks, 2] with as many blocks as there can be at most. The bounds of
    a block that is not needed are equal.
    """
    pairs, device = len(slots), slots.device
    owners, order = torch.where(slots < 0, experts, ids.reshape(-1)).sort(stable=True)
    edges = torch.searchsorted(owners, torch.arange(experts + 1, device=device, dtype=owners.dtype))
    ends = ((edges.diff() + size - 1) // size).cumsum(0)
    number = torch.arange(pairs // size + min(experts, pairs), device=device)
    owner = torch.searchsorted(ends, number, right=True)
    own = owner.clamp(max=experts - 1)
    before = torch.where(own > 0, ends.index_select(0, (own - 1).clamp(min=0)), 0)
    begin = edges.index_select(0, own) + (number - before) * size
    end = torch.minimum(begin + size, edges.index_select(0, own + 1))
    bounds = torch.stack((begin, torch.where(owner < experts, end, begin)), dim=1)
    return order.int(), bounds.int()


def resolve(
    launcher: Launcher,
    ids: torch.Tensor,
    weights: torch.Tensor,
    table_row: torch.Tensor,
    slots: torch.Tensor,
    done: torch.Tensor,
    chosen: torch.Tensor,
    *,
    first: bool,
    live: torch.Tensor | None,
    top_k: int,
) -> None:
    """Writes `slots`, int32 [pairs], and marks in `done`, int32 [pairs], the pairs that have one, in one launch.

    With `first` also `chosen`, int32 [pairs]: the expert of each pair, -1 where there is none to compute.

    `ids` (int32 or int64) and `weights` are [tokens, top-k]; `table_row` is int32 [experts], each expert's slot or -1.
    A pair has a slot if its id is one of the experts, its weight is not 0, its expert has one, its token is below
    `live`, an integer [1], and it is not done; with `first` no pair counts as done. All others get -1.
    """
    pairs = ids.numel()
    launcher(
        table_kernels.resolve, (_blocks(pairs, RESOLVE_BLOCK),), ids.contiguous(), weights.contiguous(), table_row,
        slots if live is None else live, slots, done, chosen, pairs, len(table_row),
        TOP_K=top_k, FIRST=first, HAS_LIVE=live is not None, BLOCK=RESOLVE_BLOCK,
    )  # fmt: skip


def patch(launcher: Launcher, table: torch.Tensor, changes: Sequence[tuple[int, int]]) -> None:
    """Sets entries of `table`, int32, contiguous, of any shape: `changes` are flat places and their new values.

    The last change of a place counts. They travel as arguments of a launch, 16 at a time: nothing is copied.
    """
    last = [table_kernels.packed_change(*each) for each in dict(changes).items()]
    for begin in range(0, len(last), table_kernels.CHANGES):
        some = last[begin : begin + table_kernels.CHANGES]
        launcher(table_kernels.patch, (1,), table, *some, *some[-1:] * (table_kernels.CHANGES - len(some)), num_warps=1)


def combine(
    launcher: Launcher, outputs: torch.Tensor, weights: torch.Tensor, done: torch.Tensor, out: torch.Tensor
) -> None:
    """Writes `out`, [tokens, hidden size], as `weighted_sum.weighted_sum` does, in one launch.

    `outputs` is [pairs, hidden size] and `weights` [tokens, top-k]. Experts are added in the router's order; a pair
    whose `done`, int32 [pairs], is 0 adds nothing, whatever its row of `outputs` holds.
    """
    (tokens, top_k), width = weights.shape, outputs.shape[1]
    product = KINDS[torch.promote_types(outputs.dtype, weights.dtype)]
    # Without fusion, as a product is rounded before it is added.
    launcher(
        grouped_kernels.combine, (tokens, _blocks(width, COMBINE_BLOCK)), outputs, weights.contiguous(), done, out,
        TOP_K=top_k, WIDTH=width, PRODUCT=product, BLOCK=COMBINE_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip


def packed_linear_gemv(
    launcher: Launcher, x: torch.Tensor, form: TileFormat, memory: torch.Tensor, rows: int, out_dtype: torch.dtype
) -> torch.Tensor:
    """x · Wᵀ of a dense matrix with packed weights, [tokens, rows] of `out_dtype`, in one launch.

    `x` is [tokens, columns] in one of `KINDS`; `memory` is uint8 [bytes] with the parts of W, which `form` reads. Sums
    are in float32, and those of a token do not depend on the others.
    """
    tokens, columns = x.shape
    out = x.new_empty(tokens, rows, dtype=out_dtype)
    launcher(
        grouped_kernels.linear, (tokens, _blocks(rows, GEMV["ROWS"])), x, memory, form.tables, out, x.stride(0),
        WIDTH=columns, HEIGHT=rows, LOAD=form.load, META=form.meta, **GEMV,
    )  # fmt: skip
    return out
