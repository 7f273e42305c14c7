"""`cancel`: how long replies and engines take to end, told so at random moments, against one layer's time."""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from bench.support.faults import broken_laws
from edgemoe import AsyncEngine, EdgeMoEError, Engine, Sampling

NAME = "cancel"
BAR = "the end within one layer's time + 50 ms; no pin or slot lost; the next request exact"
SLACK = 0.05
"""Seconds beyond a layer's time."""
SETTINGS: dict[str, Any] = {"device": "cpu", "expert_cache": "25%", "batch": 2, "context": 2048, "state_folder": "none"}
NEXT = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
LONG = Sampling(max_tokens=2048, temperature=0, ignore_eos=True)
QUESTION = "What is 48 + 31?"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Moments, the prompts' tokens, how wide the experts are, and every how many moments an engine is closed."""

    factor: int = FACTOR
    moments: int = 200
    tokens: int = 2000
    close_every: int = 10


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, moments=8, tokens=300, close_every=8)


class Round:
    """One engine, what it says undisturbed, and the times of its layers."""

    def __init__(self, size: Size, draw: random.Random) -> None:
        self._draw = draw
        self._tokens = size.tokens
        self._factor = size.factor
        self.load()
        self.expected = self.engine.generate(QUESTION, NEXT).token_ids
        self.prompt_seconds, self.prompt_layer = self._timed(self.prompt(), 1)
        _, self.decode_layer = self._timed(QUESTION, 24)

    def load(self) -> None:
        """Loads the model, for the first time or again."""
        self.engine = Engine.load(inflated(self._factor), **SETTINGS)

    def prompt(self) -> list[int]:
        """A prompt that begins like no other one."""
        return [self._draw.randrange(100, 400) for _ in range(self._tokens)]

    def _timed(self, prompt: Any, tokens: int) -> tuple[float, float]:
        """Seconds of a reply, and most seconds between two looks at what callers want."""
        runtime = self.engine._runtime
        assert runtime is not None
        seen, poll = [time.perf_counter()], runtime.layers.poll

        def noted() -> None:
            seen.append(time.perf_counter())
            poll()

        runtime.layers.poll = noted
        started = time.perf_counter()
        self.engine.generate(prompt, Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))
        runtime.layers.poll = poll
        seen.append(time.perf_counter())
        return time.perf_counter() - started, max(
            later - earlier for earlier, later in zip(seen, seen[1:], strict=False)
        )

    def end(self, how: str, phase: str) -> float:
        """Seconds from telling a reply, or the engine, to end until whoever reads it has its end."""
        stream = self.engine.stream(self.prompt() if phase == "prompt" else QUESTION, LONG)
        ended = list[float]()

        def read() -> None:
            with suppress(EdgeMoEError):
                for _ in stream:
                    pass
            ended.append(time.perf_counter())

        reader = threading.Thread(target=read)
        if phase == "decode":
            next(stream)
        reader.start()
        time.sleep(self._draw.uniform(0, self.prompt_seconds if phase == "prompt" else 0.3))
        ways: dict[str, Callable[[], None]] = {
            "cancel": stream.cancel, "stream.close": stream.close,
            "engine.cancel": self.engine.cancel, "engine.close": self.engine.close,
        }  # fmt: skip
        told = time.perf_counter()
        ways[how]()
        closed = time.perf_counter()
        reader.join()
        return max(ended[0], closed if how == "engine.close" else 0.0) - told

    def end_task(self, phase: str) -> float:
        """The same for a task of an event loop that is cancelled."""

        async def body() -> float:
            waits = AsyncEngine(self.engine)
            task = asyncio.create_task(waits.generate(self.prompt() if phase == "prompt" else QUESTION, LONG))
            await asyncio.sleep(self._draw.uniform(0.01, self.prompt_seconds if phase == "prompt" else 0.3))
            told = time.perf_counter()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            return time.perf_counter() - told

        return asyncio.run(body())


def run(size: Size = FULL) -> Measurement:
    """Random ways to end, at random moments of prompts and of decoding; after each the laws and the next reply."""
    draw = random.Random(0)
    now = Round(size, draw)
    late, wrong, waits = list[dict[str, Any]](), list[str](), list[float]()
    for number in range(size.moments):
        phase = draw.choice(["prompt", "decode"])
        how = draw.choice(["cancel", "stream.close", "engine.cancel", "task"])
        how = "engine.close" if number % size.close_every == size.close_every - 1 else how
        seconds = now.end_task(phase) if how == "task" else now.end(how, phase)
        layer = now.prompt_layer if phase == "prompt" else now.decode_layer
        waits.append(seconds)
        if seconds > layer + SLACK:
            late.append({"how": how, "phase": phase, "seconds": round(seconds, 3), "layer": round(layer, 3)})
        if how == "engine.close":
            now.load()
        wrong += broken_laws(now.engine)
        if now.engine.generate(QUESTION, NEXT).token_ids != now.expected:
            wrong.append(f"the reply after {how} in {phase}")
    now.engine.close()
    value = {
        "moments": size.moments,
        "late": len(late),
        "wrong": len(wrong),
        "median_ms": round(1e3 * statistics.median(waits), 1),
        "worst_ms": round(1e3 * max(waits), 1),
    }
    detail = {
        "prompt_seconds": round(now.prompt_seconds, 1),
        "prompt_layer_ms": round(1e3 * now.prompt_layer, 1),
        "decode_layer_ms": round(1e3 * now.decode_layer, 1),
        "late": late,
        "wrong": wrong,
    }
    return Measurement(NAME, value, BAR, not late and not wrong, detail)
