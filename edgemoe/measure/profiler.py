"""Measures a model on this machine: passes of many shapes, with the plan's slots and with fewer."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean, quantiles
from typing import NamedTuple

import torch

from edgemoe.cache import ExpertCache, accelerator
from edgemoe.checkpoint.blueprint import Blueprint
from edgemoe.checkpoint.tokenizer import load_tokenizer
from edgemoe.config import EngineConfig
from edgemoe.errors import PlanError, reading
from edgemoe.kernels.cpu.threads import torch_threads
from edgemoe.measure.card_speed import measure_card
from edgemoe.measure.text_passes import PROMPT, SEED, PassReading, TextPasses, task_texts
from edgemoe.model.model_runner import ModelRunner
from edgemoe.plan import fitting, machine
from edgemoe.plan.performance_model import MachineSpeed, ModelShape
from edgemoe.plan.plan import Plan
from edgemoe.plan.profile import CardSpeed, Profile, ProfileConditions, ProfilePoint
from edgemoe.planner import make_plan
from edgemoe.results import Progress
from edgemoe.runtime import Runtime

SEQUENCES = 64
"""Number of texts, and the largest batch."""
LENGTH = 288
"""Tokens of a text, unless the model's context is shorter."""
MIN_LENGTH = 2 * PROMPT
"""Minimum number of tokens of a text."""
MIN_SEQUENCES = 4
"""Minimum number of texts: fewer give too few shapes for a fit."""
SHAPES = (
    (1, 1), (1, 2), (1, 4), (1, 9), (2, 1), (4, 1), (4, 4), (8, 1), (8, 9),
    (16, 1), (16, 4), (16, 9), (32, 1), (64, 1), (64, 4), (64, 9),
)  # fmt: skip
"""Shapes, as (batch, tokens of each sequence), of the passes with the plan's slots."""
LEAN_SHAPES = ((1, 1), (1, 4), (1, 9), (8, 1), (8, 4), (16, 9), (64, 1), (64, 4))
"""Shapes of the passes with few slots, which wait for the link. Both are 24 points in all; MoESD needs 21."""
LEAN_SHARE = 0.35
"""Slots of the passes with few slots, as a share of the plan's."""
ROUNDS = 3
"""Turns of every shape: a disturbance of one turn hardly hits the same shape in the next."""
MAX_ROUNDS = 6
"""Turns of a shape whose times still differ by more than `MAX_SPREAD`."""
MAX_SPREAD = 0.15
"""See `ProfilePoint.spread`."""
TIME_BUDGET = 50.0
"""Seconds for each size of the cache. Later turns are skipped, except the first turns of the smaller half of the shapes
and of as many shapes as the fit needs."""
TURN_SECONDS = 0.25
"""Measured seconds of one turn of a shape, within the limits of `READINGS`."""
READINGS = (3, 8)
"""Minimum and maximum number of measured passes of one turn."""
WARM_UP = 8
"""Sequences times passes before the measured passes of a turn, which let the cache adapt to the text."""
FILL_TIMEOUT = 60.0
"""Seconds without an arrival after which the measurement begins although the slots are not filled."""
FILL_POLL_SECONDS = 0.05
"""Interval of checks for arrivals."""


class ProfileProgress(NamedTuple):
    """How far a profile is."""

    activity: str
    """What is being loaded or measured, in a few words."""
    done: float
    """Share of the whole, from 0 to 1."""


@dataclass
class _Span:
    """A part of a profile, from one share of the whole to another, and whom to tell."""

    told: Callable[[ProfileProgress], None]
    start: float
    end: float

    def loading(self, progress: Progress) -> None:
        """Some of the model is loaded."""
        self.tell(f"loading {progress.stage}", progress.done / max(1, progress.total))

    def tell(self, activity: str, done: float) -> None:
        """A share `done` of this part is done, and `activity` is next."""
        self.told(ProfileProgress(activity, self.start + (self.end - self.start) * min(1.0, done)))


@dataclass
class ProfilingRun:
    """A loaded model, and the texts that its passes run."""

    plan: Plan
    runtime: Runtime
    passes: TextPasses
    runner: ModelRunner
    sequences: int
    """Number of texts."""


