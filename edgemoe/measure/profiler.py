"""Measures a model on this machine: passes over batches and tokens, with all the slots there are and with few."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from edgemoe.cache import ExpertCache
from edgemoe.checkpoint.blueprint import Blueprint
from edgemoe.checkpoint.tokenizer import load_tokenizer
from edgemoe.config import EngineConfig
from edgemoe.errors import PlanError, reading
from edgemoe.kernels.cpu.threads import torch_threads
from edgemoe.measure.text_passes import PROMPT, SEED, PassReading, TextPasses, task_texts
from edgemoe.model.model_runner import ModelRunner
from edgemoe.plan import fitting, machine
from edgemoe.plan.performance_model import MachineSpeed, ModelShape
from edgemoe.plan.plan import Plan
from edgemoe.plan.profile import Profile, ProfileConditions, ProfilePoint
from edgemoe.planner import make_plan
from edgemoe.results import Progress
from edgemoe.runtime import Runtime

SEQUENCES = 64
"""Texts that are read side by side, and the largest batch."""
LENGTH = 288
"""Tokens of a text ..."""
SHORTEST = 2 * PROMPT
"""... and those that a model must at least have room for."""
MIN_SEQUENCES = 4
"""Texts without which there are too few shapes of passes for a fit."""
SHAPES = (
    (1, 1), (1, 2), (1, 4), (1, 9), (2, 1), (4, 1), (4, 4), (8, 1), (8, 9),
    (16, 1), (16, 4), (16, 9), (32, 1), (64, 1), (64, 4), (64, 9),
)  # fmt: skip
"""Batch and tokens of the passes with all the slots there are: up to both ends, and around where products change ..."""
LEAN_SHAPES = ((1, 1), (1, 4), (1, 9), (8, 1), (8, 4), (16, 9), (64, 1), (64, 4))
"""... and with few, which make a link that is waited for. Together 24 points; MoESD finds 21 to be enough."""
LEAN_SHARE = 0.35
"""Share of the slots that is few."""
ROUNDS = 3
"""Times that every shape has its turn: what disturbs one of them disturbs others in the next."""
ENOUGH_SECONDS = 50.0
"""Time for each size of the cache. After it no more turns begin, but for the smaller half of the shapes, once, and for
as many as a fit needs."""
READING_SECONDS = 0.25
"""Time that one turn of a shape goes on for ..."""
READINGS = (2, 8)
"""... and how many passes it has at least and at most."""
WARM = 8
"""Sequences times passes that come before, while the cache follows the text; at least one pass."""
FILL_PATIENCE = 60.0
"""Seconds without an arrival after which passes begin although experts are still on their way into the slots."""
FILL_POLL = 0.05
"""Seconds between two looks at how many there are."""


@dataclass
class ProfilingRun:
    """A loaded model and texts to run through it."""

    plan: Plan
    runtime: Runtime
    passes: TextPasses
    runner: ModelRunner
    sequences: int


@contextmanager
def profiling_run(
    blueprint: Blueprint, config: EngineConfig, on_progress: Callable[[Progress], None], seed: int = SEED
) -> Iterator[ProfilingRun]:
    """The model with texts to read, gone after the block; `seed` chooses them. It keeps no heat, which would be theirs.

    Raises PlanError where it does not fit, and for families whose past cannot be taken back, which never speculate.
    """
    limit, name = min(LENGTH, blueprint.context_limit or LENGTH), blueprint.checkpoint.name
    if limit < SHORTEST:
        raise PlanError(f"{name} has a context of {limit} tokens: a profile needs texts of at least {SHORTEST}")
    config = replace(config, speculate="off", draft_model=None, state_folder="none", context=limit, batch=SEQUENCES)
    plan = make_plan(blueprint, config)
    sequences = min(SEQUENCES, plan.kv_nbytes // max(1, plan.kv.nbytes(limit)))
    if sequences < MIN_SEQUENCES:
        raise PlanError(
            f"{name} leaves room for {sequences} sequences of {limit} tokens, of which a profile needs "
            f"{MIN_SEQUENCES}: give a smaller expert_cache="
        )
    runtime = Runtime(blueprint, plan, config, on_progress)
    try:
        runner = ModelRunner(runtime.runner())
        if not runner.verifies:
            raise PlanError(f"{name} cannot take drafts back, so that there is no speculation to profile")
        vocabulary = blueprint.config.get_text_config().vocab_size
        texts = task_texts(load_tokenizer(blueprint.checkpoint), sequences, limit, vocabulary, seed)
        await_fill(runtime.cache, on_progress)
        yield ProfilingRun(plan, runtime, TextPasses(runner, runtime.cache.counters, texts), runner, sequences)
    finally:
        runtime.close()


def await_fill(cache: ExpertCache, on_progress: Callable[[Progress], None]) -> None:
    """Waits for the experts that loading has put on the link; what passes wait for is then the passes' own."""
    nbytes, total = cache.store.slot_nbytes, cache.prefetching
    left, arrived = total, time.perf_counter()
    while left and time.perf_counter() - arrived < FILL_PATIENCE:
        time.sleep(FILL_POLL)
        if cache.prefetching < left:
            left, arrived = cache.prefetching, time.perf_counter()
            on_progress(Progress("experts", (total - left) * nbytes, total * nbytes))


def take_profile(
    blueprint: Blueprint, config: EngineConfig, on_progress: Callable[[Progress], None] | None = None
) -> Profile:
    """Measures and fits, in a minute or two; loads the model twice. Raises PlanError, CheckpointError as that does."""
    with reading(blueprint.checkpoint.name):
        return _profile(blueprint, config, on_progress or _ignore)


