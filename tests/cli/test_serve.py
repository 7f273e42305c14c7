"""The command `edgemoe serve`: what it refuses, and a server from its start to its end by a signal."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgemoe.cli.main import main
from tests.support.fake_engine import FakeFactory
from tests.support.waiting import wait_until

STREAM = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1500, "ignore_eos": True, "stream": True}


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the command says of options that it refuses."""
    assert main(["serve", *options], engine=FakeFactory()) == 2
    return capsys.readouterr().err


def test_an_address_that_others_reach_needs_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--host", "0.0.0.0")
    assert said == (
        "edgemoe: error: at 0.0.0.0 others can reach the server, and it has no key: give one with --api-key, or listen "
        "at 127.0.0.1\n"
    )


def test_a_file_without_keys_does_not_open_the_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n  \n")
    assert "has no key" in refused(capsys, "--api-key-file", str(tmp_path / "keys"))
    assert main(["serve", "--api-key-file", str(tmp_path / "none")], engine=FakeFactory()) == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--port", "70000"], "no port"), (["--max-queue", "0"], "below 1"), (["--keep-alive", "soon"], "not a number")],
)
def test_values_that_are_none(capsys: pytest.CaptureFixture[str], options: list[str], says: str) -> None:
    assert says in refused(capsys, *options)


def test_the_extra_is_named_where_it_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "uvicorn" or "edgemoe.server" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "uvicorn, which is not installed: pip install 'edgemoe[server]'" in refused(capsys)


def test_an_address_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with serving("--keep-alive", "300") as (url, _):
        port = url.rpartition(":")[2]
        factory = FakeFactory()
        assert main(["serve", "--port", port], engine=factory) == 1
        assert f"cannot listen at 127.0.0.1 and port {port}" in capsys.readouterr().err
        # A reply without a limit of its own ends with the context.
        (asked,) = factory.asked
        assert asked["default_max_tokens"] > 1 << 40


@contextmanager
def serving(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server of its own process, and where it is."""
    command = [sys.executable, "-c", "import sys; from edgemoe.cli.main import main; sys.exit(main())", "serve"]
    command += ["--port", "0", "-t", "1", "--state-folder", "none", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"at (http://\S+) ", line):
                break
        else:
            raise AssertionError("the server has ended")
        yield found[1], process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def until_ready(url: str) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/health") as answer:
                if json.load(answer)["status"] == "ok":
                    return
        except urllib.error.HTTPError:
            time.sleep(0.1)
    raise AssertionError("the model is not loaded in time")


@pytest.mark.slow
def test_a_signal_ends_streams_with_an_error_and_the_process_with_0() -> None:
    with serving() as (url, process):
        until_ready(url)
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(STREAM).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.readline().startswith(b"data: {")
            process.send_signal(signal.SIGINT)
            rest = answer.read().decode()
        assert "the server is being shut down" in rest
        assert rest.endswith("data: [DONE]\n\n")
        assert process.wait(20) == 0


def listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.slow
def test_a_second_signal_waits_for_nobody() -> None:
    """A request that is being read would else be waited for."""
    with serving("--keep-alive", "300") as (url, process), socket.socket() as connection:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        connection.connect(address)
        head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 100"), "now the body is read"
        connection.sendall(b"{")
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not listens(address))
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.slow
def test_with_keep_alive_the_model_is_there_only_while_it_is_used() -> None:
    with serving("--keep-alive", "0", "--alias", "other") as (url, process):
        with urllib.request.urlopen(f"{url}/stats") as answer:
            assert json.load(answer)["state"] == "unloaded"
        body = {"model": "other", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 3
        end = time.monotonic() + 10
        while True:
            with urllib.request.urlopen(f"{url}/stats") as answer:
                if json.load(answer)["state"] == "unloaded":
                    break
            assert time.monotonic() < end
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
