"""Attention for passes of few tokens over the sequences' own KV buffers, on a device. Importing this needs Triton."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgemoe.kernels.triton import attention_kernels as kernels
from edgemoe.kernels.triton.launcher import Launcher
from edgemoe.kernels.triton.pass_layout import DRAFTED, table_start

SPLIT = 256
"""Keys of one split. Splits begin at fixed places, whatever the length, so that results do not depend on it."""
MAX_WIDTH = 512
"""Of a head's keys or values: wider tiles do not fit into a multiprocessor's memory."""
MAX_GROUP = 64
"""Query heads that share a head of keys."""
_TILE_BYTES = 16384
"""Of keys, or of values: small enough for the 64 KiB of a multiprocessor with the least memory."""
_LEAST_SIDE = 16
"""Of a tile that is multiplied by `tl.dot`."""
_COMBINED_SPLITS = 16
"""Splits whose results are added at once."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_POSITIONS = frozenset({"position_ids", "cache_position"})
"""Tensors that transformers hands to attention functions and that change nothing here: metadata has the positions."""


class DecodeAttention:
    """The attention of a model's layers that are of one shape. It keeps no state between calls."""

    def __init__(
        self,
        launcher: Launcher,
        heads: int,
        kv_heads: int,
        width: int,
        value_width: int,
        dtype: torch.dtype,
        *,
        context: int,
        scaling: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
    ) -> None:
        """`width` and `value_width` are those of a head. Sequences have at most `context` tokens, drafts included.

        `scaling` is 1 / sqrt(width) unless given. With `window` a token sees the last `window` positions, its own
        included. ValueError for what `refusal` refuses.
        """
        if reason := self.refusal(heads, kv_heads, width, value_width, dtype, {}):
            raise ValueError(reason)
        self._launcher = launcher
        self._heads, self._kv_heads = heads, kv_heads
        self._width, self._value_width = width, value_width
        self._dtype = dtype
        self._splits = -(-context // SPLIT)
        if window:
            # A range of this many keys touches at most so many splits.
            self._splits = min(self._splits, (window + SPLIT - 2) // SPLIT + 1)
        sides = [max(_LEAST_SIDE, _power_of_two(size)) for size in (heads // kv_heads, width, value_width)]
        keys = min(64, max(_LEAST_SIDE, _TILE_BYTES // (max(sides[1:]) * dtype.itemsize)))
        parts: dict[str, Any] = {"window": window or 0, "split": SPLIT}
        self._append = {"width": width, "value_width": value_width, "width_block": sides[1], "value_block": sides[2]}
        self._attend = parts | {
            "shape": (heads // kv_heads, width, value_width),
            "blocks": (*sides, keys),
            "scaling": float(width**-0.5 if scaling is None else scaling),
            "softcap": float(softcap or 0.0),
            "drafted": DRAFTED,
        }
        self._combine = parts | {
            "splits": self._splits,
            "value_width": value_width,
            "value_block": sides[2],
            "block": _COMBINED_SPLITS,
        }

    @staticmethod
    def refusal(
        heads: int, kv_heads: int, width: int, value_width: int, dtype: torch.dtype, options: Mapping[str, Any]
    ) -> str:
        """Why attention of this shape cannot be computed here, in one sentence; empty where it can.

        `options` are what transformers' attention functions get beside query, key, value and mask. Of these `scaling`,
        `sliding_window`, `softcap` and `s_aux` can be honoured: the first three are the constructor's, the last is
        the `sinks` of `attend`. Others that change nothing are let pass.
        """
        if dtype not in _DTYPES:
            return f"attention in {dtype} has no kernel (there are some for {', '.join(map(str, _DTYPES))})"
        if heads % kv_heads:
            return f"{heads} heads cannot share {kv_heads} heads of keys evenly"
        if heads // kv_heads > MAX_GROUP:
            return f"{heads // kv_heads} heads share a head of keys, and kernels take at most {MAX_GROUP}"
        if max(width, value_width) > MAX_WIDTH:
            return f"heads are {max(width, value_width)} wide, and kernels take at most {MAX_WIDTH}"
        if options.get("dropout"):
            return f"dropout is {options['dropout']}, and kernels have none"
        if options.get("is_causal") is False:
            return "attention to later tokens has no kernel"
        for name, option in options.items():
            if isinstance(option, torch.Tensor) and name != "s_aux" and name not in _POSITIONS:
                return f"attention with {name} has no kernel"
        return ""

    def workspace_nbytes(self, tokens: int) -> int:
        """Bytes on the device that `attend` takes for a pass of `tokens` tokens, while it runs."""
        return tokens * self._heads * self._splits * (self._value_width + 2) * 4

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: torch.Tensor,
        layer: int,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Appends a pass's keys and values to the buffers of its sequences, and returns what its tokens attend to.

        `query` is [1, heads, tokens, width], `key` [1, kv heads, tokens, width], `value` [1, kv heads, tokens, value
        width], of any strides and one dtype. `metadata` is what `PassLayout.fill` made for as many tokens, on the
        device; `layer` counts the layers of its table. `sinks`, [heads], are scores without values. Queues three
        launches and reads nothing back. The result, [1, tokens, heads, value width] in the query's dtype, has zeros
        for padding. ValueError for a query, key or value of another shape or dtype than the constructor's.
        """
        tokens = query.shape[2]
        self._check(query, key, value, tokens)
        place = metadata, tokens, table_start(tokens, layer)
        strides = key.stride(2), key.stride(1), key.stride(3), value.stride(2), value.stride(1), value.stride(3)
        self._launcher(kernels.append, (tokens, self._kv_heads), key, value, *place, *strides, **self._append)
        partial = query.new_empty(tokens, self._heads, self._splits, self._value_width, dtype=torch.float32)
        stats = query.new_empty(tokens, self._heads, self._splits, 2, dtype=torch.float32)
        by_split = (tokens, self._kv_heads, self._splits)
        own = query.stride(2), query.stride(1), query.stride(3)
        self._launcher(kernels.attend, by_split, query, partial, stats, *place, *own, **self._attend)
        output = query.new_empty(1, tokens, self._heads, self._value_width)
        # Where there are no sinks, a tensor stands in that is never read.
        given = (partial, stats, stats if sinks is None else sinks, output, *place)
        self._launcher(kernels.combine, (tokens, self._heads), *given, **self._combine, has_sinks=sinks is not None)
        return output

    def _check(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: int) -> None:
        expected = {
            "query": (query, (1, self._heads, tokens, self._width)),
            "key": (key, (1, self._kv_heads, tokens, self._width)),
            "value": (value, (1, self._kv_heads, tokens, self._value_width)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor.shape != shape or tensor.dtype != self._dtype:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"the {name} is {found}, not {self._dtype} {list(shape)}")


def _power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
