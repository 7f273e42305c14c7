"""Attention over the tokens of several sequences laid end to end, through transformers' attention registry.

Everything in a model but attention treats each token alone, so a row of tokens may come from any sequences. The
attention modules of a packed model call `attend`, which splits the row, appends each sequence's keys and values to
its own cache, and runs the family's own attention for each sequence.

Where the state lives: `ALL_ATTENTION_FUNCTIONS` holds `attend` under `NAME`, once for the process. Each attention
module holds a reference to its model's `PackedAttention`. A pass's rows are in that object, inside `running` only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgemoe.kernels.batch_invariant_mode import BatchInvariantMode, Span
from edgemoe.kernels.cpu import attention
from edgemoe.kernels.cpu.attention import SeenKeys
from edgemoe.kernels.cpu.threads import KernelThreads, at_least_torch_threads
from edgemoe.model.draft_tree import TreeMask, additive_mask
from edgemoe.model.rope import scales_with_length

NAME = "edgemoe_packed"
"""The entry in transformers' registry of attention functions. It keeps no state: every model brings its own."""
KINDS = {"full_attention", "sliding_attention"}
"""Kinds of attention whose masks this module can make."""
MIN_THREADED_PAIRS = 1 << 16
"""Pairs of tokens that attend to one another from which attention gains from several of PyTorch's threads."""
_ATTRIBUTE = "edgemoe_packed_attention"


class Row(NamedTuple):
    """One sequence's part of the packed row: its KV cache, and its first token and the end of its tokens in the row."""

    kv: DynamicCache
    first: int
    last: int
    tree_mask: TreeMask | None
    batch_invariant: bool = False
    """Whether each of several tokens attends as it does in a step of its own, to the same bits."""
    outputs: int = 0
    """How many of its tokens, the last ones, logits are computed of."""


class _Attached(NamedTuple):
    """What an attention module holds: its model's rows, and the attention that it runs by itself."""

    packed: PackedAttention
    base: Callable[..., Any]
    additive: bool
    """Whether the masks of `base` are added to the scores."""


AttendOnDevice = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor, "dict[str, Any]"], torch.Tensor]
"""Attention of an attention module's query, key and value, with options as transformers gives them."""


