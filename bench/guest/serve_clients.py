"""`serve-clients`: the server with the clients of OpenAI and Anthropic, curl, slow readers and clients that leave."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import socket
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any

import anthropic
import openai
import psutil

from bench.guest.serving import MODEL, serving
from bench.measurement import BaseSize, Measurement
from edgemoe import ModelHost, Sampling

NAME = "serve-clients"
BAR = (
    "every reply has the library's tokens; no request, thread, file or 50 MiB are left; "
    "the slowest of equal requests takes at most twice the median"
)
MAX_GROWTH = 50
"""MiB."""
SETTINGS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "context": 1024, "batch": 64, "state_folder": "none",
}  # fmt: skip
"""In bf16, a CPU with AMX rounds passes of more than 64 tokens another way than those of one sequence."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How many clients of each kind."""

    rounds: int = 5
    """Rounds of `together` connections at once, and of leavers and slow readers beside them."""
    together: int = 64
    tokens: int = 64
    leavers: int = 24
    slow: int = 4


FULL, SMALL = Size(), Size(small=True, rounds=1, together=4, tokens=6, leavers=2, slow=1)


@dataclass
class Found:
    """What the clients saw."""

    wrong: list[str]
    seconds: list[float]
    """Of each of the equal requests, from its beginning to its end."""


def run(size: Size = FULL) -> Measurement:
    """The shipped model, greedy; what every client is told against `Engine.generate` of the same messages."""
    with ModelHost(**SETTINGS) as host, serving(host, running=64) as url:
        wanted = _replies(host, size)
        # Caches fill up in the first ones.
        for number in range(min(2, size.rounds)):
            _round(url, wanted, size, number, Found([], []))
        before, found = _resources(), Found([], [])
        for number in range(size.rounds):
            _round(url, wanted, size, number, found)
            print(f"round {number}: {_resources()['mib'] - before['mib']:+.1f} MiB, {len(found.wrong)} wrong")
        left = _left(host, before)
    spread = max(found.seconds) / statistics.median(found.seconds)
    value = {
        "requests": len(found.seconds),
        "wrong": len(found.wrong),
        "slowest_over_median": round(spread, 2),
        "left": left,
    }
    clean = not (left["requests"] or left["threads"] or left["files"]) and left["mib"] <= MAX_GROWTH
    detail = {"wrong": found.wrong[:5], "median_seconds": round(statistics.median(found.seconds), 3)}
    detail |= {"curl": bool(shutil.which("curl")), "together": size.together}
    return Measurement(NAME, value, BAR, not found.wrong and clean and spread <= 2, detail)


def messages(number: int) -> list[dict[str, str]]:
    """The conversation of the client `number`."""
    return [{"role": "user", "content": f"Count from {number} to {number + 12}."}]


def _replies(host: ModelHost, size: Size) -> list[str]:
    settings = Sampling(temperature=0, max_tokens=size.tokens)
    with host.lease() as engine:
        return [engine.generate(messages(number), settings).text for number in range(size.together)]


def _round(url: str, wanted: list[str], size: Size, number: int, found: Found) -> None:
    """All kinds of clients at once."""
    draw = random.Random(number)
    others = [threading.Thread(target=_leave, args=(url, size, draw.random() * 0.5)) for _ in range(size.leavers)]
    others += [threading.Thread(target=_read_slowly, args=(url, wanted[0], size, found)) for _ in range(size.slow)]
    for thread in others:
        thread.start()
    asyncio.run(_all_at_once(url, wanted, size, found))
    for thread in others:
        thread.join()
    _ask_with_curl(url, wanted[0], size, found)


async def _all_at_once(url: str, wanted: list[str], size: Size, found: Found) -> None:
    """Equal requests: half of them with OpenAI's client, half with Anthropic's; half of each are streamed."""
    ours = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    theirs = anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=600)

    async def one(number: int) -> None:
        began = time.perf_counter()
        ask = _ask_openai if number % 2 else _ask_anthropic
        told = await ask(ours if number % 2 else theirs, number, size, stream=number % 4 < 2)
        found.seconds.append(time.perf_counter() - began)
        if told != wanted[number]:
            found.wrong.append(f"{number}: {told!r}")

    async with ours, theirs:
        await asyncio.gather(*map(one, range(size.together)))


async def _ask_openai(client: Any, number: int, size: Size, *, stream: bool) -> str:
    asked = {"model": MODEL, "messages": messages(number), "temperature": 0, "max_tokens": size.tokens}
    if not stream:
        return str((await client.chat.completions.create(**asked)).choices[0].message.content)
    events = await client.chat.completions.create(**asked, stream=True)
    return "".join([event.choices[0].delta.content or "" async for event in events])


async def _ask_anthropic(client: Any, number: int, size: Size, *, stream: bool) -> str:
    asked = {"model": MODEL, "messages": messages(number), "max_tokens": size.tokens}
    asked["extra_body"] = {"temperature": 0}
    if not stream:
        return "".join(block.text for block in (await client.messages.create(**asked)).content)
    async with client.messages.stream(**asked) as events:
        return "".join([text async for text in events.text_stream])


def _body(size: Size) -> bytes:
    asked = {"messages": messages(0), "temperature": 0, "max_tokens": size.tokens, "stream": True}
    return json.dumps(asked).encode()


def _begin(url: str, body: bytes) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=600)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def _leave(url: str, size: Size, seconds: float) -> None:
    """Goes in the middle of its reply."""
    with _begin(url, _body(size)):
        time.sleep(seconds)


def _read_slowly(url: str, wanted: str, size: Size, found: Found) -> None:
    """Takes a few bytes at a time."""
    got = b""
    with _begin(url, _body(size)) as connection:
        while part := connection.recv(512):
            got += part
            time.sleep(0.01)
    _judge("a slow reader", got, wanted, found)


def _ask_with_curl(url: str, wanted: str, size: Size, found: Found) -> None:
    if shutil.which("curl") is None:
        return
    command = ["curl", "-sSN", f"{url}/v1/chat/completions", "-d", _body(size).decode()]
    _judge("curl", subprocess.run(command, capture_output=True, check=True).stdout, wanted, found)


def _judge(who: str, got: bytes, wanted: str, found: Found) -> None:
    """Puts the text of a stream together."""
    events = [json.loads(line[6:]) for line in got.splitlines() if line.startswith(b"data: {")]
    told = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    if told != wanted:
        found.wrong.append(f"{who}: {told!r}")


def _resources() -> dict[str, float]:
    process = psutil.Process()
    # The event loop fills its pool of threads up to a fixed number.
    threads = sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())
    return {"threads": threads, "files": process.num_fds(), "mib": process.memory_info().rss / (1 << 20)}


def _left(host: ModelHost, before: dict[str, float]) -> dict[str, float]:
    """What is more than before, once everything had the time to end."""
    end = time.monotonic() + 20
    while True:
        more = {name: max(0, round(now - before[name], 1)) for name, now in _resources().items()}
        left = {"requests": float(host.leases), **more}
        if not (left["requests"] or left["threads"] or left["files"]) or time.monotonic() > end:
            return left
        time.sleep(0.1)
