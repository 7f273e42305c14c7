"""A server in a thread of this process, on a port of its own."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgemoe import Engine, ModelHost
from edgemoe.server.lifecycle import Server
from edgemoe.server.settings import ServerSettings

NAME = "edgemoe-demo"


class RunningServer:
    """What a test asks."""

    def __init__(self, host: ModelHost, server: Server) -> None:
        self.host = host
        self.server = server
        self.url = server.url
        self.port = int(server.url.rpartition(":")[2])

    @property
    def engine(self) -> Engine:
        """The loaded engine."""
        return self.host.load().result()

    @property
    def replier(self) -> Any:
        """Who answers."""
        return self.server.app.replier

    def raw(self, data: bytes, *, shut: bool = False) -> bytes:
        """What the server answers to these bytes, until it closes the connection or falls silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data)
            if shut:
                connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def post(self, path: str, body: Any, *, headers: str = "") -> tuple[int, dict[str, Any]]:
        """The status and the JSON of an answer."""
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}"
        answer = self.raw(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        return int(answer.split()[1]), json.loads(answer.partition(b"\r\n\r\n")[2])

    def get(self, path: str, *, headers: str = "") -> tuple[int, bytes]:
        """The status and the body of an answer."""
        answer = self.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n".encode())
        return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]

    def begin(self, path: str, body: Any) -> socket.socket:
        """A connection on which a request was sent; the caller reads and closes it."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        sent = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n\r\n"
        connection.sendall(head.encode() + sent)
        return connection

    def is_idle(self) -> bool:
        """Whether nothing is being answered, here or in the engine."""
        turns, loop = self.replier.turns, self.engine._loop
        waiting = loop.scheduler.running or loop.scheduler.waiting
        return not (turns.requests or turns.running or turns.waiting or self.host.leases or waiting)


@contextmanager
def running_server(settings: ServerSettings, **host: Any) -> Iterator[RunningServer]:
    """A server of the shipped model, which is loaded by the first request."""
    with ModelHost(**host) as model:
        server = Server(model, NAME, settings)
        thread = threading.Thread(target=server.run, name="server-of-a-test")
        thread.start()
        try:
            yield RunningServer(model, server)
        finally:
            server.stop()
            thread.join(30)
            assert not thread.is_alive()