class PackedAttention:
    """The attention of one model's packed passes. Used by one thread at a time."""

    def __init__(self, model: Any, threads: KernelThreads, others: AbstractSet[str] = frozenset()) -> None:
        """`attached` is False where the family's attention cannot be packed; `model` is then left as it is.

        `others` are kinds of layers that are no attention, or whose cache tells their kind of attention.

        `threads` run kernels; PyTorch gets as many for long rows, in passes in which kernels have the cores otherwise.
        """
        self._threads = threads
        self.rows: Sequence[Row] = ()
        """Of the pass under way."""
        self.batch_invariance: BatchInvariantMode | None = None
        """What the modules of the pass under way compute in, so that rows have the bits of a pass of their own."""
        self.on_device: AttendOnDevice | None = None
        """Attends in the place of `rows` while a pass is captured, whose rows are only known when it is replayed."""
        self._masks: dict[object, torch.Tensor] = {}
        self._seen: dict[object, SeenKeys] = {}
        self._configs = configs_of(model)
        self._bases = [config._attn_implementation for config in self._configs]
        self.attached = self._attach(model, others)

    @contextmanager
    def running(self, rows: Sequence[Row], *, batch_invariant: bool = False) -> Iterator[None]:
        """In the block the model's attention works on `rows`; afterwards its configurations are as they were.

        `batch_invariant` is whether rows get the bits that they have in a pass of their own.
        """
        self.rows = rows
        # One long row has nothing to be split from.
        if batch_invariant and (len(rows) > 1 or rows[0].batch_invariant):
            spans = [Span(row.last - row.first, row.batch_invariant, row.outputs) for row in rows]
            self.batch_invariance = BatchInvariantMode(spans)
        try:
            for config in self._configs:
                config._attn_implementation = NAME
            yield
        finally:
            # Outer configurations come first: setting one sets the inner ones, which are then set again.
            for config, base in zip(self._configs, self._bases, strict=True):
                config._attn_implementation = base
            self.rows, self.batch_invariance = (), None
            self._masks.clear()
            self._seen.clear()

    @contextmanager
    def captured(self, attend: AttendOnDevice) -> Iterator[None]:
        """In the block the model's attention is `attend`, whichever rows its passes will have."""
        with self.running(()):
            self.on_device = attend
            try:
                yield
            finally:
                self.on_device = None

    def running_alone(self, kv: DynamicCache, tokens: int) -> AbstractContextManager[None]:
        """As `running` for one sequence with new tokens, each with the bits of a step of its own."""
        return self.running([Row(kv, 0, tokens, None, batch_invariant=True)], batch_invariant=True)

    def is_plain(self, module: Any) -> bool:
        """Whether nothing is added to the scores of an attention module's base, so that kernels may compute it."""
        attached = vars(module).get(_ATTRIBUTE)
        return attached is not None and not attached.additive

    def _attach(self, model: Any, others: AbstractSet[str]) -> bool:
        kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or KINDS)
        # Positions scaled by the length of the longest sequence would make companions depend on one another.
        scaled = any(scales_with_length(config) for config in self._configs)
        # Families with states do not say what they support: passes show it.
        supported = bool(others) or getattr(model, "_supports_attention_backend", False)
        if scaled or not kinds <= KINDS | others or not supported:
            return False
        for module in model.modules():
            if isinstance(getattr(module, "layer_idx", None), int) and (base := _base_attention(module)) is not None:
                vars(module)[_ATTRIBUTE] = _Attached(self, *base)
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        return True

    def attend(self, module: Any, query: Any, key: Any, value: Any, attached: _Attached, options: Any) -> torch.Tensor:
        """See `attend`."""
        if self.on_device is not None:
            return self.on_device(module, query, key, value, options)
        outputs = []
        for row in self.rows:
            first, last = row.first, row.last
            keys, values = row.kv.update(key[:, :, first:last], value[:, :, first:last], module.layer_idx)
            layer = row.kv.layers[module.layer_idx]
            window = layer.sliding_window if layer.is_sliding else None
            own = query[:, :, first:last]
            if row.batch_invariant or last - first == 1:
                outputs.append(self._one_by_one(module, own, keys, values, row, window, attached, options))
            else:
                mask = self._mask(row, keys, window, additive=attached.additive)
                with self._enough_threads((last - first) * keys.shape[-2]):
                    outputs.append(attached.base(module, own, keys, values, mask, **options)[0])
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _one_by_one(
        self,
        module: Any,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        row: Row,
        window: int | None,
        attached: _Attached,
        options: Any,
    ) -> torch.Tensor:
        """The attention of each token as it is in a step of its own."""
        seen = self.seen_keys(row, keys.shape[-2], window)
        plain = not attached.additive and options.get("position_bias") is None
        if plain and attention.fits(query, keys, values):
            return attention.attend(self._threads, query, keys, values, seen, options.get("scaling"))
        outputs = []
        for place in range(query.shape[-2]):
            pick = seen.of(place)
            picked = keys[:, :, pick], values[:, :, pick]
            outputs.append(attached.base(module, query[:, :, place : place + 1], *picked, None, **options)[0])
        return torch.cat(outputs, dim=1)

    def _enough_threads(self, pairs: int) -> AbstractContextManager[None]:
        """Where `pairs` of tokens attend to one another."""
        return at_least_torch_threads(self._threads.count) if pairs >= MIN_THREADED_PAIRS else nullcontext()

    def _mask(self, row: Row, keys: torch.Tensor, window: int | None, *, additive: bool) -> torch.Tensor | None:
        """Which of `keys`, [1, heads, keys, width], each token of `row` attends to; None where no mask is needed.

        Bool [1, 1, queries, keys], or 0 and the smallest number of the dtype where `additive`.
        """
        queries, count = row.last - row.first, keys.shape[-2]
        unmasked = queries == 1 or (queries == count and not additive)
        if row.tree_mask is None and unmasked and (window is None or count <= window):
            return None
        # Rows without a tree that are equally long share a mask.
        key = (row.first if row.tree_mask else -queries, count, window)
        if key not in self._masks:
            visible = row.tree_mask.visible(count, window) if row.tree_mask else _causal(queries, count, window)
            visible = visible.to(keys.device, non_blocking=True)
            self._masks[key] = (additive_mask(visible, keys.dtype) if additive else visible)[None, None]
        return self._masks[key]

    def seen_keys(self, row: Row, count: int, window: int | None) -> SeenKeys:
        """Which of the last `count` keys each token of `row` attends to."""
        key = (row.first, count, window)
        if key not in self._seen:
            if row.tree_mask:
                self._seen[key] = SeenKeys.visible(row.tree_mask.visible(count, window))
            else:
                ends = range(count - (row.last - row.first) + 1, count + 1)
                self._seen[key] = SeenKeys.ranges([(max(0, end - window) if window else 0, end) for end in ends])
        return self._seen[key]


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attention over a packed row, with transformers' signature: `query` is [1, heads, tokens, width].

    Appends to the KV cache of every row. Returns [1, tokens, heads, width].
    """
    attached: _Attached = vars(module)[_ATTRIBUTE]
    return attached.packed.attend(module, query, key, value, attached, options), None


def configs_of(model: Any) -> list[Any]:
    """Every configuration that a module of `model` reads, outer ones first."""
    found = {id(module.config): module.config for module in model.modules() if getattr(module, "config", None)}
    return list(found.values())


def _causal(queries: int, count: int, window: int | None) -> torch.Tensor:
    """Bool [queries, count]: the causal mask of the last `queries` of `count` tokens."""
    positions = torch.arange(count)
    own = positions[count - queries :, None]
    return positions <= own if window is None else (positions <= own) & (positions > own - window)


def _base_attention(module: Any) -> tuple[Callable[..., Any], bool] | None:
    """The attention that `module` runs by itself, and whether its masks are added; None where it has none."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation == "sdpa":
        return ALL_ATTENTION_FUNCTIONS["sdpa"], False
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return (eager, True) if implementation == "eager" and eager is not None else None
