"""`soak`: long days of everything at once, with the laws that must hold all the time."""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bench.guest.close import resident_nbytes
from bench.measurement import BaseSize, Measurement
from bench.support.faults import Faults, broken_laws, load, open_files, own_threads
from edgemoe import AsyncEngine, Completion, EdgeMoEError, Engine, RequestError, Sampling
from edgemoe.config import MIB

NAME = "soak"
BAR = "all laws hold all the time; every sample exact; RSS grows by less than 1 MiB a minute"
SETTINGS: dict[str, Any] = {"expert_cache": 60, "batch": 8, "context": 1024, "speculate": "auto+self", "threads": 2}
USERS = 4
PROMPTS = [
    "What is 48 + 31?", "Count from 5 to 60 by 5.", "Hello", "What is 7 * 8?", "Count from 3 to 30 by 3.",
    "What is 90 - 17? " * 20,
]  # fmt: skip
LONG_TEXT = 100
"""Characters of a prompt that may be computed in several passes."""
WARM_SHARE = 0.25
"""Share of the time from its start in which memory may grow faster: caches of libraries fill."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Minutes, and the seconds between two looks at the laws."""

    minutes: float = 60.0
    look_seconds: float = 5.0


TOLD = "failed", "cannot be read", "there was no memory"
"""What errors of faults say."""
FULL, SMALL = Size(), Size(small=True, minutes=0.2, look_seconds=2.0)


