"""`faults`: faults of disks, links, memory and files in every phase of a request: its replies, during and after.

The faults are put around the store and the link that the engine makes; no part of the engine is replaced.
"""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.measurement import BaseSize, Measurement
from bench.support.faults import Faults, broken_laws, load
from edgemoe import AsyncEngine, Completion, EdgeMoEError, Engine, RequestError, Sampling
from edgemoe.checkpoint.tokenizer import Prompt

NAME = "faults"
BAR = "a clear error or the right reply, none later than 5 s; the next request exact; nothing wrong in a finished reply"
HANG_SECONDS = 5.0
QUESTION = "What is 48 + 31?"
LONG_PROMPT = [3 + number % 200 for number in range(200)]
LONG_SETTINGS = Sampling(max_tokens=4, temperature=0, ignore_eos=True)
SETTINGS = Sampling(max_tokens=24, temperature=0, ignore_eos=True)
SLOTS = 40
"""Few of the shipped model's experts: every pass reads some."""
PHASES = ("load", "prefill", "decode", "draft", "verify", "batch", "async")
DRAFTS: dict[str, dict[str, Any]] = {
    "decode": {"speculate": "off"}, "draft": {"speculate": "self"},
    "verify": {"speculate": "ngram"},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How often each fault is tried in each phase, each time after another number of reads."""

    rounds: int = 3
    phases: tuple[str, ...] = PHASES


FULL, SMALL = Size(), Size(small=True, rounds=1, phases=("load", "decode", "batch"))


def _raises(error: Callable[[], BaseException]) -> Callable[[Faults], None]:
    def fault(faults: Faults) -> None:
        def read() -> None:
            raise error()

        faults.read = read

    return fault


def _hangs(faults: Faults) -> None:
    returns = threading.Event()
    faults.hung = returns
    faults.read = lambda: _wait(returns)


def _wait(returns: threading.Event) -> None:
    returns.wait(60)


def _no_memory_once(faults: Faults) -> None:
    def read() -> None:
        faults.lift()
        raise MemoryError

    faults.read = read


def _link_fails(faults: Faults) -> None:
    faults.transfer = RuntimeError("the link is down")


FAULTS: dict[str, Callable[[Faults], None]] = {
    "read error": _raises(lambda: OSError(5, "Input/output error")),
    "short read": _raises(lambda: OSError("the file ends in the middle of an expert")),
    "wrong length": _raises(lambda: ValueError("buffer size does not match")),
    "no memory": _raises(MemoryError),
    "no memory once": _no_memory_once,
    "no device memory": _raises(lambda: torch.OutOfMemoryError("CUDA out of memory")),
    "reader dies": _raises(lambda: SystemExit("the reader is gone")),
    "link fails": _link_fails,
    "hang": _hangs,
}


class Trial:
    """One fault in one phase."""

    def __init__(self, phase: str, kind: str, after: int) -> None:
        self._phase = phase
        self._kind = kind
        self._after = after
        self._faults = Faults()
        self.wrong: list[str] = []
        self.ended = ""

    def run(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Tries it, and holds what came of it against `expected`, the tokens of undisturbed replies."""
        if self._phase == "load":
            self._arm()
            # Experts are filled after loading: a fault shows when they are asked for.
            engine = self._engine()
        else:
            engine = self._engine()
            self._arm()
        try:
            self._during(engine, expected)
            self._faults.lift()
            self.wrong += broken_laws(engine)
            if engine.generate(QUESTION, SETTINGS).token_ids != expected["question"]:
                self.wrong.append("the next reply")
        finally:
            self._faults.lift()
            started = time.monotonic()
            engine.close()
            if time.monotonic() - started > HANG_SECONDS + 1:
                self.wrong.append("close took too long")

    def _engine(self) -> Engine:
        drafts = DRAFTS.get(self._phase, {})
        return load(None, self._faults, expert_cache=SLOTS, threads=1, batch=4, context=512, **drafts)

    def _arm(self) -> None:
        self._faults.after = self._after
        FAULTS[self._kind](self._faults)

    def _during(self, engine: Engine, expected: dict[str, tuple[int, ...]]) -> None:
        """A request while the fault is there. One that waits for a read that hangs is ended by its caller."""
        told = list[BaseException]()
        replies: dict[str, Completion] = {}

        def ask() -> None:
            try:
                replies.update(self._replies(engine))
            except BaseException as error:
                told.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        if self._kind == "hang":
            thread.join(0.5)
            engine.cancel()
        thread.join(HANG_SECONDS)
        if thread.is_alive():
            self.wrong.append("hangs")
            self._faults.lift()
            thread.join()
        for name, reply in replies.items():
            if reply.token_ids != expected[name][: len(reply.token_ids)]:
                self.wrong.append(f"the reply to {name}")
            elif reply.finish_reason != "cancelled" and reply.token_ids != expected[name]:
                self.wrong.append(f"the length of the reply to {name}")
        self.ended = type(told[0]).__name__ if told else "reply"
        if self._kind == "no memory once" and told:
            self.wrong.append(f"no recovery: {told[0]}")
        if told and not (isinstance(told[0], EdgeMoEError) and str(told[0])):
            self.wrong.append(f"not a clear error: {told[0]!r}")

    @staticmethod
    def _named(found: dict[int, Completion | RequestError]) -> list[tuple[str, Completion | RequestError]]:
        return [("question", found[0]), ("long", found[1])]

    def _replies(self, engine: Engine) -> dict[str, Completion]:
        if self._phase == "prefill":
            return {"long": engine.generate(LONG_PROMPT, LONG_SETTINGS)}
        if self._phase == "batch":
            asked: list[tuple[Prompt, Sampling]] = [(QUESTION, SETTINGS), (LONG_PROMPT, LONG_SETTINGS)]
            found = dict(engine.generate_batch(asked))
            return {name: reply for name, reply in self._named(found) if isinstance(reply, Completion)}
        if self._phase == "async":
            return {"question": asyncio.run(AsyncEngine(engine).generate(QUESTION, SETTINGS))}
        return {"question": engine.generate(QUESTION, SETTINGS)}


def run(size: Size = FULL) -> Measurement:
    """Every fault in every phase, then what concerns whole processes: full disks and SIGTERM."""
    with load(None, Faults(), threads=1, batch=1, context=512, speculate="off") as engine:
        expected = {
            "question": engine.generate(QUESTION, SETTINGS).token_ids,
            "long": engine.generate(LONG_PROMPT, LONG_SETTINGS).token_ids,
        }
    found: dict[str, dict[str, str]] = {}
    wrong = list[str]()
    trials = 0
    for phase in size.phases:
        for kind in FAULTS:
            for number in range(size.rounds):
                trial = Trial(phase, kind, 7 * number)
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
