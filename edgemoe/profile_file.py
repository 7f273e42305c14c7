"""The profile of a checkpoint on a machine: kept when it was taken, and refused where it does not hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from edgemoe.errors import PlanError
from edgemoe.performance_model import Locality, MachineSpeed, ModelShape, PerformanceModel, Routing, Times
from edgemoe.profile_conditions import ProfileConditions
from edgemoe.profile_point import ProfilePoint
from edgemoe.state_folder import StateFolder

NAME = "profile.json"
FORMAT = "edgemoe profile"
VERSION = 2
"""1 did not tell where missing experts came from. A profile of another version counts as none."""
MOST_NBYTES = 1 << 20
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


def write(state: StateFolder, profile: Profile) -> None:
    """Keeps `profile` in the place of the one before. Raises OSError where that cannot be done."""
    state.write(NAME, json.dumps(profile.to_dict(), indent=1).encode())


def read(state: StateFolder, here: ProfileConditions) -> Profile | None:
    """The profile that is kept; None without a sound one.

    Raises ForeignProfile where it was not taken under the conditions `here`: its seconds say nothing then.
    """
    data = state.read(NAME, MOST_NBYTES)
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
