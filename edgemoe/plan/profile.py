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
from edgemoe.checkpoint.foreign.foreign_json import parse_json
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.errors import PlanError, reason
from edgemoe.plan.machine import cores, gpu_nbytes, processor_name
from edgemoe.plan.performance_model import Locality, MachineSpeed, ModelShape, PerformanceModel, Routing, Times
from edgemoe.values import shown

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
MAX_NUMBER, MAX_TEXT = 1e18, 200
"""Of any number in it, and characters of any text."""
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
    """The stored profile; None without one of this version.

    Raises ForeignProfile if it is damaged, or was taken under other conditions than `here`: its times do not hold then.
    """
    data = state.read(NAME, MAX_NBYTES)
    try:
        profile = parse_profile(data) if data is not None else None
    except ValueError as error:
        raise ForeignProfile(
            f"the profile in {state.path} is damaged ({error}) and is not used: take one with edgemoe profile"
        ) from error
    if profile is None:
        return None
    difference = profile.conditions.difference(here)
    if difference is not None:
        raise ForeignProfile(
            f"the profile of {profile.taken} does not apply here ({difference}): "
            "take one with edgemoe profile and the same options"
        )
    return profile


def parse_profile(data: bytes) -> Profile | None:
    """The profile in the file's content `data`; None for another version.

    Raises ValueError for anything that cannot be computed with.
    """
    kept = parse_json(data, finite=True)
    if not isinstance(kept, dict) or (kept.get("format"), kept.get("version")) != (FORMAT, VERSION):
        return None
    try:
        parts: dict[str, Any] = {name: _part(kind, kept[name]) for name, kind in _PARTS.items()}
        points = tuple(_part(ProfilePoint, point) for point in kept["points"])
        card = None if kept["card"] is None else _part(CardSpeed, kept["card"])
        conditions = _conditions(kept["conditions"])
        model = PerformanceModel(**parts)
        _try(model)
        taken = str(kept["taken"])[:MAX_TEXT]
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(reason(error)) from error
    return Profile(taken, conditions, model, points, card)


def _conditions(values: Mapping[str, Any]) -> ProfileConditions:
    """The conditions in a file. Raises ValueError or TypeError unless each has its type."""
    found = ProfileConditions(**values)
    texts = (str, type(None))
    for entry in fields(found):
        value = getattr(found, entry.name)
        # Annotations are texts here.
        kinds = {"int": (int,), "str": (str,), "str | None": texts}.get(str(entry.type), (int, float, bool, type(None)))
        if not isinstance(value, kinds) or (isinstance(value, str) and len(value) > MAX_TEXT):
            raise ValueError(f"{entry.name} is {shown(value)}")
    return found


def _try(model: PerformanceModel) -> None:
    """Raises ValueError or ArithmeticError unless the model gives times."""
    for batch in (1, 1024):
        for share in (0.0, 0.5, 1.0):
            rate = model.hit_rate(share, batch)
            found = [model.token_cost(batch, rate), model.tokens_per_second(batch, rate, 8, 2.0)]
            if not all(math.isfinite(value) and value > 0 for value in found):
                raise ValueError("its model gives no times")


def _part(kind: type[Part], values: Mapping[str, Any]) -> Part:
    """A dataclass of numbers from 0 to 1e18. Raises ValueError, TypeError or KeyError for anything else."""
    numbers: dict[str, Any] = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        value = values[entry.name]
        if type(value) not in (int, float) or not 0 <= value <= MAX_NUMBER:
            raise ValueError(f"{entry.name} is {shown(value)}")
        # Integers raised to the power of large ones take no end of time. Annotations are texts here.
        numbers[entry.name] = float(value) if str(entry.type) == "float" else int(value)
    return kind(**numbers)
