"""`warm-start`: expert bytes that the first 64 tokens wait for, with what an earlier run found hot and without."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from bench.measurement import Measurement
from bench.support.checkpoints import inflated
from bench.support.workload import Request, mixed
from edgemoe import Engine
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.config import EngineConfig

NAME = "warm-start"
BAR = "fewer demanded bytes in the first 64 tokens of the second run than of the first"
ROUNDS = 4
TOKENS = 64
FEW = 8
"""Tokens after which it is looked, too: the sooner, the more a start counts."""
LEARNT = 54
"""Requests of the earlier run; none of them is asked in a measured one, but where a task has few questions."""
MEASURED = 9
"""Requests that a measured run may need to make its tokens."""
SETTINGS: dict[str, Any] = {
    "device": "cpu", "expert_cache": "25%", "link_gbps": 4.0, "context": 512, "batch": 1,
    # What they load depends on the moment; without them a run loads the same each time.
    "speculate": "off", "prefetch": "off",
}  # fmt: skip


def run() -> Measurement:
    """Each round asks the same questions three times, each time in a new engine whose slots have been filled.

    First with nothing kept; then after a run that answered other questions, which is what the bar is about; and after
    a run that answered the very same questions, which is as warm as a start can be. The tokens are the same in all.
    """
    questions = mixed(LEARNT + ROUNDS * MEASURED, TOKENS)
    learnt, rest = questions[:LEARNT], questions[LEARNT:]
    found: dict[str, list[dict[str, Any]]] = {"first": [], "second": [], "same again": []}
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        earlier_run(state / "others", learnt)
        for number in range(ROUNDS):
            asked = rest[number * MEASURED : (number + 1) * MEASURED]
            # A copy: what a measured run learns must not reach the next one.
            second = shutil.copytree(state / "others", state / f"others-{number}")
            found["first"].append(measured_run(state / str(number), asked))
            found["second"].append(measured_run(second, asked))
            found["same again"].append(measured_run(state / str(number), asked))
            last = {kind: entries[-1] for kind, entries in found.items()}
            print({kind: f"{entry['demanded'] / 1e6:.0f} MB" for kind, entry in last.items()}, flush=True)
            assert len({entry.pop("tokens") for entry in last.values()}) == 1, "the replies differ"
    sums = {kind: sum(entry["demanded"] for entry in entries) for kind, entries in found.items()}
    value = {f"{kind.replace(' ', '_')}_mb": round(total / 1e6) for kind, total in sums.items()}
    ratio = round(sums["second"] / sums["first"], 3)
    detail = {"rounds": found, "tokens_a_round": TOKENS, "settings": SETTINGS}
    return Measurement(NAME, value | {"ratio": ratio}, BAR, sums["second"] < sums["first"], detail)


def load(state: Path) -> Engine:
    """The widened shipped model, plain decoding, with what is kept in `state`."""
    return Engine(open_blueprint(inflated()), EngineConfig(**SETTINGS, state_folder=state), lambda progress: None)


def earlier_run(state: Path, requests: list[Request]) -> None:
    """Answers `requests` one after the other and closes, so that what was hot is kept in `state`."""
    state.mkdir()
    with load(state) as engine:
        for request in requests:
            engine.generate(*request)


def measured_run(state: Path, requests: list[Request]) -> dict[str, Any]:
    """Asks until `TOKENS` tokens were generated. What their prompts and they demanded, and what they were."""
    with load(state) as engine:
        wait_until_filled(engine)
        tokens: list[int] = []
        early = 0
        for prompt, sampling in requests:
            with closing(engine.stream(prompt, sampling)) as chunks:
                for chunk in chunks:
                    if len(tokens) < FEW <= len(tokens) + len(chunk.token_ids):
                        early = engine.stats.bytes_demanded
                    tokens.extend(chunk.token_ids)
                    if len(tokens) >= TOKENS:
                        break
            if len(tokens) >= TOKENS:
                break
        assert len(tokens) >= TOKENS, "the requests are too few"
        stats = engine.stats
    return {
        "demanded": stats.bytes_demanded,
        f"demanded_by_token_{FEW}": early,
        "moved": stats.bytes_loaded,
        "hits": stats.hits,
        "misses": stats.misses,
        "tokens": tuple(tokens[:TOKENS]),
    }


def wait_until_filled(engine: Engine) -> None:
    """Every slot holds an expert: without this, whichever run asks later would have more of them."""
    cache = engine._loaded().cache
    while sum(len(cache.residents(layer)) for layer in range(engine.plan.layers)) < engine.plan.slots:
        time.sleep(0.01)
