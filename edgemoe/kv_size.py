"""How many bytes a sequence's keys, values and states take, found by a pass without data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from edgemoe.blueprint import Blueprint
from edgemoe.kv_cache import new_cache
from edgemoe.quiet import quiet_transformers

PROBE_TOKENS = 4


@dataclass(frozen=True)
class KvSize:
    """Bytes of one sequence's past: a constant, and for each layer its bytes a token and its window, if any."""

    fixed: int
    layers: tuple[tuple[int, int | None], ...]

    def nbytes(self, tokens: int) -> int:
        """Bytes after `tokens` tokens."""
        return self.fixed + sum(
            count * each * min(tokens, window or tokens) for (each, window), count in self._kinds.items()
        )

    @cached_property
    def _kinds(self) -> Counter[tuple[int, int | None]]:
        """Layers that are alike, counted: a batch asks for sizes all the time."""
        return Counter(self.layers)


def measure_kv(blueprint: Blueprint) -> KvSize:
    """The size of `blueprint`'s cache, from a pass over the skeleton; from the configuration where that cannot run."""
    skeleton = blueprint.skeleton
    for site in blueprint.sites:
        site.module(skeleton).forward = lambda hidden_states, *arguments, **named: torch.empty_like(hidden_states)
    try:
        with quiet_transformers(), torch.no_grad(), torch.device("meta"):
            ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long)
            cache = new_cache(skeleton, PROBE_TOKENS)
            cache = skeleton(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
    except Exception:
        # A family may read values in its forward, which a pass without data has not.
        return _from_config(blueprint)
    # Some families keep states beside the layers.
    own = {name: value for name, value in vars(cache).items() if name != "layers"}
    fixed, layers = sum(tensor.nbytes for tensor in _tensors(own)), []
    for layer in cache.layers:
        nbytes = sum(tensor.nbytes for tensor in _tensors(vars(layer)))
        if getattr(layer, "keys", None) is not None:
            growing = sum(tensor.nbytes for tensor in (layer.keys, layer.values))
            window = layer.sliding_window if getattr(layer, "is_sliding", False) else None
            layers.append((growing // PROBE_TOKENS, window))
            nbytes = max(0, nbytes - growing)
        fixed += nbytes
    return KvSize(fixed, tuple(layers))


def _from_config(blueprint: Blueprint) -> KvSize:
    text = blueprint.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    each = 2 * heads * width * blueprint.dtype.itemsize
    return KvSize(0, tuple((each, None) for _ in range(text.num_hidden_layers)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every distinct-looking tensor inside nested containers; buffers with room are left out."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "_buffers":
                yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
