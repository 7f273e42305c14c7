"""What a profile holds for: the machine that it was taken on, and how the model was run there."""

from __future__ import annotations

import platform
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from edgemoe.memory import cores

if TYPE_CHECKING:
    from edgemoe.plan import Plan

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