def _profile(blueprint: Blueprint, config: EngineConfig, on_progress: Callable[[Progress], None]) -> Profile:
    with profiling_run(blueprint, config, on_progress) as full:
        plan, bulk_from = full.plan, full.runner.sequential.bulk_from
        lean = max(1, int(LEAN_SHARE * plan.slots))
        shapes = sum(batch <= full.sequences for batch, _ in SHAPES)
        if lean == plan.slots and shapes < fitting.MIN_POINTS:
            raise PlanError(
                f"{plan.model} with 1 slot has {shapes} kinds of passes to measure, of which a profile needs "
                f"{fitting.MIN_POINTS}: give expert_cache=2 or more"
            )
        points = measure(full, SHAPES, fitting.MIN_POINTS)
        speed = _ceilings(blueprint, full)
    if lean < plan.slots:
        with profiling_run(blueprint, lean_config(config, plan, lean), on_progress) as few:
            points += measure(few, LEAN_SHAPES, fitting.MIN_POINTS - len(points))
            speed = replace(speed, link=_link_speed(few))
            plan = few.plan
    model = fitting.fit(shape_of(blueprint, plan), speed, points, bulk_from)
    taken = datetime.datetime.now().astimezone().date().isoformat()
    # With few slots more is missing: of the two plans it is the second that tells where missing experts come from.
    return Profile(taken, ProfileConditions.of(plan), model, tuple(points))


def lean_config(config: EngineConfig, plan: Plan, slots: int) -> EngineConfig:
    """For fewer slots than in `plan`, with missing experts read as by that plan, where it has any."""
    if plan.slots < plan.experts:
        config = replace(config, file_reads="direct" if plan.direct_reads else "cached")
    return replace(config, expert_cache=slots)


def measure(at: ProfilingRun, shapes: Sequence[tuple[int, int]], fewest: int = 0) -> list[ProfilePoint]:
    """A point for each of `shapes` that there are sequences and time for, in turns.

    There is always time for `fewest` of them, as far as there are so many.
    """
    readings: dict[tuple[int, int], list[PassReading]] = {}
    # Small ones first: where time runs short, the largest are left out.
    todo = sorted((shape for shape in shapes if shape[0] <= at.sequences), key=math.prod)
    least = max(len(todo) // 2, fewest)
    started = time.perf_counter()
    for turn in range(ROUNDS):
        for batch, tokens in todo:
            if time.perf_counter() - started > ENOUGH_SECONDS and (turn or len(readings) >= least):
                break
            readings.setdefault((batch, tokens), []).extend(_turn(at, turn, batch, tokens))
    return [point(at.plan, *shape, found) for shape, found in readings.items()]


def _turn(at: ProfilingRun, turn: int, batch: int, tokens: int) -> list[PassReading]:
    """Some passes of one shape. Each turn reads other texts, as far as there are."""
    first = turn * at.sequences // ROUNDS + batch
    for _ in range(max(1, WARM // batch)):
        at.passes.run(first, batch, tokens)
    found: list[PassReading] = []
    fewest, most = READINGS
    while len(found) < fewest or (len(found) < most and sum(each.seconds for each in found) < READING_SECONDS):
        found.append(at.passes.run(first, batch, tokens))
    return found


def point(plan: Plan, batch: int, tokens: int, readings: Sequence[PassReading]) -> ProfilePoint:
    """The mean of the middle half of `readings` by their seconds: time and misses are those of the same passes."""
    ordered = sorted(readings)
    quarter = len(ordered) // 4
    middle = ordered[quarter : len(ordered) - quarter]
    means = PassReading(*(fmean(column) for column in zip(*middle, strict=True)))  # type: ignore[arg-type]
    return ProfilePoint(
        batch=batch,
        tokens=tokens,
        cache_share=plan.slots / plan.experts,
        seconds=means.seconds,
        experts=means.experts / plan.layers,
        misses=means.misses,
        draft_seconds=means.draft_seconds,
        reject_seconds=means.reject_seconds,
    )


def shape_of(blueprint: Blueprint, plan: Plan) -> ModelShape:
    """What of `blueprint` decides the time of its passes; of layers that differ, the mean."""
    return ModelShape(
        layers=plan.layers,
        experts=round(plan.experts / plan.layers),
        top_k=plan.top_k,
        record_nbytes=plan.slot_nbytes,
        dense_nbytes=plan.dense_nbytes,
        itemsize=blueprint.dtype.itemsize,
    )


def _ceilings(blueprint: Blueprint, at: ProfilingRun) -> MachineSpeed:
    device = torch.device(at.plan.device)
    *rows, columns = max(
        (part.shape for moe in blueprint.experts_modules for part in moe.layout.parts),
        key=math.prod,
    )
    with torch.inference_mode(), torch_threads(at.plan.threads):
        return MachineSpeed(
            memory=machine.memory_speed(at.runtime.cache.pool.memory),
            arithmetic=machine.product_speed(math.prod(rows), columns, blueprint.dtype, device),
            link=_link_speed(at),
        )


def _link_speed(at: ProfilingRun) -> float:
    """Bytes a second while something was on the link; where the link cannot tell, those of a plain copy."""
    if at.plan.link_gbps is not None:
        return at.plan.link_gbps * 1e9
    link = at.runtime.link
    if link.bytes_moved and link.busy_seconds:
        return link.bytes_moved / link.busy_seconds
    return machine.copy_speed(at.plan.slot_nbytes, torch.device(at.plan.device))


def _ignore(progress: Progress) -> None:
    """The progress callback of those who gave none."""
