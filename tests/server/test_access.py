"""Keys and origins over a socket; the model is never loaded."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest

from edgemoe import CheckpointError
from edgemoe.server.settings import ServerSettings
from tests.support.running_server import RunningServer, running_server

PAGE = "https://app.example"


@pytest.fixture(scope="module")
def guarded() -> Iterator[RunningServer]:
    settings = ServerSettings(port=0, api_keys=frozenset({"key"}), allow_origins=(PAGE,), max_queue=1, heartbeat=0.1)
    with running_server(settings, loader=failing, state_folder="none") as server:
        # Its thread begins here, and ends with it.
        server.host.plan()
        yield server


GATE = threading.Event()


def failing(*arguments: object, **named: object) -> None:
    GATE.wait(20)
    raise CheckpointError("the checkpoint is damaged: fetch it again")


def test_a_key_is_asked_for_in_the_words_of_each_protocol(guarded: RunningServer) -> None:
    status, told = guarded.post("/v1/chat/completions", {})
    assert (status, told["error"]["code"]) == (401, "invalid_api_key")
    status, told = guarded.post("/v1/messages", {})
    assert (status, told["error"]["type"]) == (401, "authentication_error")
    assert guarded.get("/health")[0] == guarded.get("/")[0] == 200
    assert guarded.get("/metrics")[0] == 401
    status, text = guarded.get("/metrics", headers="Authorization: Bearer key\r\n")
    assert status == 200
    assert b"edgemoe_model_loaded 0" in text


@pytest.mark.parametrize(("path", "served"), [("/health", {"GET", "HEAD"}), ("/v1/messages", {"POST"})])
def test_a_method_that_is_not_served_is_told_which_are(guarded: RunningServer, path: str, served: set[str]) -> None:
    head = f"DELETE {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nx-api-key: key\r\n\r\n"
    answer = guarded.raw(head.encode()).decode()
    assert answer.startswith("HTTP/1.1 405 ")
    (allow,) = [line for line in answer.splitlines() if line.lower().startswith("allow: ")]
    assert set(allow[7:].split(", ")) == served


def test_a_page_that_may_ask_first_asks_whether(guarded: RunningServer) -> None:
    head = "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    asks = "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization\r\n"
    allowed = guarded.raw(f"{head}{asks}Origin: {PAGE}\r\n\r\n".encode()).decode().lower()
    assert allowed.split()[1] == "200"
    assert f"access-control-allow-origin: {PAGE}" in allowed
    refused = guarded.raw(f"{head}{asks}Origin: https://evil.example\r\n\r\n".encode()).decode().lower()
    assert refused.split()[1] == "400"
    assert "access-control-allow-origin" not in refused


def test_a_model_that_cannot_be_loaded_is_told_to_all_and_more_requests_are_refused(guarded: RunningServer) -> None:
    """The first one waits for the loading, with heartbeats; the second is one too many."""
    key = "x-api-key: key\r\n"
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    sent = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{key}"
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        got = b""
        while b": waiting" not in got:
            got += connection.recv(4096)
        assert guarded.get("/health")[0] == 503
        status, told = guarded.post("/v1/chat/completions", body, headers=key)
        assert (status, told["error"]["type"]) == (429, "rate_limit_error")
        GATE.set()
        while part := connection.recv(4096):
            got += part
    assert b"the checkpoint is damaged" in got
    assert got.rstrip().endswith(b"0")
    status, told = guarded.post("/v1/chat/completions", body | {"stream": False}, headers=key)
    assert (status, told["error"]["code"]) == (503, "model_not_available")
    assert json.loads(guarded.get("/health")[1])["status"] == "error"
