"""One connection of a client: uvicorn's, with limits on how long a request may take to come."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgemoe.server.replying import ABORT

HEADER_TIMEOUT = 20.0
"""Seconds that a request line and its headers may take."""


class Connection(H11Protocol):
    """Closes itself where a request does not come whole, and lets the application drop it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.app = functools.partial(_serve, self, self.app)
        self._deadline: asyncio.TimerHandle | None = None
        self._begun = False
        """Whether a part of a next request has come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        if not self._idle():
            self._stop_waiting()
        elif not self._begun:
            self._begun = True
            self._wait()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        self._begun = False
        # What has come of a next request already is not given again.
        if self._idle() and not self.transport.is_closing():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._stop_waiting()
        super().connection_lost(exc)

    def drop(self) -> None:
        """Ends the connection without waiting for what the client has not read."""
        self.transport.abort()

    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(HEADER_TIMEOUT, self._late)

    def _stop_waiting(self) -> None:
        deadline, self._deadline = self._deadline, None
        if deadline is not None:
            deadline.cancel()

    def _late(self) -> None:
        self._deadline = None
        if self._idle():
            self.transport.close()


async def _serve(connection: Connection, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app({**scope, ABORT: connection.drop}, receive, send)
