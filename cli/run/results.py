"""The file or stream that results are appended to, one line each."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from io import FileIO

from edgemoe.cli.exits import FileTrouble, why
from edgemoe.cli.render import counted
from edgemoe.cli.streams import NoStream

STANDARD_OUTPUT = "-"


class Results:
    """Where results go. `written` counts the whole lines there; a line that fails half-way is taken back."""

    def __init__(self, name: str, file: FileIO | None) -> None:
        """Write to a file opened for unbuffered appending, or to standard output."""
        self.name = name
        self.written = 0
        self._file = file

    @classmethod
    def open(cls, path: str | None, *, overwrite: bool = False, resume: bool = False) -> Results:
        """Open without changing what is there, and keep other runs out.

        Raises FileTrouble when it cannot be written, another run writes there, or it is not empty though neither to be
        replaced nor resumed; for resuming, also when it is no regular file.
        """
        if path is None or path == STANDARD_OUTPUT:
            if isinstance(sys.stdout, NoStream):
                raise FileTrouble("standard output is closed, so nobody would get the results; give a file with -o")
            return cls("standard output", None)
        try:
            file = FileIO(path, "ab", opener=_open_at_once)
            status = os.fstat(file.fileno())
        except OSError as error:
            reason = "nobody reads this pipe" if error.errno == errno.ENXIO else why(error)
            raise FileTrouble(f"cannot write {path}: {reason}; give another file with -o") from error
        regular = stat.S_ISREG(status.st_mode)
        trouble = None
        if stat.S_ISBLK(status.st_mode):
            trouble = f"{path} is a disk, whose contents the results would replace; give a file with -o"
        elif regular and not _lock(file):
            trouble = f"another run is writing to {path}; wait for its end, or give another file with -o"
        elif regular and status.st_size and not overwrite and not resume:
            trouble = f"{path} is not empty; give another file with -o, --resume to go on, or --overwrite to replace it"
        elif resume and not regular:
            trouble = f"{path} is no regular file, so nothing in it can be resumed; give another file with -o"
        if trouble is not None:
            file.close()
            raise FileTrouble(trouble)
        return cls(path, file)

    @property
    def on_terminal(self) -> bool:
        """Whether the results scroll by on a terminal."""
        return self._file is None and sys.stdout.isatty()

    def begin(self, keep: int = 0) -> None:
        """Drop what the file held beyond its first `keep` bytes.

        To be called once the model is loaded, so that a failed start loses nothing. Raises FileTrouble.
        """
        if self._file is not None and os.fstat(self._file.fileno()).st_size > keep:
            try:
                self._file.truncate(keep)
            except OSError as error:
                raise FileTrouble(f"cannot shorten {self.name}: {why(error)}; give another file with -o") from error

    def write(self, line: bytes) -> None:
        """Append one line. Raises FileTrouble, saying how many results are safe."""
        try:
            if self._file is None:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            else:
                self._append(self._file, line)
        except OSError as error:
            raise FileTrouble(
                f"cannot write to {self.name} any more: {why(error)}; {counted(self.written, 'result')} written so far"
            ) from error
        self.written += 1

    def close(self) -> None:
        """Close the file; standard output stays open."""
        if self._file is not None:
            self._file.close()

    def _append(self, file: FileIO, line: bytes) -> None:
        end = os.fstat(file.fileno()).st_size
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            # What is no regular file (a pipe, a device) has no length; there is nothing to take back.
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def _open_at_once(path: str, flags: int) -> int:
    """Opens without waiting for somebody who reads a pipe; what is written later may wait for a slow reader."""
    # Windows has no such pipes, and no such flag.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    if hasattr(os, "O_NONBLOCK"):
        os.set_blocking(descriptor, True)
    return descriptor


def _lock(file: FileIO) -> bool:
    """Whether no other process has locked the file; until this one closes it, none can."""
    try:
        import fcntl
    except ImportError:  # Windows, where a file is not locked
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that knows no locks
        return True
    return True
