"""Positioned reads from one file, cached or direct, from any number of threads."""

from __future__ import annotations

import mmap
import os
import threading
from abc import ABC, abstractmethod
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK = 4096
"""Alignment in bytes of a direct read: of its offset, its length and its buffer."""


class FileIdentity(NamedTuple):
    """By what a file is known to be the same, with the same content: writing to it changes the time."""

    nbytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path | int) -> FileIdentity:
        """The identity of a file, by its path or its descriptor. Raises OSError where there is none."""
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class FileChanged(OSError):
    """A file that is being read from has another content than when it was opened."""

    mend = "load it again"

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} changed since it was loaded")


class FileReader(ABC):
    """An open file. Reads are thread-safe."""

    @property
    @abstractmethod
    def identity(self) -> FileIdentity:
        """That of the open file now. Takes a microsecond: it may be looked at after every read."""

    @abstractmethod
    def read(self, offset: int, into: memoryview) -> int:
        """Fills `into` from byte `offset` on. Returns the number of bytes read: fewer only at the end of the file."""

    @abstractmethod
    def close(self) -> None:
        """Closes the file. No read may be in progress or follow."""


class PositionedReader(FileReader):
    """Reads through the page cache with `preadv`, with one file descriptor for all threads."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY)

    @property
    def identity(self) -> FileIdentity:
        """See the base class."""
        return FileIdentity.of(self._handle)

    def read(self, offset: int, into: memoryview) -> int:
        """See the base class."""
        done = 0
        while done < len(into):
            count = os.preadv(self._handle, [into[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        """See the base class."""
        os.close(self._handle)


class CachedReader(FileReader):
    """Reads through the page cache with a file descriptor per thread, for systems without `preadv`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self._lock = threading.Lock()
        self._opened: list[FileIO] = []

    @property
    def identity(self) -> FileIdentity:
        """See the base class."""
        return FileIdentity.of(self._file().fileno())

    def read(self, offset: int, into: memoryview) -> int:
        """See the base class."""
        file = self._file()
        file.seek(offset)
        done = 0
        while done < len(into):
            count = file.readinto(into[done:])
            if not count:
                break
            done += count
        return done

    def close(self) -> None:
        """See the base class."""
        with self._lock:
            while self._opened:
                self._opened.pop().close()

    def _file(self) -> FileIO:
        file: FileIO | None = getattr(self._local, "file", None)
        if file is None:
            file = self._local.file = FileIO(self._path)
            with self._lock:
                self._opened.append(file)
        return file


class DirectReader(FileReader):
    """Bypasses the page cache: reads whole blocks into an aligned buffer per thread, then copies the requested bytes.

    The copy costs less than the kernel's work for a page cache that is too small to produce hits.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._local = threading.local()

    @property
    def identity(self) -> FileIdentity:
        """See the base class."""
        return FileIdentity.of(self._handle)

    def read(self, offset: int, into: memoryview) -> int:
        """See the base class."""
        skip = offset % BLOCK
        end = skip + len(into)
        buffer = self._buffer(-(-end // BLOCK) * BLOCK)
        done = 0
        while done < end:
            count = os.preadv(self._handle, [memoryview(buffer)[done:]], offset - skip + done)
            done += count
            if count == 0 or count % BLOCK:
                break
        found = max(0, min(done, end) - skip)
        # numpy's copy releases the GIL; a copy between memoryviews does not.
        np.copyto(np.frombuffer(into, np.uint8)[:found], np.frombuffer(buffer, np.uint8)[skip : skip + found])
        return found

    def close(self) -> None:
        """See the base class."""
        os.close(self._handle)

    def _buffer(self, nbytes: int) -> memoryview:
        kept: mmap.mmap | None = getattr(self._local, "buffer", None)
        if kept is None or len(kept) < nbytes:
            kept = self._local.buffer = mmap.mmap(-1, nbytes)
        return memoryview(kept)[:nbytes]


def open_file(path: Path, *, direct: bool) -> FileReader:
    """Opens `path` for reading. `direct` bypasses the page cache where the file system supports it.

    Raises OSError when the file cannot be opened.
    """
    if direct and hasattr(os, "O_DIRECT") and hasattr(os, "preadv"):
        try:
            return DirectReader(os.open(path, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            # Some file systems refuse direct reads, such as those in memory.
            pass
    return PositionedReader(path) if hasattr(os, "preadv") else CachedReader(path)
