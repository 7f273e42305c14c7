"""8-bit floats with a scale for each block, as DeepSeek, Qwen and others publish them (`quant_method: fp8`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from edgemoe.cache.record import Part
from edgemoe.formats.codes import spread
from edgemoe.formats.weight_format import WeightFormat


@dataclass(frozen=True)
class Fp8Format(WeightFormat):
    """e4m3 or e5m2 values times the scale of their block of rows x columns; 0 stands for all of them."""

    block: tuple[int, int] = (128, 128)
    dtype: torch.dtype = torch.float8_e4m3fn
    scale_dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """See the base class."""
        return "fp8"

    @property
    def bits_per_weight(self) -> float:
        """See the base class."""
        values = self.block[0] * self.block[1]
        return 8.0 + (8.0 * self.scale_dtype.itemsize / values if values else 0.0)

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """See the base class."""
        scales = tuple(-(-side // size) if size else 1 for side, size in zip(shape, self.block, strict=True))
        return Part(name, shape, self.dtype), Part(f"{name}.scale", scales, self.scale_dtype)

    def rows(self, views: Mapping[str, torch.Tensor], name: str, first: int, last: int) -> torch.Tensor:
        """See the base class."""
        values, scales = views[name][first:last].float(), views[f"{name}.scale"].float()
        height, width = (size or side for size, side in zip(self.block, views[name].shape, strict=True))
        scales = scales[first // height : -(-last // height)]
        scales = spread(scales, height, last - first // height * height, 0)[first % height :]
        return values * spread(scales, width, values.shape[1], 1)
