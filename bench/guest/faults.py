"""`faults`: faults of disks, links, memory and files in every phase of a request: its replies, during and after.

The faults are put around the store and the link that the engine makes; no part of the engine is replaced.
"""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.guest.fault_kinds import CHANGES, HANG, KINDS, ONCE
from bench.guest.serving import serving
from bench.measurement import BaseSize, Measurement
from bench.support.faults import Faults, broken_laws, load
from edgemoe import AsyncEngine, Completion, EdgeMoEError, Engine, ModelHost, Sampling
from edgemoe.checkpoint.tokenizer import Prompt
from edgemoe.demo import demo_folder

NAME = "faults"
BAR = "a clear error or the right reply, none later than 5 s; the next request exact; nothing wrong in a finished reply"
HANG_SECONDS = 5.0
QUESTION = "What is 48 + 31?"
LONG_PROMPT = [3 + number % 200 for number in range(200)]
LONG_SETTINGS = Sampling(max_tokens=4, temperature=0, ignore_eos=True)
SETTINGS = Sampling(max_tokens=24, temperature=0, ignore_eos=True)
SLOTS = 40
"""Few of the shipped model's experts: every pass reads some."""
PHASES = ("load", "prefill", "decode", "draft", "verify", "batch", "async", "serve")
DRAFTS: dict[str, dict[str, Any]] = {
    "decode": {"speculate": "off"}, "draft": {"speculate": "self"},
    "verify": {"speculate": "ngram"},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How often each fault is tried in each phase, each time after another number of reads."""

    rounds: int = 3
    phases: tuple[str, ...] = PHASES


FULL, SMALL = Size(), Size(small=True, rounds=1, phases=("decode", "batch", "serve"))


@dataclass(frozen=True)
class Served:
    """A reply over HTTP, of which nobody knows the tokens."""

    text: str
    finish_reason: str


class ServedError(EdgeMoEError):
    """The error that a server tells its client."""


class Trial:
    """One fault in one phase."""

    def __init__(self, phase: str, kind: str, after: int, folder: Path) -> None:
        """`folder` has a checkpoint that the fault may change."""
        self._phase = phase
        self._kind = kind
        self._after = after
        self._folder = folder
        self._faults = Faults()
        self.wrong: list[str] = []
        self.ended = ""

    def run(self, expected: dict[str, Completion]) -> None:
        """Tries it, and holds what came of it against `expected`, undisturbed replies."""
        if self._phase == "load":
            self._arm()
            # Experts are filled after loading: a fault shows when they are asked for.
            engine = self._engine()
        else:
            engine = self._engine()
            self._arm()
        with self._serving(engine) as url:
            try:
                self._during(engine, url, expected)
                self._faults.lift()
                self.wrong += broken_laws(engine)
                self._afterwards(engine, expected["question"])
            finally:
                self._faults.lift()
                started = time.monotonic()
                engine.close()
                if time.monotonic() - started > HANG_SECONDS + 1:
                    self.wrong.append("close took too long")

    @contextmanager
    def _serving(self, engine: Engine) -> Iterator[str]:
        """Where the engine is served in that phase; "" in all others."""
        if self._phase == "serve":
            with ModelHost(loader=lambda *_, **__: engine) as host, serving(host, running=4) as url:
                yield url
        else:
            yield ""

    def _engine(self) -> Engine:
        drafts = DRAFTS.get(self._phase, {})
        model = self._folder if self._kind in CHANGES else None
        return load(model, self._faults, expert_cache=SLOTS, threads=1, batch=4, context=512, **drafts)

    def _arm(self) -> None:
        self._faults.after = self._after
        if self._kind in CHANGES:
            CHANGES[self._kind](self._faults, self._folder)
        else:
            KINDS[self._kind](self._faults)

    def _during(self, engine: Engine, url: str, expected: dict[str, Completion]) -> None:
        """A request while the fault is there. One that waits for a read that hangs is ended by its caller."""
        told = list[BaseException]()
        replies: dict[str, Completion | Served] = {}

        def ask() -> None:
            try:
                replies.update(self._replies(engine, url))
            except BaseException as error:
                told.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        if self._kind == HANG:
            thread.join(0.5)
            engine.cancel()
        thread.join(HANG_SECONDS)
        if thread.is_alive():
            self.wrong.append("hangs")
            self._faults.lift()
            thread.join()
        for name, reply in replies.items():
            self.wrong += [f"the reply to {name}"] if _differs(reply, expected[name]) else []
        self.ended = type(told[0]).__name__ if told else "reply"
        if self._kind == ONCE and told:
            self.wrong.append(f"no recovery: {told[0]}")
        self._check_clear(told)

    def _afterwards(self, engine: Engine, expected: Completion) -> None:
        """The next reply is right. Where the checkpoint has changed for good, an error that says so is right too."""
        try:
            if engine.generate(QUESTION, SETTINGS).token_ids != expected.token_ids:
                self.wrong.append("the next reply")
        except EdgeMoEError as error:
            if self._kind not in CHANGES or "changed" not in str(error):
                self.wrong.append(f"the next reply is an error: {error}")

    def _check_clear(self, told: list[BaseException]) -> None:
        if told and not (isinstance(told[0], EdgeMoEError) and str(told[0])):
            self.wrong.append(f"not a clear error: {told[0]!r}")
        elif told and self._kind in CHANGES and "changed" not in str(told[0]):
            self.wrong.append(f"the error does not say that a file has changed: {told[0]}")

    def _replies(self, engine: Engine, url: str) -> dict[str, Completion | Served]:
        if self._phase == "prefill":
            return {"long": engine.generate(LONG_PROMPT, LONG_SETTINGS)}
        if self._phase == "batch":
            asked: list[tuple[Prompt, Sampling]] = [(QUESTION, SETTINGS), (LONG_PROMPT, LONG_SETTINGS)]
            found = dict(engine.generate_batch(asked))
            named = {"question": found[0], "long": found[1]}
            return {name: reply for name, reply in named.items() if isinstance(reply, Completion)}
        if self._phase == "async":
            return {"question": asyncio.run(AsyncEngine(engine).generate(QUESTION, SETTINGS))}
        if self._phase == "serve":
            return {"question": _served(url)}
        return {"question": engine.generate(QUESTION, SETTINGS)}


def _served(url: str) -> Served:
    """The reply to the question over HTTP. Raises ServedError for an error of the API."""
    body = {"prompt": QUESTION, "temperature": 0, "max_tokens": SETTINGS.max_tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=2 * HANG_SECONDS) as answer:
            choice = json.load(answer)["choices"][0]
    except urllib.error.HTTPError as error:
        raise ServedError(json.load(error)["error"]["message"]) from error
    return Served(choice["text"], choice["finish_reason"])


def _differs(reply: Completion | Served, expected: Completion) -> bool:
    """Whether a reply is another one, or is cut without saying so."""
    if isinstance(reply, Served):
        return reply.text != expected.text
    if reply.finish_reason == "cancelled":
        return reply.token_ids != expected.token_ids[: len(reply.token_ids)]
    return reply.token_ids != expected.token_ids


def run(size: Size = FULL) -> Measurement:
    """Every fault in every phase, then what concerns whole processes: full disks and SIGTERM."""
    with load(None, Faults(), threads=1, batch=1, context=512, speculate="off") as engine:
        expected = {
            "question": engine.generate(QUESTION, SETTINGS),
            "long": engine.generate(LONG_PROMPT, LONG_SETTINGS),
        }
    found: dict[str, dict[str, str]] = {}
    wrong = list[str]()
    trials = 0
    for phase in size.phases:
        for kind in (*KINDS, *CHANGES):
            for number in range(size.rounds):
                with tempfile.TemporaryDirectory() as folder:
                    copy = Path(shutil.copytree(demo_folder(), Path(folder) / "model"))
                    trial = Trial(phase, kind, 7 * number, copy)
                    trial.run(expected)
                trials += 1
                wrong += [f"{kind} in {phase}: {each}" for each in trial.wrong]
                found.setdefault(kind, {})[phase] = trial.ended
        print(f"{phase}: {len(wrong)} wrong", flush=True)
    for name, check in (("full disk", _full_disk), ("full results", _full_results), ("SIGTERM", _sigterm)):
        trials += 1
        wrong += [f"{name}: {each}" for each in check()]
    return Measurement(NAME, {"trials": trials, "wrong": len(wrong)}, BAR, not wrong, {"ended": found, "wrong": wrong})


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from edgemoe.cli.main import main; sys.exit(main())", *arguments]


def _full_disk() -> list[str]:
    """State files that cannot be written: the reply is right, and so is the next process."""
    with tempfile.TemporaryDirectory() as folder:
        command = _command("run", "-", "--temp", "0", "-n", "8", "--state-folder", folder, "--threads", "1")

        def no_room() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        # Results go through a pipe, which is no file.
        runs = [
            subprocess.run(command, input=b"What is 48 + 31?\n", capture_output=True, check=False, preexec_fn=before)
            for before in (no_room, None)
        ]
        left = [path for path in Path(folder).rglob("*") if path.is_file() and path.stat().st_size == 16]
        texts = [run.stdout.partition(b'"text"')[2].partition(b",")[0] for run in runs]
    wrong = [f"exit {run.returncode}: {run.stderr.decode()[-200:]}" for run in runs if run.returncode]
    wrong += [] if texts[0] == texts[1] else ["another reply"]
    return wrong + [f"{path} is cut" for path in left]


def _full_results() -> list[str]:
    if not Path("/dev/full").exists():
        return []
    command = _command("run", "-", "--temp", "0", "-n", "8", "--threads", "1", "--state-folder", "none")
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(command, input=b"Hello\n", stdout=full, stderr=subprocess.PIPE, check=False)
    clear = ended.returncode == 5 and b"no space left" in ended.stderr.lower() and b"Traceback" not in ended.stderr
    return [] if clear else [f"exit {ended.returncode}: {ended.stderr.decode()[-200:]}"]


def _sigterm() -> list[str]:
    """A run that is told to end does so in seconds, with whole lines."""
    command = _command("run", "-", "--temp", "0", "-n", "400", "--ignore-eos", "--threads", "1", "--batch", "2")
    with tempfile.TemporaryFile() as results:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=results, stderr=subprocess.PIPE)
        assert child.stdin is not None
        child.stdin.write(b"What is 48 + 31?\n" * 64)
        child.stdin.close()
        child.stdin = None
        time.sleep(8)
        child.terminate()
        started = time.monotonic()
        try:
            _, told = child.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return ["does not end"]
        results.seek(0)
        written = results.read()
    wrong = [] if time.monotonic() - started < HANG_SECONDS else ["takes too long"]
    wrong += [] if not written or written.endswith(b"\n") else ["a line is cut"]
    return wrong + ([f"Traceback: {told.decode()[-300:]}"] if b"Traceback" in told else [])