class Users:
    """Callers of all kinds, each in a thread, until they are told to stop."""

    def __init__(self, engine: Engine, faults: Faults, expected: dict[tuple[str, int], tuple[int, ...]]) -> None:
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._engine = engine
        self._faults = faults
        self._expected = expected
        self._stop = threading.Event()
        self._quiet = threading.Condition()
        self._paused = False
        self._busy = 0
        self._threads = [threading.Thread(target=self._use, args=(number,)) for number in range(USERS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends them after what they do now."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def pause(self, look: Callable[[], None]) -> None:
        """Calls `look` while nobody uses the engine."""
        with self._quiet:
            self._paused = True
            self._quiet.wait_for(lambda: not self._busy)
            look()
            self._paused = False
            self._quiet.notify_all()

    def _use(self, seed: int) -> None:
        draw = random.Random(seed)
        kinds = [
            self._reply,
            self._cancelled,
            self._dropped,
            self._batch,
            self._chat,
            self._tasks,
            self._bad,
            self._fault,
        ]
        if seed == 0:
            kinds.append(self._resize)
        while not self._stop.is_set():
            with self._quiet:
                self._quiet.wait_for(lambda: not self._paused)
                self._busy += 1
            kind = draw.choice(kinds)
            try:
                kind(draw)
                self.done[kind.__name__.strip("_")] += 1
            except EdgeMoEError as error:
                # A fault that another one asked for reaches every request of its step; one of memory does where
                # several come within a few hundred steps, which are tried again three times only.
                if not any(each in str(error) for each in TOLD):
                    self.wrong.append(f"{kind.__name__}: {error!r}")
            except Exception as error:
                self.wrong.append(f"{kind.__name__}: {error!r}")
            finally:
                with self._quiet:
                    self._busy -= 1
                    self._quiet.notify_all()

    def _ask(self, draw: random.Random) -> tuple[str, Sampling]:
        """A prompt and greedy or seeded settings of which the whole reply is known."""
        prompt, seed = draw.choice(list(self._expected))
        return prompt, _settings(seed)

    def _check(self, prompt: str, settings: Sampling, tokens: tuple[int, ...], *, whole: bool) -> None:
        right = self._expected[prompt, settings.seed or 0]
        if tokens != (right if whole else right[: len(tokens)]):
            self.wrong.append(f"the reply to {prompt[:20]!r} with seed {settings.seed}")

    def _reply(self, draw: random.Random) -> None:
        prompt, settings = self._ask(draw)
        self._check(prompt, settings, self._engine.generate(prompt, settings).token_ids, whole=True)

    def _cancelled(self, draw: random.Random) -> None:
        prompt, settings = self._ask(draw)
        stream = self._engine.stream(prompt, settings)
        timer = threading.Timer(draw.random() * 0.1, draw.choice([stream.cancel, stream.close]))
        timer.start()
        self._check(prompt, settings, tuple(token for chunk in stream for token in chunk.token_ids), whole=False)
        timer.join()

    def _dropped(self, draw: random.Random) -> None:
        stream = self._engine.stream(*self._ask(draw))
        for _ in range(draw.randrange(4)):
            next(stream, None)

    def _batch(self, draw: random.Random) -> None:
        asked = [self._ask(draw) for _ in range(draw.randrange(1, 12))]
        for number, reply in self._engine.generate_batch(asked):
            if isinstance(reply, Completion):
                self._check(*asked[number], reply.token_ids, whole=True)

    def _chat(self, draw: random.Random) -> None:
        self._engine.chat([{"role": "user", "content": draw.choice(PROMPTS)}], _settings(0))

    def _tasks(self, draw: random.Random) -> None:
        asked = [self._ask(draw) for _ in range(3)]

        async def body() -> None:
            waits = AsyncEngine(self._engine)
            tasks = [asyncio.create_task(waits.generate(*each)) for each in asked]
            await asyncio.sleep(draw.random() * 0.05)
            tasks[0].cancel()
            for each, ended in zip(asked, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
                if isinstance(ended, Completion):
                    self._check(*each, ended.token_ids, whole=True)
                elif not isinstance(ended, (asyncio.CancelledError, EdgeMoEError)):
                    self.wrong.append(f"a task: {ended!r}")

        asyncio.run(body())

    def _bad(self, draw: random.Random) -> None:
        with suppress(RequestError):
            self._engine.generate(draw.choice(["", "word " * 5000]), _settings(0))
            self.wrong.append("a bad prompt is served")

    def _fault(self, draw: random.Random) -> None:
        if draw.random() < 0.9:
            return

        once = threading.Lock()

        def read() -> None:
            # Readers that come at the same time have it as well before it is lifted.
            if once.acquire(blocking=False):
                self._faults.lift()
                raise draw.choice([OSError(5, "Input/output error"), MemoryError()])

        self._faults.read = read
        self._dropped(draw)

    def _resize(self, draw: random.Random) -> None:
        if draw.random() < 0.2:
            self._engine.resize(draw.choice([40, 60, 100]))


def run(size: Size = FULL) -> Measurement:
    """Every few seconds nobody asks, and slots, pins, KV bytes, threads and files are counted."""
    expected = {}
    with load(None, Faults(), threads=1, batch=1, context=1024, speculate="off") as single:
        for prompt in PROMPTS:
            # How a long prompt is cut into passes changes the last bits of bf16: a sample may turn on them.
            for seed in range(3 if len(prompt) < LONG_TEXT else 1):
                expected[prompt, seed] = single.generate(prompt, _settings(seed)).token_ids
    faults, wrong, memory = Faults(), list[str](), list[tuple[float, int]]()
    with load(None, faults, **SETTINGS) as engine:
        engine.generate(PROMPTS[0], _settings(0))
        threads = len(own_threads())
        files = open_files()

        def look() -> None:
            faults.lift()
            wrong.extend(broken_laws(engine))
            if len(own_threads()) != threads:
                wrong.append(f"{len(own_threads())} threads, not {threads}")
            if open_files() > files:
                wrong.append(f"{open_files()} open files, not {files}")
            gc.collect()
            memory.append((time.monotonic(), resident_nbytes()))

        users = Users(engine, faults, expected)
        end = time.monotonic() + 60 * size.minutes
        while time.monotonic() < end:
            time.sleep(min(size.look_seconds, max(0.0, end - time.monotonic())))
            users.pause(look)
        users.stop()
    wrong += users.wrong
    slope = growth(memory) / MIB
    value = {"done": sum(users.done.values()), "wrong": len(wrong), "mib_a_minute": round(slope, 2)}
    detail = {"kinds": dict(users.done), "looks": len(memory), "wrong": wrong[:50], "mib": memory[-1][1] // MIB}
    return Measurement(NAME, value, BAR, not wrong and slope < 1, detail)


def growth(memory: list[tuple[float, int]]) -> float:
    """Bytes a minute by which memory grows, without the first part: the slope of the line through the others."""
    rest = memory[int(WARM_SHARE * len(memory)) :]
    if len(rest) < 2:
        return 0.0
    return 60 * statistics.linear_regression([at for at, _ in rest], [nbytes for _, nbytes in rest]).slope


def _settings(seed: int) -> Sampling:
    """Greedy for 0, else drawn with the seed."""
    if not seed:
        return Sampling(max_tokens=16, temperature=0, ignore_eos=True, seed=0)
    return Sampling(max_tokens=16, temperature=1.0, seed=seed, ignore_eos=True)
