"""`batch-fair`: an adversarial mix of long and short requests: how late each is taken, and how long it waits."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass
from typing import Any

from bench.measurement import BaseSize, Measurement
from edgemoe import Engine, Sampling
from edgemoe.config import EngineConfig
from edgemoe.results import Completion

NAME = "batch-fair"
BAR = "every request begins within its bound: `patience` turns late at most, in seconds as turns and service times give"
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Short and long requests, their replies, and the longest prompt, in tokens."""

    short: int = 240
    long: int = 16
    reply_short: int = 8
    reply_long: int = 160
    header: int = 200
    """Tokens with which all short prompts begin."""
    prompt_long: int = 900


FULL, SMALL = Size(), Size(small=True, short=10, long=2, reply_short=2, reply_long=8, header=20, prompt_long=60)


def run(size: Size = FULL) -> Measurement:
    """The shipped model, 8 at a time. The short ones begin alike, so that the order of the line favours them."""
    requests, kinds = adversarial(size)
    patience = EngineConfig().patience
    with Engine.load(device="cpu", batch=BATCH) as engine:
        taken = _record_turns(engine)
        replies: dict[int, Any] = dict(engine.generate_batch(requests))
    late = {number: turn - number for turn, number in enumerate(taken)}
    service = {number: _service(reply) for number, reply in replies.items()}
    slowest = max(service.values())
    waits = {number: reply.timings.wait_seconds for number, reply in replies.items()}
    bounds = {number: math.ceil((number + patience + 1) / BATCH) * slowest for number in waits}
    broken = [number for number in waits if late[number] > patience or waits[number] > bounds[number]]
    for kind in ("short", "long"):
        own = [number for number in waits if kinds[number] == kind]
        print(
            f"{kind:5} {len(own):3} requests: waited {statistics.median(waits[number] for number in own):.2f} s, "
            f"at most {max(waits[number] for number in own):.2f} s; taken at most "
            f"{max(late[number] for number in own)} turns late"
        )
    worst = max(waits, key=lambda number: waits[number] / bounds[number])
    value = {
        "longest_wait_seconds": round(max(waits.values()), 2),
        "most_turns_late": max(late.values()),
        "broken": len(broken),
    }
    detail = {
        "patience": patience,
        "nearest_to_its_bound": {"waited": waits[worst], "bound": bounds[worst]},
        "longest_service_seconds": slowest,
        "batch": BATCH,
    }
    return Measurement(NAME, value, BAR, not broken and len(replies) == len(requests), detail)


def adversarial(size: Size) -> tuple[list[tuple[list[int], Sampling]], list[str]]:
    """Many short requests with one header, and a few long ones that share nothing, anywhere among them."""
    draw = random.Random(0)
    header = [draw.randint(3, 1000) for _ in range(size.header)]
    kinds = ["short"] * size.short + ["long"] * size.long
    draw.shuffle(kinds)
    requests = []
    for kind in kinds:
        own = [draw.randint(3, 1000) for _ in range(size.prompt_long if kind == "long" else 6)]
        tokens = size.reply_long if kind == "long" else size.reply_short
        settings = Sampling(temperature=0, max_tokens=tokens, ignore_eos=True)
        requests.append((own if kind == "long" else header + own, settings))
    return requests, kinds


def _record_turns(engine: Engine) -> list[int]:
    """Fills with the numbers of the requests in the order in which they get their places."""
    line, taken = engine._loop.scheduler._waiting, list[int]()
    take_first = line.take_first

    def recording() -> Any:
        generation = take_first()
        taken.append(generation.number)
        return generation

    line.take_first = recording  # type: ignore[method-assign]
    return taken


def _service(reply: Completion) -> float:
    return reply.timings.prompt_seconds + reply.timings.generate_seconds
