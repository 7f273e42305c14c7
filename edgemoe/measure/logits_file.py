"""Stores one model's logits of many tokens, to compare them with another's."""

from __future__ import annotations

import shutil
import tempfile

import torch

from edgemoe.errors import PlanError
from edgemoe.sizes import format_bytes


class LogitsFile:
    """A temporary file of float32 rows, one per token. The experts leave too little memory for them.

    The file is in the folder of Python's `tempfile`, has no visible name, and disappears with `close`.
    """

    def __init__(self, vocabulary: int, max_tokens: int) -> None:
        """For up to `max_tokens` rows of `vocabulary` logits. Raises PlanError if the disk has no room for them."""
        self._vocabulary = vocabulary
        nbytes, folder = 4 * vocabulary * max_tokens, tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        self._refusal = (
            f"the logits of {max_tokens} tokens take {format_bytes(nbytes)} in {folder}, where {format_bytes(free)} "
            f"are free: measure fewer with tokens=, or name another folder in TMPDIR"
        )
        if nbytes > free:
            raise PlanError(self._refusal)
        self._file = tempfile.TemporaryFile(prefix="edgemoe-logits-", buffering=0)  # noqa: SIM115 - see close

    def append(self, logits: torch.Tensor) -> None:
        """Appends rows, float32 [tokens, vocabulary]. Raises PlanError if the disk is full."""
        if logits.shape[1] != self._vocabulary:
            raise ValueError(f"rows have {logits.shape[1]} logits instead of {self._vocabulary}")
        left = logits.contiguous().numpy().data.cast("B")
        try:
            # On a full disk, a write is short at first; the next one raises.
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise PlanError(self._refusal) from error

    def rewind(self) -> None:
        """Goes back to the first row, which the next `take` returns."""
        self._file.seek(0)

    def take(self, tokens: int) -> torch.Tensor:
        """The next rows, float32 [tokens, vocabulary]. Raises ValueError if there are fewer."""
        rows = torch.empty(tokens, self._vocabulary)
        left = rows.numpy().data.cast("B")
        while left:
            count = self._file.readinto(left)
            if not count:
                raise ValueError(f"fewer than {tokens} rows are left")
            left = left[count:]
        return rows

    def close(self) -> None:
        """Deletes the file. Idempotent."""
        self._file.close()
