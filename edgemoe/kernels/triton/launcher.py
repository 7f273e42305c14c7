"""Launches of kernels, where one can be seen or taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from edgemoe.cache import accelerator


class Launch(NamedTuple):
    """One launch of a kernel: `run` queues it on the current stream of the device."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def run(self) -> None:
        """Queues the kernel."""
        self.kernel[self.grid](*self.args, **self.constants)


class Launcher:
    """Queues kernels. One for each engine."""

    def __init__(self, device: torch.device | None = None) -> None:
        """For kernels on `device`, whichever one the caller has selected; None for the interpreter."""
        self._device = device
        self.observer: Callable[[Launch], None] | None = None
        """Takes launches instead of the device: for captures that are replayed by the host, and for counts."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Queues `kernel` with `grid` programs. `args` are its tensors and numbers, `constants` its `constexpr`."""
        launch = Launch(kernel, grid, args, constants)
        if self.observer is not None:
            self.observer(launch)
        elif self._device is None:
            launch.run()
        else:
            # Triton launches on the device that PyTorch has selected.
            with accelerator.selected(self._device):
                launch.run()
