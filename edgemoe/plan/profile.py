"""The profile of a checkpoint on a machine: measured points, the conditions that they hold under, and the file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import torch

from edgemoe.cache import accelerator
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.errors import PlanError
from edgemoe.plan.machine import cores, gpu_nbytes, processor_name
from edgemoe.plan.performance_model import Locality, MachineSpeed, ModelShape, PerformanceModel, Routing, Times

if TYPE_CHECKING:
    from edgemoe.plan.plan import Plan


@dataclass(frozen=True)
class ProfilePoint:
    """The middle of a few passes over `tokens` tokens of each of `batch` sequences. Seconds are per pass."""

    batch: int
    tokens: int
    """Tokens of each sequence: 1 in a plain step, more in a verification."""
    cache_share: float
    """Slots over experts, from 0 to 1."""
    seconds: float
    """Time of the pass over the model."""
    experts: float
    """Mean number of experts per layer that the pass requested."""
    misses: float
    """Requested experts of all layers that were not resident."""
    draft_seconds: float
    """Time of drafting for all sequences before the pass; 0 for a plain step."""
    reject_seconds: float
    """Time of sampling and rollback for all sequences after the pass."""
    spread: float = 0.0
    """How much the passes differed: the middle half of their times is this share of the median wide."""

    @property
    def total(self) -> int:
        """Tokens of the pass."""
        return self.batch * self.tokens


_LABELS = {
    "processor": "processor",
    "cores": "cores",
    "ram_gib": "GiB of RAM",
    "device": "device",
    "device_gib": "GiB of the device's memory",
    "torch": "PyTorch",
    "dtype": "dtype",
    "formats": "formats",
    "threads": "threads",
    "link_gbps": "link",
    "direct_reads": "reads",
    "host_tier": "experts",
}
"""How messages call each condition."""
_MISS_CONDITIONS = ("direct_reads", "host_tier")
"""Conditions that matter only where experts can be missing."""


@dataclass(frozen=True)
class ProfileConditions:
    """The machine and the settings that determine the speed of a model. Each combination needs a profile of its own."""

    processor: str
    cores: int
    ram_gib: int
    device: str
    """The GPU's name; "cpu" without a GPU."""
    device_gib: int
    """The GPU's memory, since some are sold with less under the same name; 0 without a GPU, or where no driver says."""
    torch: str
    """The version of PyTorch."""
    dtype: str
    formats: str
    """Those of the experts (see `Plan.formats`) and of the other matrices, where they are quantised."""
    threads: int
    link_gbps: float | None
    """Bandwidth of a simulated link in GB/s; None for the real one."""
    direct_reads: bool | None
    """Whether reads of missing experts bypass the page cache; None where experts cannot be missing or are not read."""
    host_tier: str | None
    """Where missing experts come from (see `Plan.host_tier`); None where experts cannot be missing."""

    @classmethod
    def of(cls, plan: Plan) -> ProfileConditions:
        """The conditions of an engine with `plan` on this machine."""
        misses = plan.slots < plan.experts
        device = accelerator.device_name(plan.device) if accelerator.is_accelerator(plan.device) else plan.device
        return cls(
            processor=processor_name(),
            cores=cores(),
            ram_gib=round(psutil.virtual_memory().total / (1 << 30)),
            device=device,
            device_gib=round(gpu_nbytes(device) / (1 << 30)),
            torch=torch.__version__,
            dtype=plan.dtype,
            formats=" ".join((*plan.formats, plan.dense_format)).strip(),
            threads=plan.threads,
            link_gbps=plan.link_gbps,
            # Records in RAM are read before the first pass.
            direct_reads=plan.direct_reads if misses and plan.host_tier == "file" else None,
            host_tier=plan.host_tier if misses else None,
        )

    def difference(self, here: ProfileConditions) -> str | None:
        """The conditions that differ from those `here`, in words; None where a profile also holds here.

        How missing experts are read counts only if experts can be missing under both.
        """
        differing = [entry.name for entry in fields(self) if self._differs(here, entry.name)]
        if not differing:
            return None
        return ", ".join(f"{_LABELS[name]} {_text(self, name)}, not {_text(here, name)}" for name in differing)

    def _differs(self, here: ProfileConditions, name: str) -> bool:
        values = getattr(self, name), getattr(here, name)
        return values[0] != values[1] and not (name in _MISS_CONDITIONS and None in values)


