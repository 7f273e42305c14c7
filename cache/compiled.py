"""Functions that numba compiles, kept on disk where a folder for that can be written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any

from numba import njit
from numba.core.caching import IndexDataCacheFile

GENERATORS = ("edgemoe.kernels.cpu", "edgemoe.formats")
"""Packages whose modules write the code that others compile, or hold its tables."""


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
    """The compiled `function`, of which numba keeps code until its module or the `GENERATORS` change.

    numba looks at the function's own module alone, and would run code of an older version after an upgrade.
    """
    # There is none where numba is told not to compile.
    kept = getattr(function, "_cache", None)
    if kept is not None:
        kept._cache_file = IndexDataCacheFile(
            cache_path=kept.cache_path,
            filename_base=kept._impl.filename_base,
            source_stamp=(kept._impl.locator.get_source_stamp(), generators_digest()),
        )
    return function


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
