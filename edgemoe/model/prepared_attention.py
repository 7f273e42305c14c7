"""The program of one token's attention module, which is made once: a pass says where its inputs and KV cache are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from edgemoe.kernels.cpu.arrays import Job
from edgemoe.kernels.cpu.attention import REGISTER, SeenKeys

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.program import Program


class PassJobs(NamedTuple):
    """What differs between the passes of a program."""

    heads: Job
    """Of `head_kernels`."""
    places: Any
    """Where the heads' keys and values go, int64 [tokens, 4]: see `head_kernels.PLACE`."""
    attention: Job
    """Of `attention_kernels`, for the first row."""


class PreparedAttention:
    """The steps of `FusedAttention` for one token of one sequence, in memory of their own."""

    def __init__(
        self,
        program: Program,
        inputs: dict[torch.dtype, torch.Tensor],
        like: torch.Tensor,
        seen: SeenKeys,
        most: int,
        jobs: PassJobs,
        result: torch.Tensor,
    ) -> None:
        """`program` reads `inputs`, [1, hidden size], and the keys in `seen`, a range, and writes `result`.

        It has room for `most` keys.
        """
        self._program = program
        self._inputs = list(inputs.values())
        self.like = like
        """Of the shape and dtype of a token's keys, [1, heads, 1, width]."""
        self._seen = seen
        self.most = most
        self._jobs = jobs
        self._result = result

    def run(
        self,
        hidden: torch.Tensor,
        kept: tuple[torch.Tensor, torch.Tensor],
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """The output for `hidden`, [1, 1, hidden size]. Writes the last row of the KV cache, `kept`."""
        # Imported late: importing numba is slow.
        from edgemoe.kernels.cpu.head_kernels import COSINES, SINES

        (keys, values), (heads, places, attention) = kept, self._jobs
        turning = [each.contiguous() for each in position_embeddings]
        for place, each in zip((COSINES, SINES), turning, strict=True):
            heads.set(place, each.data_ptr())
        count = keys.shape[-2]
        places[:] = places_of(kept, -1)
        self._seen.spans[0, 1] = count
        for place, word in zip(_changing(), _words(keys, values), strict=True):
            attention.set(place, word)
        for own in self._inputs:
            own.copy_(hidden[0])
        self._program.run()
        return self._result.clone().view(hidden.shape)


def places_of(kept: tuple[torch.Tensor, torch.Tensor], row: int) -> list[int]:
    """Where the keys and the values in a `row`, counted from the end, lie in a KV cache: see `head_kernels.PLACE`."""
    found = []
    for each in kept:
        _, between_heads, between_rows, _ = each.stride()
        size = each.element_size()
        found += [each.data_ptr() + (each.shape[2] + row) * between_rows * size, between_heads * size]
    return found


@cache
def _changing() -> Sequence[int]:
    """The places of the words of an attention job that say where the cache is, and how much of it."""
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu.attention_kernels import Words

    return [Words._fields.index(name) for name in ("k", "k_head", "k_token", "v", "v_head", "v_token", "padded")]


def _words(keys: torch.Tensor, values: torch.Tensor) -> Sequence[int]:
    """Those words."""
    size, words = keys.element_size(), []
    for each in (keys, values):
        _, between_heads, between_rows, _ = each.stride()
        words += [each.data_ptr(), between_heads * size, between_rows * size]
    return [*words, -(-keys.shape[-2] // REGISTER) * REGISTER]
