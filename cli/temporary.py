"""The temporary folder, which PyTorch wants when it is imported, on machines where the usual ones cannot be written."""

from __future__ import annotations

import os
import tempfile

from edgemoe.cli.exits import UsageError

IN_MEMORY = "/dev/shm"
"""A folder in RAM that most Linux systems have."""


def ensure_temporary_folder() -> None:
    """Takes a folder in memory where Python finds none. Raises UsageError where that cannot be written either."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if not os.access(IN_MEMORY, os.W_OK):
            raise UsageError("no temporary folder can be written; name one in the variable TMPDIR") from None
        tempfile.tempdir = IN_MEMORY
