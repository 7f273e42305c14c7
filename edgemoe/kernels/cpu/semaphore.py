"""A semaphore that native code waits at and posts to: the system's own."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any, NamedTuple


class _System(NamedTuple):
    """The system's functions, as ctypes has them. Their first argument is a semaphore's handle."""

    wait: Any
    """Its second argument is all ones: for ever."""
    post: Any
    """The others are 1 and 0."""
    give_way: Any
    """Lets other threads have the core; no argument."""


@cache
def _system() -> _System:
    if sys.platform == "win32":
        kernel = ctypes.windll.kernel32
        return _System(kernel.WaitForSingleObject, kernel.ReleaseSemaphore, kernel.SwitchToThread)
    library = ctypes.CDLL(None)
    if sys.platform == "darwin":
        return _System(library.dispatch_semaphore_wait, library.dispatch_semaphore_signal, library.sched_yield)
    return _System(library.sem_wait, library.sem_post, library.sched_yield)


class Semaphore:
    """Counts from 0; never destroyed while a thread may wait at it."""

    def __init__(self) -> None:
        self._memory = (ctypes.c_char * 64)()
        """What Linux keeps a semaphore in."""
        if sys.platform == "win32":
            self.handle = int(ctypes.windll.kernel32.CreateSemaphoreW(None, 0, 2**31 - 1, None))
        elif sys.platform == "darwin":
            create = ctypes.CDLL(None).dispatch_semaphore_create
            create.restype, create.argtypes = ctypes.c_void_p, [ctypes.c_long]
            self.handle = int(create(0))
        else:
            self.handle = ctypes.addressof(self._memory)
            ctypes.CDLL(None).sem_init(ctypes.c_void_p(self.handle), 0, 0)

    def post(self) -> None:
        """Lets one thread that waits go on, or the next one that comes."""
        _system().post(ctypes.c_void_p(self.handle), 1, 0)


@cache
def addresses() -> tuple[int, int, int]:
    """Those of the functions that wait, post and give way, for native code."""
    wait, post, give_way = (int(ctypes.cast(each, ctypes.c_void_p).value or 0) for each in _system())
    return wait, post, give_way
