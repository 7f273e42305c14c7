"""Clients that go, that do not read, and that send what is no request."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from typing import Any

import pytest

from edgemoe import Sampling
from tests.support.running_server import NAME, RunningServer
from tests.support.waiting import wait_until

QUESTION = [{"role": "user", "content": "What is 48 + 31?"}]
LONG: dict[str, Any] = {"model": NAME, "messages": QUESTION, "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
PROMPT = {"prompt": "owl and lamp " * 450, "max_tokens": 4, "temperature": 0}


def answer(server: RunningServer) -> str:
    status, body = server.post("/v1/chat/completions", {"messages": QUESTION, "temperature": 0, "max_tokens": 24})
    assert status == 200
    return str(body["choices"][0]["message"]["content"])


@pytest.fixture
def expected(server: RunningServer) -> str:
    return server.engine.generate(QUESTION, Sampling(temperature=0, max_tokens=24)).text


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_while_it_is_answered_is_not_answered_any_more(
    server: RunningServer, expected: str, stream: bool
) -> None:
    before = server.engine.stats.tokens_generated
    connection = server.begin("/v1/chat/completions", LONG | {"stream": stream})
    wait_until(lambda: server.engine.stats.tokens_generated > before + 3)
    connection.close()
    wait_until(server.is_idle)
    assert server.engine.stats.tokens_generated < before + 1500
    assert answer(server) == expected


def test_who_goes_while_the_prompt_is_computed_is_not_answered_any_more(server: RunningServer, expected: str) -> None:
    connection = server.begin("/v1/completions", PROMPT | {"stream": True})
    wait_until(lambda: server.engine._loop.scheduler.running > 0)
    connection.close()
    wait_until(server.is_idle)
    assert answer(server) == expected


def test_disconnects_at_random_moments_leave_nothing(server: RunningServer, expected: str) -> None:
    draw = random.Random(3)
    answer(server)
    threads, files = open_threads(), open_files()
    for _ in range(12):
        connections = [
            server.begin("/v1/chat/completions", LONG | {"stream": draw.random() < 0.7}),
            server.begin("/v1/completions", PROMPT | {"stream": True}),
        ]
        for connection in connections:
            time.sleep(draw.random() * 0.05)
            connection.close()
    wait_until(server.is_idle)
    assert answer(server) == expected
    wait_until(lambda: open_threads() <= threads and open_files() <= files)


def open_threads() -> int:
    """Without those of the event loop's pool, which it fills up to a fixed number."""
    return sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())


def open_files() -> int:
    import psutil

    return int(psutil.Process().num_fds()) if hasattr(psutil.Process, "num_fds") else 0


def test_a_client_that_does_not_read_is_cut_off_and_holds_nobody_up(server: RunningServer, expected: str) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        body = json.dumps(LONG | {"stream": True, "n": 24, "logprobs": True, "top_logprobs": 20}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: server.replier.turns.running > 0)
        assert answer(server) == expected
        # Of 36,000 chunks of a few KiB, the connection takes a part.
        wait_until(server.is_idle, seconds=60)
        assert server.engine.stats.tokens_generated < 24 * 1500


def test_a_slow_reader_gets_everything(server: RunningServer) -> None:
    body = {"messages": QUESTION, "max_tokens": 60, "ignore_eos": True, "temperature": 0, "stream": True}
    wanted = server.engine.generate(QUESTION, Sampling(temperature=0, max_tokens=60, ignore_eos=True)).text
    with server.begin("/v1/chat/completions", body) as connection:
        got = b""
        while not got.endswith(b"0\r\n\r\n"):
            got += connection.recv(256)
            time.sleep(0.002)
    lines = [line[6:] for line in got.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines) == wanted


def test_heartbeats_come_while_a_prompt_is_computed(server: RunningServer) -> None:
    """The model is kept busy: other work of the engine stands for a long prompt."""
    done = threading.Event()
    worker = threading.Thread(target=lambda: server.engine._between_steps(lambda loop: done.wait(20)))
    worker.start()
    try:
        for path, body, mark in (
            ("/v1/chat/completions", LONG | {"max_tokens": 2}, b": waiting\n\n"),
            ("/v1/messages", {"messages": QUESTION, "max_tokens": 2}, b'event: ping\ndata: {"type":"ping"}\n\n'),
        ):
            with server.begin(path, body | {"stream": True}) as connection:
                got = b""
                while got.count(mark) < 2:
                    got += connection.recv(4096)
    finally:
        done.set()
        worker.join()


BAD = [
    b"",
    b"\r\n\r\n",
    b"GET",
    b"GET / HTTP/1.1\r\nHost: local",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n{}",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 20_000 + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    bytes(range(256)) * 100,
]


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_bytes_that_are_no_request(server: RunningServer, expected: str, data: bytes) -> None:
    """The connection ends, with an error of the client where there is an answer at all; the others go on."""
    try:
        got = server.raw(data, shut=True)
    except OSError:
        # The server has closed the connection before it had read everything.
        got = b""
    assert not got or got.split()[1] in (b"400", b"403", b"404", b"413", b"431")
    assert answer(server) == expected


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "no object"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 200_000, "levels"),
        (b'{"a":' * 100_000, "levels"),
        (b'{"messages": "\\ud800"}', "messages"),
    ],
)
def test_bodies_that_are_no_json(server: RunningServer, body: bytes, says: str) -> None:
    status, told = server.post("/v1/chat/completions", body)
    assert status == 400
    assert says in told["error"]["message"]
    assert server.post("/v1/messages", body)[1]["type"] == "error"


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server: RunningServer) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n"
    assert server.raw(head).split()[1] == b"413"
    chunks = b"10000\r\n" + b" " * 65536 + b"\r\n"
    chunked = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks * 17
    )
    assert server.raw(chunked).split()[1] == b"413"


def test_a_body_that_does_not_come_is_not_waited_for(server: RunningServer) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    began = time.monotonic()
    assert server.raw(head).split()[1] == b"408"
    assert time.monotonic() - began < 5


def test_half_a_request_is_not_waited_for(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemoe.server.connection.HEADER_TIMEOUT", 0.3)
    assert server.raw(b"GET /health HTTP/1.1\r\nHost: local") == b""
    # The same on a connection that had a whole one before.
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert server.raw(whole + b"GET /hea").count(b"HTTP/1.1 200") == 1


def test_a_connection_serves_one_request_after_another(server: RunningServer) -> None:
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert server.raw(whole * 3 + last).count(b"HTTP/1.1 200") == 4
