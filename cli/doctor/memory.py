"""Memory: what is free, who else has it, and the system's limits and settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from edgemoe.cli.doctor.check import NOTE, OK, Check
from edgemoe.plan import machine
from edgemoe.sizes import format_bytes

_LITTLE = 2 << 30
_MUCH = 0.1
"""Share of the memory from which on a program is named."""
_NAMED = 3
_FEW_FILES = 256
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def memory() -> Iterator[Check]:
    """Free memory, swap, huge pages, and the limits of this process."""
    yield _free(machine.ram_free(), machine.ram_limit(), psutil.virtual_memory().total, _others())
    swap = psutil.swap_memory()
    yield _swap(swap.used, swap.total)
    with suppress(OSError):
        yield _huge_pages(_HUGE_PAGES.read_text())
    with suppress(ImportError):  # not on Windows
        yield from _limits()


def _free(free: int, limit: int, total: int, others: list[tuple[str, int]]) -> Check:
    """`limit` bytes are for this process, of the machine's `total`; `others` are the largest programs."""
    found = f"{format_bytes(free)} free of {format_bytes(limit)}"
    if limit < total:
        found += f", the limit of its control group; the machine has {format_bytes(total)}"
    if others:
        found += f"; of other programs, {', '.join(f'{name} has {format_bytes(nbytes)}' for name, nbytes in others)}"
    if free < _LITTLE:
        return Check("memory", NOTE, found, "close other programs before loading a model")
    return Check("memory", OK, found)


def _others() -> list[tuple[str, int]]:
    """The programs with much of the memory, by name, and their bytes; not this one."""
    used: dict[str, int] = {}
    own = psutil.Process().pid
    for process in psutil.process_iter(["name", "memory_info"]):
        told = process.info["memory_info"]
        if process.pid != own and told is not None:
            used[process.info["name"] or "?"] = used.get(process.info["name"] or "?", 0) + told.rss
    total = psutil.virtual_memory().total
    much = [(name, nbytes) for name, nbytes in used.items() if nbytes > _MUCH * total]
    return sorted(much, key=lambda one: -one[1])[:_NAMED]


def _swap(used: int, total: int) -> Check:
    found = f"{format_bytes(used)} of {format_bytes(total)} used" if total else "none"
    if used > _LITTLE // 2:
        return Check("swap", NOTE, found, "close programs: what is swapped out comes back slowly")
    return Check("swap", OK, found)


def _huge_pages(setting: str) -> Check:
    """`setting` is the system's, such as "always [madvise] never"."""
    chosen = setting.partition("[")[2].partition("]")[0]
    if chosen == "never":
        advice = f"echo madvise > {_HUGE_PAGES}, as root, makes reading weights faster"
        return Check("huge pages", NOTE, "the system gives none", advice)
    return Check("huge pages", OK, f"given ({chosen})")


def _limits() -> Iterator[Check]:
    """Of open files and locked memory."""
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        yield Check("open files", NOTE, f"at most {files}", "ulimit -n 4096 before edgemoe allows more")
    else:
        yield Check("open files", OK, "any number" if files == resource.RLIM_INFINITY else f"at most {files}")
    yield Check("locked memory", OK, f"at most {locked_memory()}")


def locked_memory() -> str:
    """How much memory this process may lock, in words; what a card copies from is locked."""
    try:
        import resource
    except ImportError:
        return "any amount"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "any amount" if limit == resource.RLIM_INFINITY else format_bytes(limit)
