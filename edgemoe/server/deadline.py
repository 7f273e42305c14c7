"""An awaitable that may take a time, and that is cancelled when its task is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(seconds: float | None, awaitable: Awaitable[T]) -> T:
    """What `awaitable` gives. Raises asyncio.TimeoutError, and cancels it, after `seconds`; None is for ever.

    As `asyncio.wait_for` of Python 3.12. Before that, it keeps a cancellation to itself that comes at the moment in
    which its work is done: a reply whose client is gone would go on to its end.
    """
    work = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({work}, timeout=seconds)
        if not work.done():
            raise asyncio.TimeoutError
        return work.result()
    finally:
        if not work.done():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
