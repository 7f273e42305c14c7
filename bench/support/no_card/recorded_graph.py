"""Stands in for graphs of a card: operations are recorded while they run on the CPU, and run again by `replay`.

As on a card, what the host computes in between is not recorded: numbers, shapes and addresses stay what they were at
the capture. A value that the host reads during a capture raises RuntimeError, as it does there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from edgemoe.kernels.triton.launcher import Launch, Launcher

HOST_READS = {"_local_scalar_dense", "item", "equal", "is_nonzero"}
"""Operations by which the host learns a value of a tensor."""


class RecordedGraph:
    """Has the methods of `accelerator.Graph`."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._steps: list[Callable[[], None]] = []
        self._mode = _Recorder(self._steps)
        self.replays = 0

    def begin(self, pool: Any = None) -> None:
        """See `accelerator.Graph`; operations run as they are captured, which no reader of their results notices."""
        self._launcher.observer = self._launched
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """See `accelerator.Graph`."""
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._launcher.observer = None

    def replay(self) -> None:
        """See `accelerator.Graph`."""
        self.replays += 1
        with torch.inference_mode():
            for step in self._steps:
                step()

    def _launched(self, launch: Launch) -> None:
        self._steps.append(launch.run)


class RecordingCapturer:
    """Has the methods of `model.pass_graph.Capturer`."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.graphs: list[RecordedGraph] = []
        """All that were made."""

    def graph(self) -> RecordedGraph:
        """An empty graph."""
        self.graphs.append(RecordedGraph(self._launcher))
        return self.graphs[-1]

    def pool(self) -> None:
        """Nothing: the memory of the CPU needs none."""

    def make_room(self) -> None:
        """Nothing is kept."""

    @contextmanager
    def stream(self) -> Iterator[None]:
        """The CPU has one order of work."""
        with nullcontext():
            yield


class _Recorder(TorchDispatchMode):
    def __init__(self, steps: list[Callable[[], None]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in HOST_READS:
            raise RuntimeError(f"operation not permitted while capturing: {func}")
        found = func(*args, **kwargs)
        outputs = [each for each in tree_flatten(found)[0] if isinstance(each, torch.Tensor)]
        inputs = {_storage(each) for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)}
        mutates = any(arg.alias_info is not None and arg.alias_info.is_write for arg in func._schema.arguments)
        fresh = [_storage(each) not in inputs for each in outputs]
        if mutates or any(fresh):
            self._steps.append(_again(func, args, kwargs, outputs if any(fresh) and not mutates else []))
        return found


def _again(func: Any, args: Any, kwargs: dict[str, Any], outputs: list[torch.Tensor]) -> Callable[[], None]:
    """Runs an operation once more, and puts its results where those of the capture are."""

    def run() -> None:
        found = [each for each in tree_flatten(func(*args, **kwargs))[0] if isinstance(each, torch.Tensor)]
        for target, value in zip(outputs, found, strict=False):
            target.copy_(value)

    return run


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
