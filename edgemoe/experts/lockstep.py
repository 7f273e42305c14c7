"""Several passes of one model in lockstep: they wait for one another at every MoE layer and share its experts.

Each pass runs the family's own forward for one sequence; only the experts are computed for all of them together. So
lockstep works for every family. The passes are greenlets: they take turns in one thread, and a pass yields when it
calls a MoE layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet

Result = TypeVar("Result")


class Layer(Protocol):
    """What lockstep needs of a MoE layer."""

    number: int

    def compute_together(
        self, hidden: Sequence[torch.Tensor], index: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The layer's output for each pass. Each argument has one tensor per pass, shaped as for `wait_for_others`."""
        ...


class LayerCall(NamedTuple):
    """A pass's call of a layer, not computed yet."""

    layer: Layer
    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor


class _Pass(Generic[Result]):
    """One task as a greenlet. `call` is the layer call that it waits for, None before the first and after the last."""

    def __init__(self, task: Callable[[], Result]) -> None:
        self.result: list[Result] = []
        self.call: LayerCall | None = None
        self._greenlet = greenlet(lambda: self.result.append(task()))

    def resume(self, output: torch.Tensor | None) -> None:
        """Runs until the next layer call or the end. `output` is the result of the call that it waits for."""
        self.call = self._greenlet.switch() if output is None else self._greenlet.switch(output)

    def abandon(self) -> None:
        """Ends the task at the call that it waits for."""
        self._greenlet.throw()


class OutOfStep(Exception):
    """A pass would have overtaken the one that it has to come after."""


class LockstepPasses:
    """Runs passes in lockstep. Used from one thread."""

    def __init__(self) -> None:
        self.shares_linears = False
        """Whether large linear layers are waited at as well as MoE layers, for those who ask."""

    def run(
        self,
        tasks: Sequence[Callable[[], Result]],
        after: Sequence[int | None] = (),
        settle: Callable[[int], None] | None = None,
    ) -> list[Result]:
        """The results of `tasks`, in order. When one raises, the others are abandoned and the error is raised.

        `after` has, for each task, the number of one before it that must be ahead of it at all times, or None:
        `OutOfStep` is raised where it would not be. `settle` is called with a task's number whenever it waits or ends.
        """
        passes = [_Pass(task) for task in tasks]
        numbers = {each: number for number, each in enumerate(passes)}

        def resume(each: _Pass[Result], output: torch.Tensor | None) -> None:
            each.resume(output)
            number = numbers[each]
            if settle is not None:
                settle(number)
            before = after[number] if after else None
            if before is not None and not _same_place(passes[before].call, each.call):
                raise OutOfStep

        try:
            for each in passes:
                resume(each, None)
            while waiting := [each for each in passes if each.call is not None]:
                for each, output in self._served(waiting):
                    resume(each, output)
        except BaseException:
            for each in passes:
                each.abandon()
            raise
        return [each.result[0] for each in passes]

    @property
    def inside(self) -> bool:
        """Whether the caller is a task of `run`."""
        return getcurrent().parent is not None

    def wait_for_others(
        self, layer: Layer, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The output of `layer` for the calling pass, [..., hidden size]; waits until all passes have reached a layer.

        Arguments as in `ExpertLayer.compute`. Called from a task of `run` only.
        """
        lockstep = getcurrent().parent
        assert lockstep is not None, "only a task of run may wait for the others"
        output: torch.Tensor = lockstep.switch(LayerCall(layer, hidden, index, weights))
        return output

    @staticmethod
    def _served(waiting: Sequence[_Pass[Result]]) -> Iterator[tuple[_Pass[Result], torch.Tensor]]:
        """Computes the lowest layer that passes wait for, for all of those: each pass to resume, and its output."""
        layer = min((each.call.layer for each in waiting if each.call), key=lambda layer: layer.number)
        here = [(each, each.call) for each in waiting if each.call and each.call.layer == layer]
        outputs = layer.compute_together(
            [call.hidden for _, call in here],
            [call.chosen for _, call in here],
            [call.weights for _, call in here],
        )
        return zip([each for each, _ in here], outputs, strict=True)


def _same_place(call: LayerCall | None, other: LayerCall | None) -> bool:
    """Whether two passes wait for the same layer, or have both ended."""
    if call is None or other is None:
        return call is other
    return call.layer == other.layer
