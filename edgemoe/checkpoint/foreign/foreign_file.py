"""Opens files that others wrote: regular files only, so that no pipe, device or folder can block or never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from edgemoe.errors import CheckpointError

NONBLOCK = getattr(os, "O_NONBLOCK", 0)
"""Opening a pipe without a writer would wait for one, if another program puts it there after the check."""
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
"""What a path may be in place of a file, for messages."""


def check_file(path: Path) -> int:
    """The size in bytes of the regular file that `path` is, or is a link to. Raises CheckpointError if it is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error
    return _size(path, status)


def open_file(path: Path) -> tuple[BinaryIO, int]:
    """The open file and its size in bytes. Raises CheckpointError, with the reason, for anything but a regular file."""
    check_file(path)
    try:
        handle = os.open(path, os.O_RDONLY | NONBLOCK | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        return os.fdopen(handle, "rb"), _size(path, os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise


def read_file(path: Path, limit: int) -> bytes:
    """The content of the file. Raises CheckpointError as `open_file`, and for one of more than `limit` bytes."""
    stream, size = open_file(path)
    with stream:
        if size > limit:
            raise too_large(path, size, limit)
        try:
            data = stream.read(limit + 1)
        except OSError as error:
            raise _unusable(path, error) from error
    if len(data) > limit:
        raise too_large(path, len(data), limit)
    return data


def too_large(path: Path, size: int, limit: int) -> CheckpointError:
    """The error to raise for a file of `size` bytes, where `limit` are read."""
    return CheckpointError(f"{path} has {size} bytes, and such a file has {limit} at most: fetch it again")


def _size(path: Path, status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise CheckpointError(f"{path} is {kind}, where a file should be: fetch the checkpoint again")
    return status.st_size


def _unusable(path: Path, error: OSError | ValueError) -> CheckpointError:
    number = getattr(error, "errno", None)
    if number == errno.ENOENT and os.path.islink(path):
        return CheckpointError(f"{path} is a link to nowhere: fetch the checkpoint again")
    if number == errno.ELOOP:
        return CheckpointError(f"{path} is a link that leads back to itself: fetch the checkpoint again")
    if number in (errno.EACCES, errno.EPERM):
        return CheckpointError(f"{path} cannot be read ({os.strerror(number)}): give it to this user")
    told = getattr(error, "strerror", None) or error
    return CheckpointError(f"{path} cannot be read ({told}): fetch the checkpoint again")
