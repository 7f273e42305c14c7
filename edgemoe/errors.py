"""Every error that edgemoe raises on purpose, and what all of its modules do with the errors of others.

EdgeMoEError
├── CheckpointError   a checkpoint that cannot be used
├── PlanError         a request for memory or a device that this machine does not have
└── RequestError      a prompt or a setting that cannot be served
    └── LogitsError   a prompt for which the model computes no numbers

Each message is one sentence for the user: the value, the limit, and the option or command that mends it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class EdgeMoEError(Exception):
    """The root: catching it catches everything that edgemoe raises on purpose."""


class CheckpointError(EdgeMoEError):
    """A checkpoint is missing, damaged, unsupported or unsafe."""


class PlanError(EdgeMoEError):
    """The model, context or expert cache asked for does not fit the available memory, or the device does not exist."""


class RequestError(EdgeMoEError):
    """A prompt or sampling setting that cannot be served; the engine stays usable."""


class LogitsError(RequestError):
    """The logits of a reply are not finite, so that there is no next token; the engine stays usable."""


def reason(error: BaseException) -> str:
    """The first line of the error's text, with the next one where it ends in a colon; else the name of its type."""
    lines = [line.rstrip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def unreadable(name: str, error: OSError) -> CheckpointError:
    """The error to raise where the files of the checkpoint called `name` could be read before and now raise `error`."""
    return CheckpointError(f"{name} cannot be read any more ({error}): {getattr(error, 'mend', 'fetch it again')}")


class TracebackText(Exception):
    """The traceback of an error that had one, as text."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def without_frames(error: BaseException) -> None:
    """Replaces the traceback of `error`, and what it was raised from, by their text.

    Whoever keeps the error would keep all that the functions held which it has left or passed, such as a model.
    """
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    error.__traceback__ = error.__context__ = None
    error.__cause__ = TracebackText(text)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Raises an OSError of the block as the CheckpointError `unreadable(name, error)`."""
    try:
        yield
    except OSError as error:
        raise unreadable(name, error) from error


_DEVICE_ERRORS = ("OutOfMemoryError", "AcceleratorError")
"""Names in torch; an older torch lacks the second."""
_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "DefaultCPUAllocator")
_DEVICE_TEXTS = (*_MEMORY_TEXTS, "CUDA error")
"""In the text of the plain RuntimeErrors that torch raises for the same faults."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a device had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_TEXTS)


def is_device_or_memory_error(error: BaseException) -> bool:
    """Whether the machine failed (memory, device or file), so that the error says nothing about a model's code.

    A probe that takes any other error for an answer must raise these.
    """
    # No import: without torch loaded there is no error of torch, and this module stays cheap to import.
    torch = sys.modules.get("torch")
    kinds = (getattr(torch, name, None) for name in _DEVICE_ERRORS)
    if isinstance(error, (MemoryError, OSError, *(kind for kind in kinds if kind is not None))):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_TEXTS)


@contextmanager
def told_as(told: Callable[[str], EdgeMoEError], *, of_files: bool = False) -> Iterator[None]:
    """Raises what another library raises in the block as `told(reason)`.

    Errors of edgemoe pass, and so do those that say that the machine failed; with `of_files`, an OSError speaks of the
    files that the block reads.
    """
    try:
        yield
    except EdgeMoEError:
        raise
    except Exception as error:
        if is_device_or_memory_error(error) and not (of_files and isinstance(error, OSError)):
            raise
        raise told(reason(error)) from error
