"""The program of an attention module for so many tokens, which is made once: a pass says where inputs and cache are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from edgemoe.kernels.cpu.arrays import Job, address
from edgemoe.kernels.cpu.attention import SeenKeys, padded_keys
from edgemoe.kernels.cpu.attention_kernels import Words
from edgemoe.kernels.cpu.head_kernels import COSINES, SINES
from edgemoe.kernels.cpu.row_kernels import WEIGHTS, X
from edgemoe.kernels.rms_norm import NormArithmetic, norm_step
from edgemoe.kernels.rows import in_dtypes, sum_step

if TYPE_CHECKING:
    from edgemoe.experts.routed_block import AfterAttention
    from edgemoe.kernels.cpu.program import Program, Step


class PassJobs(NamedTuple):
    """What differs between the passes of a program."""

    heads: Job
    """Of `head_kernels`."""
    places: Any
    """Where the heads' keys and values go, int64 [tokens, 4]: see `head_kernels.PLACE`."""
    attention: Job
    """Of `attention_kernels`, for the first row."""


CHANGING = [
    Words._fields.index(name)
    for name in ("k", "k_head", "k_token", "v", "v_head", "v_token", "spans", "places", "starts", "padded")
]
"""The words of an attention job that say where the cache is, and what of it each token sees."""


class LayerNorms(NamedTuple):
    """What a decoder layer normalises: its input, and the residual after its attention."""

    before: NormArithmetic
    after: NormArithmetic


class LayerProgram:
    """What surrounds the attention of tokens in their decoder layer: norms, and the sum with the layer's input."""

    def __init__(self, norms: LayerNorms, following: AfterAttention | None, tokens: int, dtype: torch.dtype) -> None:
        """`following` continues the program after the second norm. `dtype` is that of hidden states."""
        columns = len(norms.before.weight)
        self._norms, self._following = norms, following
        self._normed, self.residual, self.output = (torch.empty(tokens, columns, dtype=dtype) for _ in range(3))
        # What is read first lies with the caller, and is told before each run.
        self._first = norm_step(norms.before, self.residual, self._normed)
        self._widening: list[Step] = []
        self._added: Job | None = None

    def inputs(self, dtypes: set[torch.dtype]) -> dict[torch.dtype, torch.Tensor]:
        """Where the normalised input will be, for matrices that multiply `dtypes`: its own, and float32."""
        found, self._widening = in_dtypes(self._normed, dtypes)
        return found

    def around(self, steps: list[Step], attention: torch.Tensor) -> list[Step]:
        """`steps`, which write the module's output to `attention`, with those before and after them."""
        last = norm_step(self._norms.after, self.residual, self.output)
        added = sum_step(attention, self.residual, self.residual)
        self._added = added.job
        following = [] if self._following is None else self._following.steps(self.residual, self.output)
        return [self._first, *self._widening, *steps, added, last, *following]

    def reads(self, hidden: torch.Tensor) -> None:
        """The next run's input is `hidden`, contiguous, which must stay until then."""
        assert self._added is not None
        self._first.job.set(X, hidden.data_ptr())
        self._added.set(WEIGHTS, hidden.data_ptr())


class PreparedAttention:
    """The steps of `FusedAttention` for tokens of one sequence, in memory of their own."""

    def __init__(
        self,
        program: Program,
        inputs: LayerProgram | list[torch.Tensor],
        like: torch.Tensor,
        most: int,
        jobs: PassJobs,
        result: torch.Tensor,
    ) -> None:
        """`program` reads what `inputs` say: a layer's, or several [tokens, hidden size].

        It writes `result`, [tokens, hidden size], and has room for `most` keys.
        """
        self._program = program
        self._inputs = inputs
        self.like = like
        """Of the shape and dtype of the tokens' keys, [1, heads, tokens, width]."""
        self.most = most
        self._jobs = jobs
        self._result = result

    def run(
        self,
        hidden: torch.Tensor,
        kept: tuple[torch.Tensor, torch.Tensor],
        seen: SeenKeys,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Computes the outputs for `hidden`, [1, tokens, hidden size]. Writes the last rows of the KV cache, `kept`.

        `seen` says which of its keys each token attends to.
        """
        heads, places, attention = self._jobs
        turning = [each.contiguous() for each in position_embeddings]
        for place, each in zip((COSINES, SINES), turning, strict=True):
            heads.set(place, each.data_ptr())
        places[:] = places_of(kept, len(places))
        for place, word in zip(CHANGING, _words(kept, seen), strict=True):
            attention.set(place, word)
        hidden = hidden.contiguous()
        if isinstance(self._inputs, LayerProgram):
            self._inputs.reads(hidden)
        else:
            for own in self._inputs:
                own.copy_(hidden[0])
        self._program.run()

    def output(self) -> torch.Tensor:
        """The module's output of the last run, [1, tokens, hidden size]."""
        return self._result.clone()[None]

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual of a layer's last run and its norm, [tokens, hidden size] each, valid until the next one."""
        assert isinstance(self._inputs, LayerProgram)
        return self._inputs.residual, self._inputs.output


def places_of(kept: tuple[torch.Tensor, torch.Tensor], tokens: int) -> list[list[int]]:
    """Where the last `tokens` keys and values lie in a KV cache: see `head_kernels.PLACE`."""
    found = []
    for each in kept:
        _, between_heads, between_rows, _ = each.stride()
        size = each.element_size()
        first = each.data_ptr() + (each.shape[2] - tokens) * between_rows * size
        found.append([[first + number * between_rows * size, between_heads * size] for number in range(tokens)])
    return [[*keys, *values] for keys, values in zip(*found, strict=True)]


def _words(kept: tuple[torch.Tensor, torch.Tensor], seen: SeenKeys) -> Sequence[int]:
    """The words of an attention job at the places `CHANGING`."""
    words = []
    for each in kept:
        _, between_heads, between_rows, _ = each.stride()
        size = each.element_size()
        words += [each.data_ptr(), between_heads * size, between_rows * size]
    return [*words, address(seen.spans), address(seen.places), address(seen.starts), padded_keys(seen.most)]
