"""Where edgemoe keeps small files of its own about a checkpoint, between one run and the next.

Nothing here is needed: a folder that is missing, or cannot be written, only means that nothing is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemoe.checkpoint.checkpoint import Checkpoint

NONE = "none"
"""In the place of a folder: nothing is kept."""
LABEL_LENGTH = 48
"""Most characters of a checkpoint's name in the name of its folder."""


class StateFolder:
    """The files that are kept about one checkpoint. `path` is None where nothing is kept. Safe from any thread."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @classmethod
    def of(cls, checkpoint: Checkpoint, folder: str | os.PathLike[str] | None) -> StateFolder:
        """The place for `checkpoint` in `folder`: None is the user's cache folder, "none" (or "") keeps nothing.

        Creates nothing and never fails: where there is no such place, nothing is kept.
        """
        if keeps_nothing(folder):
            return cls(None)
        try:
            # Absolute, since the process may go elsewhere before the next use.
            root = user_cache() / "edgemoe" if folder is None else Path(folder).expanduser().absolute()
            return cls(root / identity(checkpoint))
        except (OSError, RuntimeError):
            # No home, or a checkpoint that has gone meanwhile.
            return cls(None)

    def read(self, name: str, most: int) -> bytes | None:
        """The file called `name`; None where there is none of at most `most` bytes that can be read."""
        if self.path is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            file = self.path / name
            status = file.stat()
            # Whatever else lies there is not ours: opening a pipe would wait for ever.
            if stat.S_ISREG(status.st_mode) and status.st_size <= most:
                return file.read_bytes()
        return None

    def write(self, name: str, data: bytes) -> None:
        """Puts `data` into the file called `name`: whole or not at all, whoever else writes or reads it now.

        Raises OSError where that cannot be done.
        """
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
        """Raises OSError where `write` would, as far as that can be told without writing anything that stays."""
        if self.path is None:
            raise OSError("there is no folder to keep it in")
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.path):
            pass


def keeps_nothing(folder: str | os.PathLike[str] | None) -> bool:
    """Whether `folder`, as a user gives it, says that nothing is to be kept."""
    return folder is not None and os.fspath(folder).lower() in ("", NONE)


def user_cache() -> Path:
    """The folder for files that may be lost, by the platform's convention. Raises RuntimeError without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # By its convention a relative one does not count.
    if os.path.isabs(given):
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    return Path.home() / ".cache"


def identity(checkpoint: Checkpoint) -> str:
    """A name for a checkpoint's folder: its own, and a fingerprint of its files' names, sizes and times.

    No file is read. Weights that are written anew are another checkpoint. Raises OSError where a file has gone.
    """
    given = os.path.expanduser(checkpoint.name)
    # However a path to a folder is written, the folder has one name.
    name = os.path.basename(os.path.realpath(given)) if os.path.isdir(given) else checkpoint.name
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:LABEL_LENGTH].strip("-.") or "model"
    digest = hashlib.sha256(name.encode(errors="surrogateescape"))
    for file in checkpoint.files:
        status = file.stat()
        digest.update(f"\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape"))
    return f"{label}-{digest.hexdigest()[:16]}"
