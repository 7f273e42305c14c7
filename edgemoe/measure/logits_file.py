"""Logits of many tokens, written by one model and read beside another's."""

from __future__ import annotations

import shutil
import tempfile

import torch

from edgemoe.errors import PlanError
from edgemoe.sizes import format_bytes


class LogitsFile:
    """A temporary file of float32 rows, one a token: they are too many for memory that the experts have.

    It lies where Python's `tempfile` puts files, has no name that anybody else could open, and is gone with `close`.
    """

    def __init__(self, vocabulary: int, most: int) -> None:
        """For at most `most` tokens' logits over `vocabulary`. Raises PlanError where the disk has no room for that."""
        self._vocabulary = vocabulary
        nbytes, folder = 4 * vocabulary * most, tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        self._refusal = (
            f"the logits of {most} tokens take {format_bytes(nbytes)} in {folder}, where {format_bytes(free)} are "
            f"free: measure fewer with tokens=, or name another folder in TMPDIR"
        )
        if nbytes > free:
            raise PlanError(self._refusal)
        self._file = tempfile.TemporaryFile(prefix="edgemoe-logits-", buffering=0)  # noqa: SIM115 - see close

    def append(self, logits: torch.Tensor) -> None:
        """Adds rows, float32 [tokens, vocabulary]. Raises PlanError when the disk has become full."""
        if logits.shape[1] != self._vocabulary:
            raise ValueError(f"rows of {logits.shape[1]} do not go among rows of {self._vocabulary}")
        left = logits.contiguous().numpy().data.cast("B")
        try:
            # A write that hits the end of the disk is short first, and an error only then.
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise PlanError(self._refusal) from error

    def rewind(self) -> None:
        """Goes back to the first row, for `take`."""
        self._file.seek(0)

    def take(self, tokens: int) -> torch.Tensor:
        """The next rows, float32 [tokens, vocabulary]; ValueError when there are fewer."""
        rows = torch.empty(tokens, self._vocabulary)
        left = rows.numpy().data.cast("B")
        while left:
            count = self._file.readinto(left)
            if not count:
                raise ValueError(f"there are no {tokens} more rows")
            left = left[count:]
        return rows

    def close(self) -> None:
        """Gives the room back."""
        self._file.close()
