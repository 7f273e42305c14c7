"""The place of one tensor in a checkpoint's files."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: the index of its file, its byte offset there, size, shape and dtype."""

    file: int
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    repeated: bool = False
    """Whether every matrix of a stack has this whole tensor, and not a slice."""

    def slice(self, index: int, count: int) -> TensorEntry:
        """The slice number `index` of a stack of `count`, along the first dimension."""
        if self.repeated:
            return self
        nbytes = self.nbytes // count
        return TensorEntry(self.file, self.offset + index * nbytes, nbytes, self.shape[1:], self.dtype)
