"""A model on this machine: whether it can run, how much of it fits, and what its speed will depend on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.doctor.check import NOTE, OK, PROBLEM, Check
from edgemoe.cli.doctor.folders import disk, read_speed
from edgemoe.cli.loading import factory
from edgemoe.cli.render import milliseconds
from edgemoe.cli.surface import EngineFactory
from edgemoe.cli.wording import in_options
from edgemoe.errors import EdgeMoEError
from edgemoe.sizes import format_bytes

if TYPE_CHECKING:
    from edgemoe.plan.plan import Plan

_MEASURED = 256 << 20
"""Bytes of memory that are read to measure its speed."""


def demo_model(engine: EngineFactory | None) -> Check:
    """Whether the model that ships with edgemoe can run."""
    return _planned("demo model", None, engine)[0]


def named_model(model: str, engine: EngineFactory | None) -> Iterator[Check]:
    """All about the model that the user names."""
    check, plan = _planned("model", model, engine)
    yield check
    rate = None
    folder, files = _files(model)
    if folder is None:
        yield Check("disk", OK, f"{model} is not on this machine, so its disk is not measured")
    else:
        yield disk(folder)
        if files:
            speed, rate = read_speed(files[-1])
            yield speed
    if plan is not None:
        yield _fit(plan)
        yield _speed(model, plan)
        yield _bottleneck(plan, rate)


def _planned(name: str, model: str | None, engine: EngineFactory | None) -> tuple[Check, Plan | None]:
    try:
        plan = factory(engine).plan_for(model)
    except EdgeMoEError as error:
        return Check(name, PROBLEM, in_options(str(error))), None  # which names the mend itself
    except (ImportError, OSError) as error:
        return Check(name, PROBLEM, f"cannot be looked at: {error}", "mend the problems above first"), None
    why = f": {in_options(plan.dtype_note)}" if plan.dtype_note else ""
    return Check(name, OK, f"{plan.model} can run on {plan.device} in {plan.dtype}{why}"), plan


def _files(model: str) -> tuple[Path | None, list[Path]]:
    """Where the model's files are, and those with weights, the smallest first; None where they are elsewhere."""
    place = Path(model).expanduser()
    if place.is_file():
        return place.parent, [place]
    if not place.is_dir():
        from edgemoe.checkpoint.hub import cached_snapshots

        # Of GGUF files, the name has a quantisation after the colon.
        place = next(iter(cached_snapshots(model.partition(":")[0])), place)
    if not place.is_dir():
        return None, []
    weights = [file for kind in ("*.safetensors", "*.gguf") for file in place.glob(kind)]
    return place, sorted((file for file in weights if file.is_file()), key=lambda file: file.stat().st_size)


def _fit(plan: Plan) -> Check:
    """How many of the experts have slots, and where the others come from."""
    share = plan.slots / max(1, plan.experts)
    found = f"{share:.0%} of the experts fit in the cache ({format_bytes(plan.cache_nbytes)})"
    if share >= 1:
        return Check("experts", OK, found)
    if plan.host_tier != "file":
        return Check("experts", OK, f"{found}; the others are in {plan.host_tier} RAM")
    way = "past the page cache, which is too small for them" if plan.direct_reads else "through the page cache"
    advice = "more free memory, a smaller --ctx-size or fewer bits (edgemoe pack) let more of them fit"
    return Check("experts", NOTE, f"{found}; the others are read from disk, {way}", advice)


def _speed(model: str, plan: Plan) -> Check:
    """What a profile says of the speed."""
    predicted = plan.predicted
    if not predicted:
        advice = f"edgemoe profile -m {model} measures when drafts pay, so that replies need not find out"
        return Check("profile", NOTE, "this model was never profiled here", advice)
    if predicted.refused:
        return Check("profile", NOTE, in_options(predicted.refused))
    return Check("profile", OK, in_options(", ".join(predicted.line()[1:])))


def _bottleneck(plan: Plan, disk_speed: float | None) -> Check:
    """What a token waits for most, by arithmetic: the bytes that it reads over the speeds that were measured."""
    missing = plan.layers * plan.top_k * plan.record_nbytes * (1 - plan.slots / max(1, plan.experts))
    weights = format_bytes(plan.nbytes_per_token)
    if plan.device != "cpu":
        where = f"the link: up to {format_bytes(missing)} cross it" if missing else f"the memory of {plan.device}"
        return Check("bottleneck", OK, f"a token reads {weights} of weights; it waits for {where}")
    memory_speed = _memory_speed()
    memory = plan.nbytes_per_token / memory_speed
    found = f"a token reads {weights} of weights, {milliseconds(memory)} at {format_bytes(memory_speed)}/s of memory"
    if not missing:
        return Check("bottleneck", OK, f"memory: {found}")
    if disk_speed is None:
        return Check("bottleneck", NOTE, f"not known: {found}; up to {format_bytes(missing)} of it from disk")
    seconds = missing / disk_speed
    found += f"; up to {format_bytes(missing)} of it from disk, {milliseconds(seconds)} at {format_bytes(disk_speed)}/s"
    if seconds < memory:
        return Check("bottleneck", OK, f"memory: {found}")
    return Check("bottleneck", NOTE, f"the disk: {found}", "a larger --expert-cache, fewer bits or a faster disk help")


def _memory_speed() -> float:
    """Bytes a second."""
    import torch

    from edgemoe.plan import machine

    return machine.memory_speed(torch.ones(_MEASURED, dtype=torch.uint8))
