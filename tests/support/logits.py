"""Stand-ins for logits of a device, which lie on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from edgemoe.model.pass_logits import PassLogits


class CountedLogits(PassLogits):
    """Counts what is copied from the device."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__(rows)
        self.reads: list[int] = []
        """The bytes of each copy."""

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        self.reads.append(tensor.nbytes)
        return super()._read(tensor)


def spoiled_topk(tensor: torch.Tensor, count: int, dim: int = -1, **_: Any) -> Any:
    """Top-k that takes the last of equal values, in no good order: as a device may."""
    values, ids = tensor.flip(dim).sort(dim=dim, descending=True, stable=True)
    return torch.return_types.topk((values[..., :count], tensor.shape[dim] - 1 - ids[..., :count]))


def one_hot(token: int, vocabulary: int, height: float = 100.0) -> torch.Tensor:
    """Logits, float32 [vocabulary], of a model that is sure of `token`."""
    return torch.zeros(vocabulary).index_fill_(0, torch.tensor([token]), height)
