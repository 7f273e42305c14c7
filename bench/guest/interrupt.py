"""`interrupt`: KeyboardInterrupt at random moments of library calls, and Ctrl-C in chats on a terminal.

Each engine has a process of its own, which a watchdog looks at.
"""

from __future__ import annotations

import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bench.measurement import CHECKOUT, BaseSize, Measurement
from bench.support.faults import broken_laws
from edgemoe import Engine, Sampling

NAME = "interrupt"
BAR = "no hang, no slot or pin lost, every next reply exact"
HANG_SECONDS = 90.0
IDLE_SECONDS = 1.5
QUESTION = "What is 48 + 31?"
SETTINGS = Sampling(max_tokens=4, temperature=0, ignore_eos=True)
LONG = Sampling(max_tokens=200, temperature=0, ignore_eos=True)
PROMPT = [3 + number % 200 for number in range(600)]
MESSAGES = [{"role": "user", "content": QUESTION}]
ENGINES: dict[str, dict[str, Any]] = {
    "small cache": {"expert_cache": 40, "speculate": "off"},
    "small cache, drafts": {"expert_cache": 40, "speculate": "auto+self"},
    "full cache": {"expert_cache": "100%", "speculate": "off"},
    "full cache, drafts": {"expert_cache": "100%"},
}
COMMON: dict[str, Any] = {"device": "cpu", "threads": 1, "batch": 4, "context": 1024, "state_folder": "none"}


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Interrupts of calls for each engine, of loads among them, and chats with the interrupts of each."""

    calls: int = 1190
    loads: int = 25
    chats: int = 20
    presses: int = 10


FULL, SMALL = Size(), Size(small=True, calls=12, loads=1, chats=1, presses=3)


def run(size: Size = FULL) -> Measurement:
    """Every engine in a process of its own, one after the other, then the chats."""
    wrong = list[str]()
    moments = 0
    for number, name in enumerate(ENGINES):
        done, told = _watched(name, size, number)
        moments += done
        wrong += [f"{name}: {each}" for each in told]
        print(f"{name}: {done} moments, {len(told)} wrong", flush=True)
    for number in range(size.chats):
        name = list(ENGINES)[number % len(ENGINES)]
        done, told = Chat(name, random.Random(number)).run(size.presses)
        moments += done
        wrong += [f"chat with {name}: {each}" for each in told]
    value = {"moments": moments, "wrong": len(wrong)}
    return Measurement(NAME, value, BAR, not wrong, {"wrong": wrong})


def _watched(name: str, size: Size, seed: int) -> tuple[int, list[str]]:
    """The moments that a child has tried, and what was wrong. A child that says nothing for long hangs."""
    code = f"from bench.guest.interrupt import child; child({name!r}, {size.calls}, {size.loads}, {seed})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=CHECKOUT, bufsize=0)
    assert process.stdout is not None
    done, wrong, buffer = 0, list[str](), b""
    while True:
        if not select.select([process.stdout], [], [], HANG_SECONDS)[0]:
            process.send_signal(signal.SIGABRT)
            process.wait()
            return done, [*wrong, f"hangs after {done} moments"]
        read = os.read(process.stdout.fileno(), 1 << 16)
        if not read:
            break
        *lines, buffer = (buffer + read).split(b"\n")
        for line in lines:
            done += 1
            wrong += json.loads(line)
    if process.wait():
        wrong.append(f"the process ends with {process.returncode}")
    return done, wrong


def child(name: str, calls: int, loads: int, seed: int) -> None:
    """Interrupts calls of one engine, and prints a line for each: what was wrong."""
    import faulthandler

    faulthandler.enable()
    draw = random.Random(seed)
    settings = COMMON | ENGINES[name]
    for _ in range(loads):
        _interrupted(draw, 1.5, lambda: Engine.load(None, **settings).close())
        _say([])
    engine = Engine.load(None, **settings)
    slots = engine.plan.slots
    expected = engine.generate(QUESTION, SETTINGS).token_ids
    ways: list[tuple[float, Callable[[], object]]] = [
        (0.1, lambda: engine.generate(QUESTION, LONG)),
        (0.3, lambda: engine.generate(PROMPT, LONG)),
        (0.1, lambda: list(engine.stream(QUESTION, LONG))),
        (0.3, lambda: list(engine.generate_batch([(QUESTION, LONG), (PROMPT, LONG)] * 3))),
        (0.1, lambda: engine.chat(MESSAGES, LONG)),
        (0.1, lambda: list(engine.chat_stream(MESSAGES, LONG))),
        (0.02, lambda: engine.count_tokens(QUESTION * 50)),
        (0.02, lambda: engine.resize(draw.choice([slots, max(32, slots // 2)]))),
    ]
    for _ in range(calls):
        most, call = draw.choice(ways)
        _interrupted(draw, most, call)
        wrong = broken_laws(engine)
        if engine.generate(QUESTION, SETTINGS).token_ids != expected:
            wrong.append("the next reply")
        _say(wrong)
    _interrupted(draw, 0.01, engine.close)
    engine.close()
    _say([])


def _say(wrong: list[str]) -> None:
    print(json.dumps(wrong), flush=True)


def _interrupted(draw: random.Random, most: float, call: Callable[[], object]) -> None:
    """Calls, and raises KeyboardInterrupt in the call after at most `most` seconds; often soon."""

    calling = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Not after the call, where nothing would catch it.
        if calling:
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    try:
        calling = True
        signal.setitimer(signal.ITIMER_REAL, max(1e-6, most * draw.random() ** 3))
        call()
        calling = False
    except KeyboardInterrupt:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


class Chat:
    """`edgemoe chat` on a terminal of its own."""

    def __init__(self, name: str, draw: random.Random) -> None:
        self._draw = draw
        options = {"--expert-cache": "expert_cache", "--speculate": "speculate"}
        given = [
            each
            for option, key in options.items()
            if key in ENGINES[name]
            for each in (option, str(ENGINES[name][key]))
        ]
        code = "import sys; from edgemoe.cli.main import main; sys.exit(main())"
        command = [
            sys.executable,
            "-c",
            code,
            "chat",
            "--temp",
            "0",
            "--threads",
            "1",
            "--state-folder",
            "none",
            *given,
        ]
        self.shown = b""
        """The last of what it has shown."""
        self._terminal, end = pty.openpty()
        self._process = subprocess.Popen(
            command, stdin=end, stdout=end, stderr=end, cwd=CHECKOUT, start_new_session=True,
            env=os.environ | {"TERM": "dumb", "XDG_STATE_HOME": str(Path(os.devnull) / "none")},
        )  # fmt: skip
        os.close(end)

    def run(self, presses: int) -> tuple[int, list[str]]:
        """How often Ctrl-C was pressed, and what was wrong."""
        try:
            return self._run(presses)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._terminal)

    def _run(self, presses: int) -> tuple[int, list[str]]:
        if self._until_prompt() is None:
            return 0, ["does not begin"]
        expected = self._ask()
        for number in range(presses):
            self._type("Count from 5 to 60 by 5." * self._draw.choice([1, 20]))
            for _ in range(self._draw.choice([1, 1, 2, 3])):
                time.sleep(0.4 * self._draw.random() ** 2)
                self._process.send_signal(signal.SIGINT)
            if not self._settled():
                return number, [f"no prompt after press {number}: {self._process.poll()}, {self.shown[-300:]!r}"]
            if (told := self._ask()) != expected:
                return number, [f"the reply after press {number}: {told!r} for {expected!r}, {self.shown[-300:]!r}"]
        return presses, []

    def _ask(self) -> str | None:
        """The reply to the question in a new conversation, at a prompt."""
        self._type("/clear")
        if self._until_prompt() is None:
            return None
        self._type(QUESTION)
        told = self._until_prompt()
        return None if told is None else told.partition(QUESTION)[2].strip()

    def _type(self, line: str) -> None:
        os.write(self._terminal, line.encode() + b"\n")

    def _read(self) -> bytes:
        try:
            read = os.read(self._terminal, 1 << 16)
        except OSError:
            # The chat has left its terminal.
            read = b""
            time.sleep(0.1)
        self.shown = (self.shown + read)[-2000:]
        return read

    def _settled(self) -> bool:
        """Waits until the chat shows a prompt and nothing more for a while: it may have lines to read."""
        shown, end = b"", time.monotonic() + HANG_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            if select.select([self._terminal], [], [], IDLE_SECONDS)[0]:
                shown += self._read()
            elif shown.rstrip().endswith(b">>>"):
                return True
        return False

    def _until_prompt(self) -> str | None:
        """What is shown up to the next prompt; None where none comes."""
        shown, end = b"", time.monotonic() + HANG_SECONDS
        while not shown.rstrip().endswith(b">>>"):
            if time.monotonic() > end or not select.select([self._terminal], [], [], 1.0)[0]:
                if time.monotonic() > end or self._process.poll() is not None:
                    return None
                continue
            shown += self._read()
        return shown.decode(errors="replace").rstrip().removesuffix(">>>")
