"""Standard output, which carries the answer, and notes on standard error, beside it."""

from __future__ import annotations

import os
import sys

from edgemoe.cli.exits import FileTrouble, why
from edgemoe.cli.render import harmless_line


def put(text: str) -> None:
    """Write at once. Raises FileTrouble for a full disk; BrokenPipeError, when nobody reads on, passes through."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FileTrouble(f"cannot write to standard output: {why(error)}") from error


def say(sentence: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"edgemoe: {harmless_line(sentence)}\n")
    sys.stderr.flush()


def settle() -> None:
    """Make sure that nothing unwritten is left, about which the interpreter would complain on its way out."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