@contextmanager
def profiling_run(
    blueprint: Blueprint, config: EngineConfig, on_progress: Callable[[Progress], None], seed: int = SEED
) -> Iterator[ProfilingRun]:
    """A context with the model loaded, and texts chosen by `seed`. No state is kept, since its heat would be theirs.

    Raises PlanError if the model or the texts do not fit, and for families without rollback, which never speculate.
    """
    limit, name = min(LENGTH, blueprint.context_limit or LENGTH), blueprint.checkpoint.name
    if limit < MIN_LENGTH:
        raise PlanError(f"{name} has a context of {limit} tokens: a profile needs texts of at least {MIN_LENGTH}")
    config = replace(config, speculate="off", draft_model=None, cpu_share="off", state_folder="none")
    config = replace(config, context=limit, batch=SEQUENCES)
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
    """Waits for the experts that loading put on the link, so that the measured passes wait only for their own."""
    nbytes, total = cache.store.mean_nbytes, cache.prefetching
    left, arrived = total, time.perf_counter()
    while left and time.perf_counter() - arrived < FILL_TIMEOUT:
        time.sleep(FILL_POLL_SECONDS)
        if cache.prefetching < left:
            left, arrived = cache.prefetching, time.perf_counter()
            on_progress(Progress("experts", (total - left) * nbytes, total * nbytes))


def take_profile(
    blueprint: Blueprint, config: EngineConfig, on_progress: Callable[[ProfileProgress], None] | None = None
) -> Profile:
    """Measures the model and fits the performance model, in a minute or two. Loads the model up to twice.

    `on_progress` is called before each turn of a shape, by the caller's thread, and while loading, also by others.
    What it raises in the caller's thread ends the measurement. Raises PlanError as `profiling_run` does, and
    CheckpointError if a file cannot be read.
    """
    with reading(blueprint.checkpoint.name):
        return _profile(blueprint, config, on_progress or _ignore)


def _profile(blueprint: Blueprint, config: EngineConfig, told: Callable[[ProfileProgress], None]) -> Profile:
    with profiling_run(blueprint, config, _Span(told, 0.0, 0.05).loading) as full:
        plan, bulk_from = full.plan, full.runner.sequential.bulk_from
        lean = max(1, int(LEAN_SHARE * plan.slots))
        shapes = sum(batch <= full.sequences for batch, _ in SHAPES)
        if lean == plan.slots and shapes < fitting.MIN_POINTS:
            raise PlanError(
                f"{plan.model} with 1 slot has {shapes} kinds of passes to measure, of which a profile needs "
                f"{fitting.MIN_POINTS}: give expert_cache=2 or more"
            )
        points = measure(full, SHAPES, fitting.MIN_POINTS, _Span(told, 0.05, 0.5).tell)
        told(ProfileProgress("memory and arithmetic", 0.5))
        speed = _ceilings(blueprint, full)
        card = _card_speed(blueprint, full)
    if lean < plan.slots:
        with profiling_run(blueprint, lean_config(config, plan, lean), _Span(told, 0.52, 0.57).loading) as few:
            points += measure(few, LEAN_SHAPES, fitting.MIN_POINTS - len(points), _Span(told, 0.57, 0.98).tell)
            speed = replace(speed, link=_link_speed(few))
            plan = few.plan
    told(ProfileProgress("fitting", 0.98))
    model = fitting.fit(shape_of(blueprint, plan), speed, points, bulk_from)
    taken = datetime.datetime.now().astimezone().date().isoformat()
    # The plan with few slots has missing experts, and so says where they come from.
    return Profile(taken, ProfileConditions.of(plan), model, tuple(points), card)


def lean_config(config: EngineConfig, plan: Plan, slots: int) -> EngineConfig:
    """`config` with `slots` slots, fewer than in `plan`, and missing experts read as by that plan, if it has any."""
    if plan.slots < plan.experts:
        config = replace(config, file_reads="direct" if plan.direct_reads else "cached")
    return replace(config, expert_cache=slots)


