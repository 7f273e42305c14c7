"""A section of the run on a card: what it is given, what it gives back, and where it can run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class OnCpu(Enum):
    """When a section runs on a machine without a card."""

    ALWAYS = "always"
    SMALL = "small"
    """In a dry run with tiny shapes."""
    NEVER = "never"


@dataclass(frozen=True)
class Section:
    """A module of this package with a function `measure(target: Target) -> Found`. It is imported when it runs."""

    name: str
    module: str
    seconds: float
    """How long it takes on a card, generously."""
    on_cpu: OnCpu = OnCpu.SMALL


@dataclass(frozen=True)
class Target:
    """The device that the sections run on."""

    device: str
    """`cuda:0` or `cpu`."""
    small: bool
    """Tiny shapes: a dry run."""
    deadline: float
    """The time (perf_counter) at which the run has to be over."""

    @property
    def cuda(self) -> bool:
        """Whether it is a card."""
        return self.device.startswith("cuda")

    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.perf_counter()


@dataclass(frozen=True)
class Found:
    """What a section found: its figures, as JSON can hold them, and a sentence for each thing that is wrong."""

    figures: dict[str, Any]
    faults: list[str] = field(default_factory=list)


class SkippedError(Exception):
    """Raised by a section that cannot run here; its message says why."""
