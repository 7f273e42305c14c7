"""What PyTorch computes for several tokens at once, with the bits that each of them has without the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgemoe.kernels.kernel_weight import has_product
from edgemoe.kernels.row_linear import BATCH_INVARIANT_TOKENS

BY_TOKENS = (F.linear, F.silu, F.gelu, F.softplus, torch.sigmoid, torch.Tensor.sigmoid)
"""What PyTorch sums in another order for several rows than for one, or computes in another way at the end of a tensor
that does not fill the registers."""
WHOLE_REGISTERS = 64
"""Values of a row whose exponentials PyTorch computes in the same way wherever it lies, in every dtype."""


class Span(NamedTuple):
    """Tokens of a pass that follow one another: those of one sequence."""

    tokens: int
    one_by_one: bool
    """Whether each of them gets the bits of a step of its own; else those that they have without other sequences."""
    outputs: int = 0
    """How many of them, the last ones, logits are computed of; a model may look at no others for that."""


class BatchInvariantMode(TorchFunctionMode):
    """In this mode the functions `BY_TOKENS` get one token at a time, with the shape that it has alone.

    Tokens of a span that is not `one_by_one` stay together, with the shape that they have without the others.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        """`spans` are those of the pass, in order."""
        super().__init__()
        self._spans = spans
        self._tokens = sum(span.tokens for span in spans)

    @contextmanager
    def within(self, number: int) -> Iterator[None]:
        """In the block, what is computed is of the span `number` alone."""
        spans, tokens = self._spans, self._tokens
        self._spans, self._tokens = [spans[number]], spans[number].tokens
        try:
            yield
        finally:
            self._spans, self._tokens = spans, tokens

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See PyTorch's TorchFunctionMode."""
        kwargs = kwargs or {}
        if not args or func not in BY_TOKENS or has_product(func, args, kwargs):
            return func(*args, **kwargs)
        input, *others = args
        # [tokens, ...], or [1, tokens, ...].
        dim = 1 if input.dim() > 2 and len(input) == 1 else 0
        # Modules in one another are in this mode several times, and what is together stays so.
        with torch._C.DisableTorchFunction():
            return torch.cat([func(part, *others, **kwargs) for part in self._parts(input, dim)], dim)

    def _parts(self, input: torch.Tensor, dim: int) -> Iterator[torch.Tensor]:
        """What is computed by itself, with the strides that it has alone: PyTorch looks at those of dimensions of one.

        What has another number of tokens than the pass is a part of it: the last tokens of all spans, of which logits
        are computed, or drafts in a recurrent mixer.
        """
        tokens = input[0] if dim else input
        spans = self._spans
        if len(tokens) != self._tokens:
            if len(tokens) == sum(span.outputs for span in spans):
                spans = [span._replace(tokens=span.outputs) for span in spans]
            else:
                few = len(tokens) <= BATCH_INVARIANT_TOKENS
                spans = [Span(len(tokens), one_by_one=few and (len(spans) > 1 or spans[0].one_by_one))]
        for part, span in zip(tokens.split([each.tokens for each in spans]), spans, strict=True):
            if span.one_by_one:
                yield from (token.reshape(*[1] * (dim + 1), *token.shape) for token in part)
            else:
                yield part[None] if dim else part


def install_batch_invariance(model: nn.Module, mode: Callable[[], BatchInvariantMode | None]) -> None:
    """Wraps the forward of modules of `model`, which then compute in the `mode()` of the pass, where it has one.

    They are those with a matrix of their own but no GEMV kernel (`install_gemv`, called before), routers and narrow
    projections, which are small enough for one product per row, and those with scores or gates of an odd width.
    """
    for module in model.modules():
        matrices = any(parameter.dim() == 2 for parameter in module.parameters(recurse=False))
        odd = any(getattr(child, "out_features", 0) % WHOLE_REGISTERS for child in module.children())
        if (matrices or odd) and not isinstance(module, nn.Embedding) and "forward" not in vars(module):
            module.forward = _batch_invariant(module.forward, mode)


def _batch_invariant(forward: Callable[..., Any], mode: Callable[[], BatchInvariantMode | None]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with mode() or nullcontext():
            return forward(*args, **kwargs)

    return run
