"""Positioned reads from one file, through the page cache or past it, from any number of threads."""

from __future__ import annotations

import mmap
import os
import threading
from abc import ABC, abstractmethod
from io import FileIO
from pathlib import Path

import numpy as np

BLOCK = 4096
"""Reads past the page cache must start, end and land on multiples of this many bytes."""


class FileReader(ABC):
    """An open file."""

    @abstractmethod
    def read(self, offset: int, into: memoryview) -> int:
        """Fills `into` from byte `offset` on and returns how many bytes there were; fewer only at the file's end."""

    @abstractmethod
    def close(self) -> None:
        """Gives the file back; no read may be under way or follow."""


class PositionedReader(FileReader):
    """Through the page cache, with one handle for all threads."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY)

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
    """Through the page cache, a handle for each thread: for systems that cannot read at a position."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self._lock = threading.Lock()
        self._opened: list[FileIO] = []

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
    """Past the page cache: whole blocks into an aligned buffer of the thread's own, then a copy of what is wanted.

    The copy costs less than what the kernel spends on a page cache that is too small to help.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._local = threading.local()

    def read(self, offset: int, into: memoryview) -> int:
        """See the base class."""
        skip = offset % BLOCK
        wanted = skip + len(into)
        buffer = self._buffer(-(-wanted // BLOCK) * BLOCK)
        done = 0
        while done < wanted:
            count = os.preadv(self._handle, [memoryview(buffer)[done:]], offset - skip + done)
            done += count
            if count == 0 or count % BLOCK:
                break
        found = max(0, min(done, wanted) - skip)
        # numpy's copy lets other threads run meanwhile; one between memoryviews would not.
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
    """`path` for reading, past the page cache if `direct` and if its file system can."""
    if direct and hasattr(os, "O_DIRECT") and hasattr(os, "preadv"):
        try:
            return DirectReader(os.open(path, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            # Memory file systems have nothing to bypass and say so by refusing.
            pass
    return PositionedReader(path) if hasattr(os, "preadv") else CachedReader(path)
