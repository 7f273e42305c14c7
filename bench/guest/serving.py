"""A server of a model in a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from edgemoe import ModelHost
from edgemoe.server.lifecycle import Server
from edgemoe.server.settings import ServerSettings

MODEL = "edgemoe-demo"
"""What requests call it."""


@contextmanager
def serving(host: ModelHost, *, running: int) -> Iterator[str]:
    """Where the model of `host` is served, at most `running` replies of it at once, until the block ends."""
    server = Server(host, MODEL, ServerSettings(port=0, max_running=running))
    thread = threading.Thread(target=server.run, name="server-of-a-measurement")
    thread.start()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join()
