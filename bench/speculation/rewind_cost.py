"""`rewind-cost`: a verification of a hybrid family, whose states are kept for each token, against single steps."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.checkpoints import hybrid
from bench.support.engine_parts import cache_of, runner_of
from edgemoe import Engine
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner, tree_input

NAME = "rewind-cost"
BAR = "a verification of 4 tokens takes <= 0.6 of the time of 4 single steps; kept states take the bytes of the plan"
LIMIT = 0.6
TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Tokens of the prompt, and rounds of a verification and single steps."""

    prompt: int = 64
    rounds: int = 40


FULL, SMALL = Size(), Size(small=True, prompt=8, rounds=3)


def run(size: Size = FULL) -> Measurement:
    """All experts resident, warm; both ways in turn, over the same tokens, drawn at random."""
    settings: dict[str, Any] = {"device": "cpu", "speculate": "ngram", "prefetch": "off", "batch": 1, "context": 1024}
    with Engine.load(hybrid(small=size.small), expert_cache="100%", state_folder="none", **settings) as engine:
        runner, plan = runner_of(engine), engine.plan
        draw = random.Random(0)
        prompt = [draw.randrange(3, runner.vocabulary) for _ in range(size.prompt)]
        together, one_by_one = runner.start(plan.context), runner.start(plan.context)
        for cache in (together, one_by_one):
            runner.step(cache, prompt)
        counters, seconds, chosen, kept = cache_of(engine).counters, [], [0, 0], 0
        for _ in range(size.rounds):
            tokens = [draw.randrange(3, runner.vocabulary) for _ in range(TOKENS)]
            before = counters.hits + counters.misses
            kept, verification = verified(runner, together, tokens)
            between = counters.hits + counters.misses
            seconds.append((verification, stepped(runner, one_by_one, tokens)))
            chosen[0] += between - before
            chosen[1] += counters.hits + counters.misses - between
        planned = (TOKENS + 1) * plan.kv.state_nbytes
    verification, steps = (median(each) for each in zip(*seconds[size.rounds // 4 :], strict=True))
    share = verification / steps
    value = {
        "share": round(share, 3),
        "verification_ms": round(1e3 * verification, 1),
        "steps_ms": round(1e3 * steps, 1),
        "kept_nbytes": kept,
        "planned_nbytes": planned,
    }
    detail = {
        "verifies": runner.verifies,
        "experts_a_verification": chosen[0] / size.rounds,
        "experts_of_steps": chosen[1] / size.rounds,
        "dense_nbytes": plan.dense_nbytes,
        "record_nbytes": plan.record_nbytes,
        "seconds": seconds,
    }
    return Measurement(NAME, value, BAR, share <= LIMIT and kept <= planned, detail)


def verified(runner: ModelRunner, cache: SequenceCache, tokens: list[int]) -> tuple[int, float]:
    """Bytes of kept states, and the time of a verification of `tokens`, which are all accepted."""
    tree = DraftTree(tokens[0])
    for node, token in enumerate(tokens[1:]):
        tree.add(node, token, 1.0)
    started, base = time.perf_counter(), cache.tokens
    cache.mark()
    runner.run([tree_input(cache, tree, range(len(tree)), ())._replace(verifies=True)])
    kept = cache.kept_nbytes
    cache.rollback(base, range(len(tokens)))
    return kept, time.perf_counter() - started


def stepped(runner: ModelRunner, cache: SequenceCache, tokens: list[int]) -> float:
    """The time of a single step for each of `tokens`."""
    started = time.perf_counter()
    for token in tokens:
        runner.step(cache, [token])
    return time.perf_counter() - started
