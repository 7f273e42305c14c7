"""Small files that edgemoe keeps about a checkpoint between runs.

None of them is needed: with a folder that is missing or cannot be written, every run starts without them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.checkpoint.foreign.foreign_file import read_file
from edgemoe.errors import CheckpointError

if TYPE_CHECKING:
    from edgemoe.checkpoint.checkpoint import Checkpoint

NONE = "none"
"""Given instead of a folder, it means that nothing is kept."""
MAX_LABEL_LENGTH = 48
"""Maximum number of characters of the checkpoint's name in its folder's name."""


class StateFolder:
    """The files kept about one checkpoint, in the folder `path`; None if nothing is kept. Thread-safe."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @classmethod
    def of(cls, checkpoint: Checkpoint, folder: str | os.PathLike[str] | None) -> StateFolder:
        """The state folder of `checkpoint` below `folder`: None is the user's cache folder, "none" or "" keeps nothing.

        Creates no folder and never fails: without a usable folder, nothing is kept.
        """
        if keeps_nothing(folder):
            return cls(None)
        try:
            # Absolute, since the process may change its working directory.
            root = user_cache() / "edgemoe" if folder is None else Path(folder).expanduser().absolute()
            return cls(root / identity(checkpoint))
        except (OSError, RuntimeError):
            # No home folder, or a checkpoint that was deleted meanwhile.
            return cls(None)

    def read(self, name: str, max_nbytes: int) -> bytes | None:
        """The content of the file `name`; None if it cannot be read or is larger than `max_nbytes`."""
        if self.path is None:
            return None
        with contextlib.suppress(CheckpointError, OSError, ValueError):
            return read_file(self.path / name, max_nbytes)
        return None

    def write(self, name: str, data: bytes) -> None:
        """Replaces the file `name` with `data`, atomically for all threads and processes. Raises OSError on failure."""
        if self.path is None:
            raise OSError("there is no folder to keep it in")
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{name}.", suffix=".tmp", dir=self.path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, self.path / name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def probe(self) -> None:
        """Raises OSError if the folder cannot be created or takes no file; leaves no file behind."""
        if self.path is None:
            raise OSError("there is no folder to keep it in")
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.path):
            pass


def keeps_nothing(folder: str | os.PathLike[str] | None) -> bool:
    """Whether `folder`, as given by the user, means that nothing is kept."""
    return folder is not None and os.fspath(folder).lower() in ("", NONE)


def user_cache() -> Path:
    """The user's cache folder by the platform's convention. Raises RuntimeError without a home folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG convention ignores a relative path.
    if os.path.isabs(given):
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    return Path.home() / ".cache"


def identity(checkpoint: Checkpoint) -> str:
    """The name of a checkpoint's state folder: its own name, and a fingerprint of its files' names, sizes and times.

    Reads no file. Rewritten weights count as another checkpoint. Raises OSError if a file is gone.
    """
    given = os.path.expanduser(checkpoint.name)
    folder, colon, chosen = given.rpartition(":")
    # All paths to one folder give one name, also with a file chosen in it.
    if os.path.isdir(given):
        name = os.path.basename(os.path.realpath(given))
    elif os.path.isdir(folder):
        name = os.path.basename(os.path.realpath(folder)) + colon + chosen
    else:
        name = checkpoint.name
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:MAX_LABEL_LENGTH].strip("-.") or "model"
    digest = hashlib.sha256(name.encode(errors="surrogateescape"))
    for file in checkpoint.files:
        status = file.stat()
        digest.update(f"\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape"))
    return f"{label}-{digest.hexdigest()[:16]}"
