"""Experts of one format and layout on a card, and attention there; the plain forms stay on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench.no_card.device_kernels import Case, Layout, error
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.triton.attention import DecodeAttention
from edgemoe.kernels.triton.grouped_ffn import GroupedFfn, GroupedMatrix
from edgemoe.kernels.triton.launcher import Launcher
from edgemoe.kernels.triton.pass_layout import Buffer, PassLayout

HALF_ERROR = 2e-2
"""Largest difference of 16-bit results, of the largest value."""


class CardCase(Case):
    """`case` with its kernels on `device`."""

    def __init__(self, case: Case, device: torch.device) -> None:
        vars(self).update(vars(case))
        self._device = device
        self._records = case.memory.to(device)

    def matrix(self, name: str) -> GroupedMatrix:
        """See the base class."""
        kind, shape, transposed = self.formats[name], self.shapes[name], self.layout.transposed
        places = self.records.places(name)
        bias = self.records.part_offset(f"{name}_bias") if self.layout.bias else None
        return GroupedMatrix(kind, shape, places, self._device, transposed=transposed, bias=bias)

    def ffn(self, dtype: torch.dtype = torch.float32) -> GroupedFfn:
        """See the base class."""
        matrices = self.matrix(self.name), self.matrix("down_proj")
        return GroupedFfn(Launcher(), self._records, *matrices, self.rule, dtype)

    def computed(self, ffn: GroupedFfn, hidden: torch.Tensor, ids: torch.Tensor, *, many: bool) -> torch.Tensor:
        """See the base class; the result is on the CPU."""
        slots, top_k = self.pair_slots(ids).to(self._device), ids.shape[1]
        hidden, ids = hidden.to(self._device), ids.to(self._device)
        outputs = torch.full((len(slots), self.outer), float("nan"), dtype=hidden.dtype, device=self._device)
        if many:
            ffn.run_many(hidden, ids, slots, outputs, top_k, len(self.slots))
        else:
            ffn.run(hidden, slots, outputs, top_k)
        return outputs.cpu()


def half_cases(kind: WeightFormat, columns: int, device: torch.device) -> list[CardCase]:
    """Cases to be computed in 16 bits: both matrices of `kind`, and of floats every layout without a bias."""
    layouts = [Layout("gated")]
    if isinstance(kind, FloatFormat):
        layouts += [Layout("no gate", "relu2", gated=False), Layout("transposed", "silu", transposed=True)]
    return [CardCase(Case(kind, kind, columns, columns, layout), device) for layout in layouts]


def half_faults(case: Case, dtype: torch.dtype, tokens: Sequence[int]) -> list[str]:
    """What is wrong with `case` in `dtype`, by both forms; `tokens` ascend."""
    hidden, ids = case.tokens(max(tokens))
    hidden, ffn, faults = hidden.to(dtype), case.ffn(dtype), []
    expected = case.expected(hidden, ids).float()
    for form in ("rows", "tiles"):
        before = torch.empty(0, case.outer, dtype=dtype)
        for count in tokens:
            found = case.computed(ffn, hidden[:count], ids[:count], many=form == "tiles")
            own = error(found.float(), expected[: len(found)])
            if not own <= HALF_ERROR:
                faults.append(f"{case.layout.name}, {count} tokens, {form}, {dtype}: an error of {own:.1e}")
            if not torch.equal(before, found[: len(before)]):
                faults.append(f"{case.layout.name}, {count} tokens, {form}, {dtype}: other bits than those of fewer")
            before = found
    return faults


def attended(
    attention: DecodeAttention, sequences: Sequence[Any], layers: int, layer: int, context: int, tokens: int,
    sinks: torch.Tensor | None, device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """A pass of `tokens` tokens over `sequences`, of the attention's test, with their buffers moved to `device`.

    Returns [tokens, heads, value width] on the CPU. The moved buffers have the pass's rows.
    """
    layout = PassLayout(tokens, layers, context)
    for each in sequences:
        each.layers = [Buffer(own.keys.to(device), own.values.to(device), own.dropped) for own in each.layers]
    metadata = torch.full((layout.size,), -1)
    layout.fill(metadata, [each.of_pass() for each in sequences])
    padding = tokens - sum(len(each.seen) for each in sequences)
    parts = []
    for own in ([each.query for each in sequences], *zip(*(each.new for each in sequences), strict=True)):
        whole = torch.cat([*own, own[0].new_full((1, own[0].shape[1], padding, own[0].shape[3]), 9.0)], 2)
        # As models make them: heads lie side by side in each token's row.
        parts.append(whole.to(device).transpose(1, 2).contiguous().transpose(1, 2))
    given = None if sinks is None else sinks.to(device)
    query, key, value = parts
    return attention.attend(query, key, value, metadata.to(device), layer, given)[0].cpu()
