"""The faults of the `faults` measurement, by name. Each is set in a `Faults` and takes effect when it is due."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from bench.support.faults import Faults

OTHERS = bytes(byte ^ 0x15 for byte in range(256))
"""For each byte another one."""
HANG = "hang"
ONCE = "no memory once"
"""What an engine recovers from."""


def _raises(error: Callable[[], BaseException]) -> Callable[[Faults], None]:
    def fault(faults: Faults) -> None:
        def read() -> None:
            raise error()

        faults.read = read

    return fault


def _hangs(faults: Faults) -> None:
    returns = threading.Event()
    faults.hung = returns
    faults.read = lambda: _wait(returns)


def _wait(returns: threading.Event) -> None:
    returns.wait(60)


def _no_memory_once(faults: Faults) -> None:
    def read() -> None:
        faults.lift()
        raise MemoryError

    faults.read = read


def _link_fails(faults: Faults) -> None:
    faults.transfer = RuntimeError("the link is down")


KINDS: dict[str, Callable[[Faults], None]] = {
    "read error": _raises(lambda: OSError(5, "Input/output error")),
    "short read": _raises(lambda: OSError("the file ends in the middle of an expert")),
    "wrong length": _raises(lambda: ValueError("buffer size does not match")),
    "no memory": _raises(MemoryError),
    ONCE: _no_memory_once,
    "no device memory": _raises(lambda: torch.OutOfMemoryError("CUDA out of memory")),
    "reader dies": _raises(lambda: SystemExit("the reader is gone")),
    "link fails": _link_fails,
    HANG: _hangs,
}
"""Faults that end when they are lifted."""


def _replace(path: Path) -> None:
    """Another file of the same size in its place, as a download that is repeated puts it there."""
    other = path.with_suffix(".other")
    other.write_bytes(_damaged(path.read_bytes()))
    os.replace(other, path)


def _overwrite(path: Path) -> None:
    """Another content in the same file."""
    data = _damaged(path.read_bytes())
    with path.open("r+b") as file:
        file.write(data)


def _damaged(data: bytes) -> bytes:
    """The same header, and tensors whose second halves are other numbers."""
    kept = len(data) // 2
    return data[:kept] + data[kept:].translate(OTHERS)


def _changes(change: Callable[[Path], None]) -> Callable[[Faults, Path], None]:
    def fault(faults: Faults, folder: Path) -> None:
        def read() -> None:
            faults.lift()
            for path in sorted(folder.glob("*.safetensors")):
                change(path)

        faults.read = read

    return fault


CHANGES: dict[str, Callable[[Faults, Path], None]] = {
    "replaced checkpoint": _changes(_replace),
    "overwritten checkpoint": _changes(_overwrite),
}
"""Faults of a checkpoint in a folder, which stay."""