def _text(conditions: ProfileConditions, name: str) -> str:
    value = getattr(conditions, name)
    if name == "link_gbps":
        return "the real one" if value is None else f"of {value:g} GB/s"
    if name == "direct_reads":
        return f"{'past' if value else 'through'} the page cache"
    if name == "host_tier":
        return "in their files" if value == "file" else f"in {value} RAM"
    return str(value)


NAME = "profile.json"
FORMAT = "edgemoe profile"
VERSION = 5
"""Version 4 did not record how much times differed. Files of other versions are ignored."""
MAX_NBYTES = 1 << 20
"""Upper bound of a file's size; a larger one is ignored."""
_PARTS = {"shape": ModelShape, "speed": MachineSpeed, "routing": Routing, "locality": Locality, "times": Times}
Part = TypeVar("Part")


class ForeignProfile(PlanError):
    """The stored profile was taken on another machine, or with other settings."""


@dataclass(frozen=True)
class CardSpeed:
    """What was measured of a device that is no CPU: bytes per second, and seconds."""

    pcie: float
    """Copies of records from page-locked RAM to the device."""
    pcie_beside: float
    """The same while the CPU's kernels read the same RAM."""
    vram: float
    """Reading the device's memory."""
    launch_seconds: float
    """Time of the host to queue one of PyTorch's kernels."""
    read_seconds: float
    """Time of the host until it has what a device that has nothing else to do tells it: one token's choice of experts.
    """
    cpu: float
    """The CPU's kernels on records in RAM; 0 where there are none for the experts' format."""
    cpu_beside: float
    """The same while records are copied to the device."""

    @property
    def cpu_share(self) -> float:
        """The share of missing experts, from 0 to 1, that the CPU would compute while the others are copied."""
        return self.cpu_beside / max(self.cpu_beside + self.pcie_beside, 1e-9)


@dataclass(frozen=True)
class Profile:
    """Measured points, the conditions of the measurement, and the performance model fitted to the points."""

    taken: str
    """The day, as 2026-01-31."""
    conditions: ProfileConditions
    model: PerformanceModel
    points: tuple[ProfilePoint, ...]
    card: CardSpeed | None = None
    """Of the device; None on a CPU."""

    def to_dict(self) -> dict[str, Any]:
        """The profile as a JSON object."""
        header = {"format": FORMAT, "version": VERSION, "taken": self.taken, "conditions": asdict(self.conditions)}
        points = [asdict(point) for point in self.points]
        return header | asdict(self.model) | {"card": asdict(self.card) if self.card else None, "points": points}


def write_profile(state: StateFolder, profile: Profile) -> None:
    """Stores `profile` in place of any earlier one. Raises OSError if that fails."""
    state.write(NAME, json.dumps(profile.to_dict(), indent=1).encode())


def read_profile(state: StateFolder, here: ProfileConditions) -> Profile | None:
    """The stored profile; None without a valid one.

    Raises ForeignProfile if it was taken under other conditions than `here`: its times do not hold then.
    """
    data = state.read(NAME, MAX_NBYTES)
    profile = _parsed(data) if data is not None else None
    if profile is None:
        return None
    difference = profile.conditions.difference(here)
    if difference is not None:
        raise ForeignProfile(
            f"the profile of {profile.taken} does not apply here ({difference}): "
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
        card = None if kept["card"] is None else _part(CardSpeed, kept["card"])
        return Profile(str(kept["taken"]), conditions, PerformanceModel(**parts), points, card)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _part(kind: type[Part], values: Mapping[str, Any]) -> Part:
    """A dataclass of finite numbers, each at least 0. Raises ValueError, TypeError or KeyError for anything else."""
    numbers = {entry.name: values[entry.name] for entry in fields(kind)}  # type: ignore[arg-type]
    if not all(type(value) in (int, float) and math.isfinite(value) and value >= 0 for value in numbers.values()):
        raise ValueError("a profile has finite numbers, each at least 0")
    return kind(**numbers)
