"""Verification by single steps side by side: each token runs the family's own step, and all share the weights.

The tokens of a chain run as passes in lockstep (`edgemoe.experts.lockstep`), in their order: between two places where
they wait for one another, a token runs after the one before it, so that every layer's cache sees them one by one.
Each computes what a step of its own does, whatever the family caches. They wait at every MoE layer, whose experts are
loaded and computed once for all, and, where `shares_linears`, at every large linear layer, whose weight is read once.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from edgemoe.experts.lockstep import OutOfStep
from edgemoe.kernels.batch_invariant_linear import matrix_of
from edgemoe.model.pass_logits import LogitsRows, split_rows
from edgemoe.model.rewind.token_view import TokenView
from edgemoe.model.sequential_runner import PassInput, SequentialRunner


class TokenLockstep:
    """Runs passes in lockstep: those that verify or draft token by token, others as they are."""

    def __init__(self, runner: SequentialRunner) -> None:
        """Lets the large linear layers of the model wait for one another, in passes of `run` only."""
        self._runner = runner
        self.shares_linears = True
        """Whether tokens wait for one another at large linear layers too."""
        _install(runner.model, runner)

    def rows(self, inputs: Sequence[PassInput]) -> list[LogitsRows]:
        """As `SequentialRunner.rows`."""
        if not self._can_share(inputs):
            return self._rows(inputs, shares_linears=False)
        if all(len(item.tokens) == 1 for item in inputs):
            return self._rows(inputs, shares_linears=True)
        caches = [item.cache for item in inputs]
        unmarked = [cache for cache in caches if cache.marked is None]
        for cache in unmarked:
            cache.mark()
        bases = [cache.tokens for cache in caches]
        try:
            found = self._rows(inputs, shares_linears=True)
        except OutOfStep:
            # Tokens of this family do not all call the same layers, so that one would overtake another.
            self.shares_linears = False
            for cache, base in zip(caches, bases, strict=True):
                cache.rollback(base)
                cache.mark()
            found = self._rows(inputs, shares_linears=False)
        for item, base in zip(inputs, bases, strict=True):
            if item.cache in unmarked:
                item.cache.rollback(base, range(len(item.tokens)))
        return found

    def _can_share(self, inputs: Sequence[PassInput]) -> bool:
        """Whether all passes are of single tokens, which call the same layers, are routed as usual and begin anew."""
        layers = self._runner.layers
        return (
            self.shares_linears
            and layers.routes_itself
            and all(by_token(item) or len(item.tokens) == 1 for item in inputs)
            and all(item.cache.marked in (None, item.cache.tokens) for item in inputs)
        )

    def _rows(self, inputs: Sequence[PassInput], *, shares_linears: bool) -> list[LogitsRows]:
        runner = self._runner
        tasks: list[Callable[[], torch.Tensor]] = []
        views: list[TokenView | None] = []
        after: list[int | None] = []
        for item in inputs:
            if not by_token(item):
                tasks.append(partial(runner.forward, item))
                views.append(None)
                after.append(None)
                continue
            for place, token in enumerate(item.tokens):
                after.append(len(views) - 1 if place else None)
                view = TokenView(item.cache, place)
                tasks.append(partial(runner.forward, PassInput(view.sequence, [token])))
                views.append(view)
        # A token's share of the cores is that of a step of its own, so that its products have the same bits.
        firsts = [item._replace(tokens=item.tokens[:1]) if by_token(item) else item for item in inputs]
        with runner.passing(firsts, kind="lockstep"), runner.layers.lockstep() as lockstep:
            lockstep.shares_linears = shares_linears
            found = iter(lockstep.run(tasks, after, lambda number: _settle(views[number], whole=not shares_linears)))
            logits = []
            for item in inputs:
                if by_token(item):
                    logits.append(torch.cat([next(found) for _ in item.tokens])[-item.outputs :])
                    item.cache.appended(len(item.tokens))
                else:
                    logits.append(next(found))
            return split_rows(torch.cat(logits), [item.outputs for item in inputs])


def by_token(item: PassInput) -> bool:
    """Whether a pass's tokens may have to be taken back one by one, or get the bits of single steps."""
    return item.verifies or item.cache.marked is not None


def _settle(view: TokenView | None, *, whole: bool) -> None:
    if view is not None:
        view.settle(whole=whole)


class _SharedLinear:
    """A linear layer that passes in lockstep wait at. As `edgemoe.experts.lockstep.Layer`."""

    number = -1
    """Before the MoE layers: a pass that waits here has not reached the next of them."""

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], most: int) -> None:
        """`forward` multiplies up to `most` tokens to the bits of one."""
        self._forward = forward
        self._most = most

    def compute_together(
        self, hidden: Sequence[torch.Tensor], index: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The product for each token."""
        outputs: list[torch.Tensor] = []
        for first in range(0, len(hidden), self._most):
            part = hidden[first : first + self._most]
            product = self._forward(torch.cat([each.reshape(1, -1) for each in part]))
            outputs += [row.view(*each.shape[:-1], -1) for row, each in zip(product, part, strict=True)]
        return outputs


def _install(model: Any, runner: SequentialRunner) -> None:
    """Wraps the forward of every linear layer of `model` with a kernel that gives a token the same bits in a group."""
    for module in model.modules():
        matrix = matrix_of(module)
        if matrix is not None:
            shared = _SharedLinear(module.forward, matrix.max_tokens)
            module.forward = types.MethodType(_waiting(module.forward, shared, runner), module)


def _waiting(
    forward: Callable[[torch.Tensor], torch.Tensor], shared: _SharedLinear, runner: SequentialRunner
) -> Callable[..., torch.Tensor]:
    layers = runner.layers

    def wait(module: nn.Module, input: torch.Tensor) -> torch.Tensor:
        lockstep = layers.running_lockstep
        if lockstep is None or not lockstep.shares_linears or input.numel() != input.shape[-1] or not lockstep.inside:
            return forward(input)
        return lockstep.wait_for_others(shared, input, input, input)

    return wait
