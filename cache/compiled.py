"""Functions that numba compiles, kept on disk where a folder for that can be written."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from numba import njit, types
from numba.core.caching import IndexDataCacheFile, InTreeCacheLocator, UserWideCacheLocator
from numba.core.ccallback import CFunc

GENERATORS = ("edgemoe.kernels.cpu", "edgemoe.kernels.cpu.packed", "edgemoe.formats")
"""Packages whose modules write the code that others compile, or hold its tables."""

INSTALLED = frozenset({"site-packages", "dist-packages"})
"""Names of the folders that pip installs packages in."""


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: the function as machine code, with numba's `options`.

    Where nothing can be kept, as in a read-only installation of a user without a home, every process compiles anew.
    """

    def compile_it(function: Callable[..., Any]) -> Any:
        try:
            return _keyed(njit(cache=True, **options)(function))
        except RuntimeError:
            # numba found no folder.
            return njit(**options)(function)

    return compile_it


def _keyed(function: Any) -> Any:
    """The compiled `function`, whose code is kept by `_key`."""
    # There is no cache where numba is told not to compile.
    kept = getattr(function, "_cache", None)
    if kept is not None:
        _key(kept)
    return function


def _key(kept: Any) -> None:
    """Has numba's cache `kept` hold code until the function's module or the `GENERATORS` change.

    numba looks at the function's own module alone, and would run code of an older version after an upgrade.
    """
    _move_out(kept)
    kept._cache_file = IndexDataCacheFile(
        cache_path=kept.cache_path,
        filename_base=kept._impl.filename_base,
        source_stamp=(kept._impl.locator.get_source_stamp(), generators_digest()),
    )


def _move_out(kept: Any) -> None:
    """Has numba's cache `kept` hold code in the user's cache folder, where it would be beside an installed module.

    pip does not remove what it has not installed, and the folder that stays would hide a checkout installed later.
    """
    place = kept._impl.locator
    if type(place) is not InTreeCacheLocator or not INSTALLED & {*Path(place.get_cache_path()).parts}:
        return
    other = UserWideCacheLocator.from_function(kept._py_func, place._py_file)
    if other is not None:
        kept._impl._locator = other
        kept._cache_path = other.get_cache_path()


class Native:
    """A function of 64-bit integers as machine code, which runs without the GIL.

    A call costs a microsecond, where numba takes ten to look at the arrays among the arguments of a compiled function.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        """`function` has no result and raises nothing."""
        self.__doc__ = function.__doc__
        self._function = function
        self._made: Any = None
        self._lock = threading.Lock()

    @property
    def call(self) -> Callable[..., None]:
        """The machine code, compiled or read from disk when it is first asked for."""
        called: Callable[..., None] = self._code().ctypes
        return called

    @property
    def address(self) -> int:
        """Of the machine code."""
        return int(self._code().address)

    def _code(self) -> Any:
        # One for all threads: what is compiled twice would be freed once, under those who run it.
        with self._lock:
            if self._made is None:
                self._made = self._compiled()
            return self._made

    def _compiled(self) -> Any:
        arguments = (types.int64,) * self._function.__code__.co_argcount
        made: Any = CFunc(self._function, (arguments, types.void), {}, {"error_model": "numpy"})
        # Where numba finds no folder, every process compiles anew.
        with suppress(RuntimeError):
            made.enable_caching()
            _key(made._cache)
        made.compile()
        return made


@cache
def generators_digest() -> str:
    """SHA-256 of the sources of the `GENERATORS`."""
    digest = hashlib.sha256()
    for name in GENERATORS:
        for source in sorted(files(import_module(name)).iterdir(), key=lambda source: source.name):
            if source.name.endswith(".py"):
                digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


def is_kept() -> bool:
    """Whether numba finds a folder that it can keep compiled code in."""
    try:
        njit(cache=True)(is_kept)
    except RuntimeError:
        return False
    return True
