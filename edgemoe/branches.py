"""How drafted tokens lie beside a past: who sees whom, at which positions, under which masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Branches(NamedTuple):
    """The tokens of a pass that continue a past of `base` tokens in several ways.

    Rows beyond `base` are drafted: those of earlier passes first, then the pass's own. `depths` has the place of
    each behind `base`; `seen`, bool [tokens of the pass, rows beyond `base`], says which of them a token attends to,
    itself included. Everything before `base` is seen by all.
    """

    base: int
    depths: Sequence[int]
    seen: torch.Tensor

    @property
    def places(self) -> list[int]:
        """The positions of the pass's tokens."""
        return [self.base + depth for depth in self.depths[len(self.depths) - len(self.seen) :]]

    def visible(self, keys: int, window: int | None) -> torch.Tensor:
        """Bool [tokens, keys]: which of the last `keys` rows each token attends to, in a layer with `window`."""
        drafted = len(self.depths)
        held = keys - drafted
        before = torch.ones(len(self.seen), held, dtype=torch.bool)
        visible = torch.cat([before, self.seen], dim=1)
        if window is None:
            return visible
        rows = torch.tensor([*range(self.base - held, self.base), *(self.base + depth for depth in self.depths)])
        return visible & (rows > torch.tensor(self.places)[:, None] - window)


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`visible`, bool [tokens, keys], as a mask that is added to scores: 0, and the least number of `dtype`."""
    hidden = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, hidden)
