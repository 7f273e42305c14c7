"""The models on this machine, and whether each would run here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgemoe.checkpoint.catalog import CatalogEntry, find
from edgemoe.config import EngineConfig
from edgemoe.errors import EdgeMoEError, PlanError, told_as
from edgemoe.planner import make_plan


@dataclass(frozen=True)
class FoundModel:
    """A checkpoint that was found, and what the plan for it says with default settings and the memory free now."""

    model: str
    """What to give to `Engine.load`."""
    nbytes: int
    """Bytes of its files."""
    family: str | None
    """Its `model_type` in transformers; None where that cannot be read."""
    formats: tuple[str, ...]
    """The names of the formats of its experts, most of them first; empty where they cannot be read."""
    resident: float | None
    """The share of its experts that would have slots, above 0 and at most 1; None where it would not run."""
    problem: str = ""
    """Why it would not; empty where it would."""

    @property
    def runs(self) -> bool:
        """Whether it would run here."""
        return self.resident is not None


def find_models(folders: Sequence[str | os.PathLike[str]] = (), *, hub_cache: bool = True) -> Iterator[FoundModel]:
    """The models in the Hugging Face cache, unless `hub_cache` is false, and in `folders`, one by one.

    A folder is a checkpoint itself, or has checkpoints and GGUF files at most two levels below it. Reads no weights and
    never uses the network; a large model takes a second or more. What cannot be run is found with its `problem`, also
    a folder that does not exist.
    """
    # One after the other: what is known of a large checkpoint takes memory.
    for entry in find(folders, hub_cache=hub_cache):
        yield _planned(entry)


def _planned(entry: CatalogEntry) -> FoundModel:
    resident, problem = None, entry.problem
    if entry.blueprint is not None:
        try:
            with told_as(lambda why: PlanError(f"it cannot be planned ({why})"), of_files=True):
                plan = make_plan(entry.blueprint, EngineConfig())
                resident = plan.slots / plan.experts
        except EdgeMoEError as error:
            problem = str(error).removeprefix(f"{entry.model} ")
    return FoundModel(entry.model, entry.nbytes, entry.family, entry.formats, resident, problem)
