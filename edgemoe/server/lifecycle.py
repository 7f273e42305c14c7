"""A server from its start to its end: the socket, the loop, and signals."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from edgemoe.errors import EdgeMoEError
from edgemoe.model_host import ModelHost
from edgemoe.server.app import App
from edgemoe.server.connection import Connection
from edgemoe.server.settings import ServerSettings

MAX_CONNECTIONS = 1024
MAX_HEADERS = 32 << 10
"""Bytes of a request line and its headers."""
KEEP_ALIVE = 20
"""Seconds for which a connection without a request is kept."""


class Server:
    """Serves the model of a `ModelHost`. The socket is bound at once; `run` serves until `stop` or a signal."""

    def __init__(self, host: ModelHost, name: str, settings: ServerSettings) -> None:
        """`name` is what requests call the model. Raises EdgeMoEError where the address cannot be had."""
        self.app = App(host, name, settings)
        self._settings = settings
        self._socket = _bound(settings)
        config = uvicorn.Config(
            self.app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout)),
            h11_max_incomplete_event_size=MAX_HEADERS,
        )
        self._uvicorn = _Uvicorn(config, self.app.replier.end)

    @property
    def url(self) -> str:
        """Where the server is reached."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serves until `stop`, SIGINT or SIGTERM, which are taken where this is the main thread.

        Streams in flight then end with an error; a second signal waits for nobody.
        """
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def stop(self) -> None:
        """Ends `run`, from any thread or a signal handler. Idempotent."""
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, which tells that it ends, and does not raise the signals again that ended it."""

    def __init__(self, config: uvicorn.Config, ending: Callable[[], None]) -> None:
        super().__init__(config)
        self._ending = ending

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See the base class."""
        self._ending()
        # The last events go out before connections are closed.
        await asyncio.sleep(0)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See the base class."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A process told to ignore a signal, as nohup does, goes on ignoring it.
        taken = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) != signal.SIG_IGN]
        before = {each: signal.signal(each, self.handle_exit) for each in taken}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See the base class."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def _bound(settings: ServerSettings) -> socket.socket:
    """A socket that listens at the address of `settings`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=MAX_CONNECTIONS)
    except (OSError, OverflowError) as error:
        where = f"{settings.host} and port {settings.port}"
        raise EdgeMoEError(f"cannot listen at {where} ({error}): choose another port= or host=") from error
