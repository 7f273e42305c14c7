"""A matrix whose rows come from several matrices, each in a format of its own, such as gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from edgemoe.cache.record import Part
from edgemoe.formats.weight_format import WeightFormat


@dataclass(frozen=True)
class StackedFormat(WeightFormat):
    """Formats of matrices of `part_height` rows, which follow one another, or alternate if they are `interleaved`."""

    formats: tuple[WeightFormat, ...]
    part_height: int
    interleaved: bool = False

    @property
    def name(self) -> str:
        """See the base class: each format once."""
        return "+".join(dict.fromkeys(each.name for each in self.formats))

    @property
    def bits_per_weight(self) -> float:
        """See the base class."""
        return sum(each.bits_per_weight for each in self.formats) / len(self.formats)

    @property
    def row_multiple(self) -> int:  # type: ignore[override]
        """See the base class."""
        own = max(each.row_multiple for each in self.formats)
        return own * len(self.formats) if self.interleaved else own

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """See the base class: the parts of matrix number i are called `name.i`."""
        own = (self.part_height, shape[1])
        return tuple(part for at, each in enumerate(self.formats) for part in each.parts(f"{name}.{at}", own))

    def height(self, views: Mapping[str, torch.Tensor], name: str) -> int:
        """See the base class."""
        return self.part_height * len(self.formats)

    def rows(self, views: Mapping[str, torch.Tensor], name: str, first: int, last: int) -> torch.Tensor:
        """See the base class."""
        count = len(self.formats)
        if self.interleaved:
            bounds = (first // count, -(-last // count))
            found = [each.rows(views, f"{name}.{at}", *bounds) for at, each in enumerate(self.formats)]
            return torch.stack(found, dim=1).flatten(0, 1)[: last - first]
        pieces = []
        for at, each in enumerate(self.formats):
            low, high = max(first - at * self.part_height, 0), min(last - at * self.part_height, self.part_height)
            if low < high:
                pieces.append(each.rows(views, f"{name}.{at}", low, high))
        return torch.cat(pieces)
