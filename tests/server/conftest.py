from __future__ import annotations

from collections.abc import Iterator

import pytest

from edgemoe import Sampling
from edgemoe.server.settings import ServerSettings
from tests.support.running_server import RunningServer, running_server
from tests.support.waiting import wait_until


@pytest.fixture(scope="session")
def session_server() -> Iterator[RunningServer]:
    settings = ServerSettings(port=0, heartbeat=0.2, stall_timeout=1.0, max_body=1 << 20)
    with running_server(settings, threads=1, context=2048, batch=64, state_folder="none") as running:
        # The first one compiles kernels.
        running.host.load().result().generate("Once upon a time", Sampling(max_tokens=4))
        yield running


@pytest.fixture
def server(session_server: RunningServer) -> Iterator[RunningServer]:
    """A server of the shipped model; nothing of a test's requests is left in it afterwards."""
    yield session_server
    wait_until(session_server.is_idle)
