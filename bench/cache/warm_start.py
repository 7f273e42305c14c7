"""`warm-start`: expert bytes that the first 64 tokens wait for, with what an earlier run found hot and without."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from bench.support.engine_parts import cache_of
from bench.support.workload import Request, mixed
from edgemoe import Engine
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.config import EngineConfig

NAME = "warm-start"
BAR = "fewer demanded bytes in the first 64 tokens of the second run than of the first"
FEW = 8
"""Tokens after which it is looked, too: the sooner, the more a start counts."""
SETTINGS: dict[str, Any] = {
    "device": "cpu", "expert_cache": "25%", "link_gbps": 4.0, "context": 512, "batch": 1,
    # What they load depends on the moment; without them a run loads the same each time.
    "speculate": "off", "prefetch": "off",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Rounds, what is asked in each, and how wide the experts are."""

    factor: int = FACTOR
    rounds: int = 4
    tokens: int = 64
    learnt: int = 54
    """Requests of the earlier run; none of them is asked in a measured one, but where a task has few questions."""
    measured: int = 9
    """Requests that a measured run may need to make its tokens."""


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, rounds=1, tokens=12, learnt=3, measured=6)


def run(size: Size = FULL) -> Measurement:
    """Each round asks the same questions three times, each time in a new engine whose slots have been filled.

    First with nothing kept; then after a run that answered other questions, which is what the bar is about; and after
    a run that answered the very same questions, which is as warm as a start can be. The tokens are the same in all.
    """
    questions = mixed(size.learnt + size.rounds * size.measured, size.tokens)
    learnt, rest = questions[: size.learnt], questions[size.learnt :]
    found: dict[str, list[dict[str, Any]]] = {"first": [], "second": [], "same again": []}
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        earlier_run(state / "others", learnt, size)
        for number in range(size.rounds):
            asked = rest[number * size.measured : (number + 1) * size.measured]
            # A copy: what a measured run learns must not reach the next one.
            second = shutil.copytree(state / "others", state / f"others-{number}")
            found["first"].append(measured_run(state / str(number), asked, size))
            found["second"].append(measured_run(second, asked, size))
            found["same again"].append(measured_run(state / str(number), asked, size))
            last = {kind: entries[-1] for kind, entries in found.items()}
            print({kind: f"{entry['demanded'] / 1e6:.0f} MB" for kind, entry in last.items()}, flush=True)
            assert len({entry.pop("tokens") for entry in last.values()}) == 1, "the replies differ"
    sums = {kind: sum(entry["demanded"] for entry in entries) for kind, entries in found.items()}
    value = {f"{kind.replace(' ', '_')}_mb": round(total / 1e6) for kind, total in sums.items()}
    ratio = round(sums["second"] / sums["first"], 3)
    detail = {"rounds": found, "tokens_a_round": size.tokens, "settings": SETTINGS}
    return Measurement(NAME, value | {"ratio": ratio}, BAR, sums["second"] < sums["first"], detail)


def load(state: Path, factor: int) -> Engine:
    """The widened shipped model, plain decoding, with what is kept in `state`."""
    return Engine(open_blueprint(inflated(factor)), EngineConfig(**SETTINGS, state_folder=state), lambda progress: None)


def earlier_run(state: Path, requests: list[Request], size: Size) -> None:
    """Answers `requests` one after the other and closes, so that what was hot is kept in `state`."""
    state.mkdir()
    with load(state, size.factor) as engine:
        for request in requests:
            engine.generate(*request)


def measured_run(state: Path, requests: list[Request], size: Size) -> dict[str, Any]:
    """Asks until `size.tokens` tokens were generated. What their prompts and they demanded, and what they were."""
    with load(state, size.factor) as engine:
        wait_until_filled(engine)
        tokens: list[int] = []
        early = 0
        for prompt, sampling in requests:
            with closing(engine.stream(prompt, sampling)) as chunks:
                for chunk in chunks:
                    if len(tokens) < FEW <= len(tokens) + len(chunk.token_ids):
                        early = engine.stats.bytes_demanded
                    tokens.extend(chunk.token_ids)
                    if len(tokens) >= size.tokens:
                        break
            if len(tokens) >= size.tokens:
                break
        assert len(tokens) >= size.tokens, "the requests are too few"
        stats = engine.stats
    return {
        "demanded": stats.bytes_demanded,
        f"demanded_by_token_{FEW}": early,
        "moved": stats.bytes_loaded,
        "hits": stats.hits,
        "misses": stats.misses,
        "tokens": tuple(tokens[: size.tokens]),
    }


def wait_until_filled(engine: Engine) -> None:
    """Every slot holds an expert: without this, whichever run asks later would have more of them."""
    cache = cache_of(engine)
    while sum(len(cache.residents(layer)) for layer in range(engine.plan.layers)) < engine.plan.slots:
        time.sleep(0.01)
