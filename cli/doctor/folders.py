"""Where edgemoe writes, and the disk that a model is read from."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.checkpoint.state_folder import user_cache
from edgemoe.cli.doctor.check import NOTE, OK, PROBLEM, Check
from edgemoe.cli.exits import why
from edgemoe.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAX_READS = 256 << 20
_MIN_READS = 32 << 20
_READ_PIECE = 8 << 20
SLOW_READ = 200 << 20
"""Bytes a second below which a model that is read from disk while it runs is no pleasure."""
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "fuse.sshfs", "fuse.rclone"}
"""File systems that are on other machines."""


def folders() -> Iterator[Check]:
    """The folders for what is kept between runs, and for what is not."""
    yield _kept()
    yield _compiled_code()
    temporary = Path(tempfile.gettempdir())
    yield Check("temporary folder", OK, f"{temporary}, {format_bytes(shutil.disk_usage(temporary).free)} free")


def _kept() -> Check:
    """Whether profiles and the like can be kept."""
    advice = "name another with --state-folder; what was learnt of a model is lost otherwise"
    try:
        folder = user_cache()
    except RuntimeError as error:
        return Check("cache folder", NOTE, str(error).lower(), advice)
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return Check("cache folder", NOTE, f"{folder} cannot be written", advice)
    return Check("cache folder", OK, f"{folder}, {format_bytes(shutil.disk_usage(there).free)} free")


def _compiled_code() -> Check:
    try:
        from edgemoe.cache.compiled import is_kept
    except (ImportError, OSError) as error:
        return Check("compiled code", PROBLEM, f"numba cannot be imported: {error}", "install numba again")
    if is_kept():
        return Check("compiled code", OK, "kept on disk for the next start")
    advice = "set NUMBA_CACHE_DIR to a folder that can be written"
    return Check("compiled code", NOTE, "cannot be kept, so that every start compiles for some seconds", advice)


# --- the disk of a model -------------------------------------------------------------------------


def disk(folder: Path) -> Check:
    """What kind of disk `folder` is on."""
    kind = file_system(folder)
    found = f"{format_bytes(shutil.disk_usage(folder).free)} free" + (f" ({kind})" if kind else "")
    if kind in _NETWORK:
        return Check("disk", NOTE, f"{found}, on another machine", "copy the model to a disk of this one")
    return Check("disk", OK, found)


def file_system(folder: Path, partitions: Iterable[tuple[str, str]] | None = None) -> str:
    """The kind of the file system of `folder`; empty where the system does not say.

    `partitions` are mount points and kinds, the system's own where none are given.
    """
    import psutil

    if partitions is None:
        partitions = ((each.mountpoint, each.fstype) for each in psutil.disk_partitions(all=True))
    place = folder.resolve()
    mounted = [(point, kind) for point, kind in partitions if place.is_relative_to(point)]
    return max(mounted, key=lambda one: len(one[0]), default=("", ""))[1]


def _turns(file: Path) -> bool:
    """Whether the disk of `file` is of the kind that turns, as far as the system says."""
    device = file.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}") if hasattr(os, "major") else None
    if place is None or not place.exists():
        return False
    for each in (place.resolve(), *place.resolve().parents[:1]):
        try:
            return (each / "queue" / "rotational").read_text().strip() == "1"
        except OSError:
            continue
    return False


def read_speed(file: Path, clock: Callable[[], float] = time.perf_counter) -> tuple[Check, float | None]:
    """Reads the beginning of a file, past the system's file cache where the system can be asked to empty it.

    Also the bytes a second; None where the file is too small or cannot be read.
    """
    done = 0
    try:
        with file.open("rb", buffering=0) as raw:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begun = clock()
            while done < _MAX_READS and (piece := raw.read(_READ_PIECE)):
                done += len(piece)
            rate = done / max(clock() - begun, 1e-9)
    except OSError as error:
        return Check("disk read", PROBLEM, f"{file.name}: {why(error)}", "copy the model to a sound disk"), None
    found = f"{format_bytes(rate)} a second"
    if done < _MIN_READS:
        return Check("disk read", OK, f"{file.name} is too small to measure"), None
    if rate < SLOW_READ:
        advice = "a model that does not fit in memory will be slow; use a faster disk"
        if _turns(file):
            # Virtual disks are said to turn, too, so that this is told of slow ones alone.
            advice = "it turns: a model that does not fit in memory will be slow; copy it to a solid-state disk"
        return Check("disk read", NOTE, found, advice), rate
    return Check("disk read", OK, found), rate
