"""Integers packed along the inputs, as GPTQ and AWQ publish them: matrices [inputs, outputs], words of 32 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from edgemoe.cache.record import Part
from edgemoe.formats.codes import fields, spread
from edgemoe.formats.weight_format import WeightFormat

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which of a word's fields each of eight neighbours lies."""


@dataclass(frozen=True)
class GptqFormat(WeightFormat):
    """(value - zero point) * scale, with one zero point and one scale for a group of inputs and an output.

    GPTQ packs values along the inputs: int32 [inputs * bits / 32, outputs]. AWQ packs them along the outputs, eight
    neighbours in an order of its own: int32 [inputs, outputs / 8]. Zero points are packed along the outputs: int32
    [groups, outputs * bits / 32]; scales are [groups, outputs].
    """

    bits: int = 4
    group: int = 128
    """Inputs of a group; 0 stands for all of them."""
    scale_dtype: torch.dtype = torch.float16
    awq: bool = False
    zero_offset: int = 1
    """What is added to a stored zero point: 1 in GPTQ's first layout, 0 in its second and in AWQ's."""
    reordered: bool = False
    """Whether a part says to which group each input belongs, int32 [inputs] (`desc_act`)."""

    @property
    def name(self) -> str:
        """See the base class."""
        return f"{'awq' if self.awq else 'gptq'}-int{self.bits}"

    @property
    def bits_per_weight(self) -> float:
        """See the base class."""
        return self.bits + ((8.0 * self.scale_dtype.itemsize + self.bits) / self.group if self.group else 0.0)

    @property
    def row_multiple(self) -> int:  # type: ignore[override]
        """See the base class: outputs of several rows share a word."""
        return 32 // self.bits

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """See the base class."""
        outputs, inputs = shape
        per_word = 32 // self.bits
        group = self.group or inputs
        if outputs % per_word or inputs % per_word:
            raise ValueError(f"sides are multiples of {per_word}, not {outputs} and {inputs}")
        packed = (inputs, outputs // per_word) if self.awq else (inputs // per_word, outputs)
        groups = -(-inputs // group)
        found = [
            Part(name, packed, torch.int32),
            Part(f"{name}.zero", (groups, outputs // per_word), torch.int32),
            Part(f"{name}.scale", (groups, outputs), self.scale_dtype),
        ]
        if self.reordered:
            found.append(Part(f"{name}.group", (inputs,), torch.int32))
        return tuple(found)

    def height(self, views: Mapping[str, torch.Tensor], name: str) -> int:
        """See the base class: the number of outputs."""
        return views[f"{name}.scale"].shape[1]

    def rows(self, views: Mapping[str, torch.Tensor], name: str, first: int, last: int) -> torch.Tensor:
        """See the base class."""
        words = slice(first // (32 // self.bits), -(-last // (32 // self.bits)))
        if self.awq:
            values = self._neighbours(views[name][:, words])
        else:
            values = fields(views[name][:, first:last].t().contiguous(), self.bits).t()
        inputs = values.shape[0]
        zeros: torch.Tensor = self._neighbours(views[f"{name}.zero"][:, words]) + self.zero_offset
        if self.zero_offset:
            # In GPTQ's first layout the largest zero point is kept as the smallest field.
            zeros = zeros & ((1 << self.bits) - 1)
        values, zeros = values[:, : last - first], zeros[:, : last - first]
        zeros = self._of_inputs(views, name, zeros, inputs)
        scales = self._of_inputs(views, name, views[f"{name}.scale"][:, first:last].float(), inputs)
        return ((values - zeros).float() * scales).t()

    def _neighbours(self, words: torch.Tensor) -> torch.Tensor:
        """The fields of words along the outputs, in the order of these."""
        found: torch.Tensor = fields(words, self.bits)
        if not self.awq:
            return found
        order = torch.tensor(AWQ_ORDER, device=words.device)
        ordered: torch.Tensor = found.unflatten(-1, (-1, len(AWQ_ORDER))).index_select(-1, order)
        return ordered.flatten(-2)

    def _of_inputs(
        self, views: Mapping[str, torch.Tensor], name: str, groups: torch.Tensor, inputs: int
    ) -> torch.Tensor:
        """What belongs to each input of [groups, outputs]."""
        if self.reordered:
            return groups.index_select(0, views[f"{name}.group"].long())
        return spread(groups, self.group or inputs, inputs, 0)
