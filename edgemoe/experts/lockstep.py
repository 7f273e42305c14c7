"""Several passes of one model side by side, which wait for one another at every MoE layer and share its experts.

Each pass runs the family's own forward for one sequence, so that nothing about the family needs to be
known; only the experts are computed for all of them together. The passes are greenlets: they take turns
in one thread, and a turn ends where a pass asks for experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet

Result = TypeVar("Result")


class Layer(Protocol):
    """A MoE layer as the passes that run in lockstep need it."""

    number: int

    def compute_together(
        self, hidden: Sequence[torch.Tensor], index: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The layer's outputs for several passes, whose experts are acquired once for all."""
        ...


class LayerCall(NamedTuple):
    """A pass that waits at a layer, and what it brings."""

    layer: Layer
    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor


class _Pass(Generic[Result]):
    """One task as a greenlet. `call` is None once it has ended."""

    def __init__(self, task: Callable[[], Result]) -> None:
        self.result: list[Result] = []
        self.call: LayerCall | None = None
        self._greenlet = greenlet(lambda: self.result.append(task()))

    def go_on(self, output: torch.Tensor | None) -> None:
        """Runs until the next layer or the end, handing `output` to the layer where it waits."""
        self.call = self._greenlet.switch() if output is None else self._greenlet.switch(output)

    def abandon(self) -> None:
        """Ends it where it waits."""
        self._greenlet.throw()


class LockstepPasses:
    """Where passes wait for one another. Used from one thread."""

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """The results of `tasks`, in order. When one raises, the others are ended and its error goes on."""
        passes = [_Pass(task) for task in tasks]
        try:
            for each in passes:
                each.go_on(None)
            while waiting := [each for each in passes if each.call is not None]:
                self._serve(waiting)
        except BaseException:
            for each in passes:
                each.abandon()
            raise
        return [each.result[0] for each in passes]

    def wait_for_others(
        self, layer: Layer, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The output of `layer` for the pass that asks; it waits until the others have come to it too."""
        lockstep = getcurrent().parent
        assert lockstep is not None, "only a pass that is run by a meeting can join it"
        output: torch.Tensor = lockstep.switch(LayerCall(layer, hidden, index, weights))
        return output

    @staticmethod
    def _serve(waiting: Sequence[_Pass[Result]]) -> None:
        """Computes the earliest layer at which passes wait, for all of them, and lets them go on."""
        layer = min((each.call.layer for each in waiting if each.call), key=lambda layer: layer.number)
        here = [(each, each.call) for each in waiting if each.call and each.call.layer is layer]
        outputs = layer.compute_together(
            [call.hidden for _, call in here],
            [call.chosen for _, call in here],
            [call.weights for _, call in here],
        )
        for (each, _), output in zip(here, outputs, strict=True):
            each.go_on(output)
