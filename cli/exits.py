"""Exit codes, the errors that only the terminal raises, and which error ends with which code."""

from __future__ import annotations

from enum import IntEnum

from edgemoe.errors import CheckpointError, EdgeMoEError, PlanError


class Exit(IntEnum):
    """What the process ends with. `DESCRIPTION` is the same list in words, shown by `edgemoe --help`."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CHECKPOINT = 3
    PLAN = 4
    FILE = 5
    INTERNAL = 70
    INTERRUPTED = 130


DESCRIPTION = """exit codes:
  0    all is well
  1    some requests failed (each left a record), or doctor found a problem
  2    wrong usage
  3    the checkpoint cannot be used
  4    the model does not fit, or what was asked for was refused
  5    an input or output file is in trouble
  70   a fault in edgemoe itself
  130  interrupted; what was written stays"""


class UsageError(EdgeMoEError):
    """The command line, or an environment variable in its place, is wrong."""


class FileTrouble(EdgeMoEError):
    """A file named on the command line cannot be read or written."""


def exit_for(error: EdgeMoEError) -> Exit:
    """The exit code of a command that ends with this error."""
    for kind, code in (
        (UsageError, Exit.USAGE),
        (FileTrouble, Exit.FILE),
        (CheckpointError, Exit.CHECKPOINT),
        (PlanError, Exit.PLAN),
    ):
        if isinstance(error, kind):
            return code
    return Exit.FAILED


def why(error: OSError) -> str:
    """The system's reason without the number and the path, for use inside a sentence."""
    return (error.strerror or str(error)).lower()