def measure(
    at: ProfilingRun,
    shapes: Sequence[tuple[int, int]],
    min_shapes: int = 0,
    told: Callable[[str, float], None] = lambda activity, done: None,
) -> list[ProfilePoint]:
    """A point for each of `shapes` for which there are enough sequences and time.

    At least `min_shapes` of them are measured however long it takes, if there are enough sequences. `told` is given
    what is measured next, and the share that is done.
    """
    readings: dict[tuple[int, int], list[PassReading]] = {}
    # Small ones first, so that the largest are skipped if time runs short.
    todo = sorted((shape for shape in shapes if shape[0] <= at.sequences), key=math.prod)
    required = max(len(todo) // 2, min_shapes)
    slots = f"{at.plan.slots / at.plan.experts:.0%} of the experts"
    started = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        for number, (batch, tokens) in enumerate(todo):
            if turn >= ROUNDS and spread(readings.get((batch, tokens), ())) <= MAX_SPREAD:
                continue
            spent = (time.perf_counter() - started) / max(TIME_BUDGET, 1e-9)
            if spent > 1 and (turn or len(readings) >= required):
                break
            told(f"{batch} x {tokens} tokens, {slots}", max((turn + number / len(todo)) / ROUNDS, spent))
            readings.setdefault((batch, tokens), []).extend(_turn(at, turn, batch, tokens))
    return [point(at.plan, *shape, found) for shape, found in readings.items()]


def spread(readings: Sequence[PassReading]) -> float:
    """How wide the middle half of the times is, as a share of the median; 0 for fewer than three."""
    if len(readings) < 3:
        return 0.0
    low, middle, high = quantiles((each.seconds for each in readings), n=4, method="inclusive")
    return (high - low) / middle


def _turn(at: ProfilingRun, turn: int, batch: int, tokens: int) -> list[PassReading]:
    """The measured passes of one turn of a shape. Each turn starts at another text."""
    first = turn % ROUNDS * at.sequences // ROUNDS + batch
    for _ in range(max(1, WARM_UP // batch)):
        at.passes.run(first, batch, tokens)
    found: list[PassReading] = []
    low, high = READINGS
    while len(found) < low or (len(found) < high and sum(each.seconds for each in found) < TURN_SECONDS):
        found.append(at.passes.run(first, batch, tokens))
    return found


def point(plan: Plan, batch: int, tokens: int, readings: Sequence[PassReading]) -> ProfilePoint:
    """The mean of the middle half of `readings`, by seconds; its times and misses are of the same passes."""
    ordered = sorted(readings)
    # Of three, the one in the middle: a single one that was disturbed decides nothing.
    quarter = (len(ordered) + 1) // 4
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
        spread=spread(readings),
    )


def shape_of(blueprint: Blueprint, plan: Plan) -> ModelShape:
    """The sizes that determine the time of a pass; means where layers differ."""
    return ModelShape(
        layers=plan.layers,
        experts=round(plan.experts / plan.layers),
        top_k=plan.top_k,
        record_nbytes=plan.record_nbytes,
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
            memory=machine.memory_speed(at.runtime.cache.pool.used_memory),
            arithmetic=machine.product_speed(math.prod(rows), columns, blueprint.dtype, device),
            link=_link_speed(at),
        )


def _card_speed(blueprint: Blueprint, at: ProfilingRun) -> CardSpeed | None:
    """That of the device; None on a CPU."""
    if not accelerator.is_accelerator(at.plan.device):
        return None
    return measure_card(at.runtime, blueprint.experts_modules[0], at.plan.top_k)


def _link_speed(at: ProfilingRun) -> float:
    """Bytes per second of the link while it was busy; those of a plain copy if nothing was moved."""
    if at.plan.link_gbps is not None:
        return at.plan.link_gbps * 1e9
    link = at.runtime.link
    if link.bytes_moved and link.busy_seconds:
        return link.bytes_moved / link.busy_seconds
    return machine.copy_speed(at.plan.slot_nbytes, torch.device(at.plan.device))


def _ignore(progress: ProfileProgress) -> None:
    """The progress callback where none was given."""
