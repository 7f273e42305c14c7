"""The profile of a checkpoint on a machine: measured points, the conditions they hold for, and the file."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import torch

from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.errors import PlanError
from edgemoe.plan.machine import cores
from edgemoe.plan.performance_model import Locality, MachineSpeed, ModelShape, PerformanceModel, Routing, Times

if TYPE_CHECKING:
    from edgemoe.plan.plan import Plan


@dataclass(frozen=True)
class ProfilePoint:
    """The middle of a few passes that ran `tokens` tokens of each of `batch` sequences. Seconds are of one pass."""

    batch: int
    tokens: int
    """Of each sequence: 1 is a plain step, more a verification."""
    cache_share: float
    """Share of the experts that there were slots for, from 0 to 1."""
    seconds: float
    """Of the pass over the model."""
    experts: float
    """Experts of a layer that the pass asked for, on the average."""
    misses: float
    """Experts of all layers that were asked for and not resident."""
    draft_seconds: float
    """Of looking drafts up for all sequences before the pass; 0 for a plain step."""
    reject_seconds: float
    """Of choosing tokens after it, and of dropping what was drafted in vain, for all sequences."""

    @property
    def total(self) -> int:
        """Tokens of the pass."""
        return self.batch * self.tokens


_SAID = {
    "processor": "processor",
    "cores": "cores",
    "ram_gib": "GiB of RAM",
    "device": "device",
    "torch": "PyTorch",
    "dtype": "dtype",
    "threads": "threads",
    "link_gbps": "link",
    "direct_reads": "reads",
    "host_tier": "experts",
}
_OF_MISSES = ("direct_reads", "host_tier")


@dataclass(frozen=True)
class ProfileConditions:
    """A machine and the settings that decide how fast a model runs on it. Two that differ need two profiles."""

    processor: str
    cores: int
    ram_gib: int
    device: str
    """The device's name; "cpu" without one."""
    torch: str
    dtype: str
    threads: int
    link_gbps: float | None
    """Of a simulated link; None for the real one."""
    direct_reads: bool | None
    """Whether a missing expert is read past the page cache; None where none can be missing, or none is read."""
    host_tier: str | None
    """Where a missing expert comes from (see `Plan`); None where none can be missing."""

    @classmethod
    def of(cls, plan: Plan) -> ProfileConditions:
        """Those of this machine, for an engine with this plan."""
        cuda = plan.device.startswith("cuda")
        misses = plan.slots < plan.experts
        return cls(
            processor=_processor(),
            cores=cores(),
            ram_gib=round(psutil.virtual_memory().total / (1 << 30)),
            device=torch.cuda.get_device_name(plan.device) if cuda else plan.device,
            torch=torch.__version__,
            dtype=plan.dtype,
            threads=plan.threads,
            link_gbps=plan.link_gbps,
            # Records that wait in RAM were read before anything runs.
            direct_reads=plan.direct_reads if misses and plan.host_tier == "file" else None,
            host_tier=plan.host_tier if misses else None,
        )

    def difference(self, here: ProfileConditions) -> str | None:
        """What keeps a profile under these conditions from being used `here`, in words; None where nothing does.

        The way of missing experts counts only where some can be missing on both sides.
        """
        differing = [entry.name for entry in fields(self) if self._differs(here, entry.name)]
        if not differing:
            return None
        return ", ".join(f"{_SAID[name]} {_text(self, name)}, not {_text(here, name)}" for name in differing)

    def _differs(self, here: ProfileConditions, name: str) -> bool:
        values = getattr(self, name), getattr(here, name)
        return values[0] != values[1] and not (name in _OF_MISSES and None in values)


def _text(conditions: ProfileConditions, name: str) -> str:
    value = getattr(conditions, name)
    if name == "link_gbps":
        return "the real one" if value is None else f"of {value:g} GB/s"
    if name == "direct_reads":
        return f"{'past' if value else 'through'} the page cache"
    if name == "host_tier":
        return "in their files" if value == "file" else f"in {value} RAM"
    return str(value)


def _processor() -> str:
    """The processor's model as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


NAME = "profile.json"
FORMAT = "edgemoe profile"
VERSION = 2
"""1 did not tell where missing experts came from. A profile of another version counts as none."""
MAX_NBYTES = 1 << 20
"""More than any number of points takes that somebody would wait for."""
_PARTS = {"shape": ModelShape, "speed": MachineSpeed, "routing": Routing, "locality": Locality, "times": Times}
Part = TypeVar("Part")


class ForeignProfile(PlanError):
    """The profile that is kept was taken on another machine, or with other settings."""


@dataclass(frozen=True)
class Profile:
    """What was measured, under which conditions, and the model that was fitted to it."""

    taken: str
    """The day, as 2026-01-31."""
    conditions: ProfileConditions
    model: PerformanceModel
    points: tuple[ProfilePoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON can hold it."""
        header = {"format": FORMAT, "version": VERSION, "taken": self.taken, "conditions": asdict(self.conditions)}
        return header | asdict(self.model) | {"points": [asdict(point) for point in self.points]}


def write_profile(state: StateFolder, profile: Profile) -> None:
    """Keeps `profile` in the place of the one before. Raises OSError where that cannot be done."""
    state.write(NAME, json.dumps(profile.to_dict(), indent=1).encode())


def read_profile(state: StateFolder, here: ProfileConditions) -> Profile | None:
    """The profile that is kept; None without a sound one.

    Raises ForeignProfile where it was not taken under the conditions `here`: its seconds say nothing then.
    """
    data = state.read(NAME, MAX_NBYTES)
    profile = _parsed(data) if data is not None else None
    if profile is None:
        return None
    difference = profile.conditions.difference(here)
    if difference is not None:
        raise ForeignProfile(
            f"the profile of {profile.taken} was taken elsewhere or otherwise ({difference}): "
            "take one with edgemoe profile and the same options"
        )
    return profile


def _parsed(data: bytes) -> Profile | None:
    try:
        kept = json.loads(data)
        if not isinstance(kept, dict) or (kept.get("format"), kept.get("version")) != (FORMAT, VERSION):
            return None
        parts: dict[str, Any] = {name: _part(kind, kept[name]) for name, kind in _PARTS.items()}
        points = tuple(_part(ProfilePoint, point) for point in kept["points"])
        conditions = ProfileConditions(**kept["conditions"])
        return Profile(str(kept["taken"]), conditions, PerformanceModel(**parts), points)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _part(kind: type[Part], values: Mapping[str, Any]) -> Part:
    """A dataclass of finite numbers. Raises ValueError, TypeError or KeyError for anything else."""
    numbers = {entry.name: values[entry.name] for entry in fields(kind)}  # type: ignore[arg-type]
    if not all(type(value) in (int, float) and math.isfinite(value) and value >= 0 for value in numbers.values()):
        raise ValueError("a profile is made of finite numbers")
    return kind(**numbers)
