"""Bytes that a sequence's keys, values and states take, found by passes on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from edgemoe.checkpoint.blueprint import Blueprint, build_skeleton
from edgemoe.errors import is_device_or_memory_error
from edgemoe.model.kv_cache import SequenceCache, cache_argument, new_cache
from edgemoe.model.rewind.kept_states import StateLayer
from edgemoe.quiet import quiet_transformers

PROBES = (4, 132)
"""Tokens of the two passes; the difference of their bytes is the growth per token."""


@dataclass(frozen=True)
class KvSize:
    """Bytes of one sequence's KV cache as a function of its tokens."""

    fixed: int
    """Bytes that do not depend on the tokens."""
    layers: tuple[tuple[int, int | None], ...]
    """Of each layer: bytes per token, and the window in tokens, or None."""
    state_nbytes: int = 0
    """Bytes of `fixed` that each token replaces, so that they are kept for every token that may be taken back."""

    def nbytes(self, tokens: int) -> int:
        """Bytes after `tokens` tokens."""
        return self.fixed + sum(
            count * each * min(tokens, window or tokens) for (each, window), count in self._kinds.items()
        )

    @cached_property
    def _kinds(self) -> Counter[tuple[int, int | None]]:
        """How many layers there are of each kind: the scheduler asks for sizes in every step."""
        return Counter(self.layers)


def measure_kv(blueprint: Blueprint) -> KvSize:
    """The size of the KV cache of `blueprint`'s model, measured by passes without data.

    A family whose forward needs values cannot run them: its size comes from the configuration (see `kv_from_config`).
    """
    with quiet_transformers():
        skeleton = build_skeleton(blueprint.model_class, blueprint.config, blueprint.dtype)
    for moe in blueprint.pass_modules:
        moe.module(skeleton).forward = lambda hidden_states, *arguments, **named: torch.empty_like(hidden_states)
    try:
        with quiet_transformers(), torch.no_grad(), torch.device("meta"):
            short, long = (_probe(skeleton, tokens) for tokens in PROBES)
    except Exception as error:
        if is_device_or_memory_error(error):
            raise
        return kv_from_config(blueprint.config, blueprint.dtype.itemsize)
    (own, beside, _), states = short, long[2]
    layers = list(own.values())
    if blueprint.head is not None:
        text = blueprint.config.get_text_config()
        # Keys and values of the head's layers, and the hidden states that wait for it: before and after a norm at most.
        layers += [own[layer] for layer in blueprint.head.layers if layer in own]
        layers.append((2 * text.hidden_size * blueprint.dtype.itemsize, None))
    # Tensors beside keys and values may grow too: an indexer's keys, or rows that each sum up several tokens.
    grown = -(-max(0, long[1] - beside) // (PROBES[1] - PROBES[0]))
    if grown:
        layers.append((grown, None))
    return KvSize(max(0, beside - PROBES[0] * grown), tuple(layers), states)


LayerSize = tuple[int, int | None]
"""Bytes of a layer's keys and values per token, and its window."""


def _probe(skeleton: Any, tokens: int) -> tuple[dict[int, LayerSize], int, int]:
    """The sizes of the layers that have keys, by number, and the bytes of all other states after `tokens`.

    The last are the bytes of those states that every token replaces.
    """
    name, ids = cache_argument(skeleton), torch.zeros(1, tokens, dtype=torch.long)
    output = skeleton(input_ids=ids, use_cache=True, **{name: new_cache(skeleton, tokens)})
    cache = getattr(output, name)
    # Some families keep states outside of the layers.
    own = {name: value for name, value in vars(cache).items() if name != "layers"}
    beside, layers = sum(tensor.nbytes for tensor in _tensors(own)), dict[int, LayerSize]()
    states = sum(tensor.nbytes for part in SequenceCache(cache, tokens).parts() for tensor in _states(part))
    for number, layer in enumerate(cache.layers):
        nbytes = sum(tensor.nbytes for tensor in _tensors(vars(layer)))
        if getattr(layer, "keys", None) is not None:
            rows = sum(tensor.nbytes for tensor in (layer.keys, layer.values))
            window = layer.sliding_window if getattr(layer, "is_sliding", False) else None
            layers[number] = rows // layer.keys.shape[-2], window
            nbytes = max(0, nbytes - rows)
        beside += nbytes
    return layers, beside, states


def _states(part: Any) -> list[torch.Tensor]:
    """The tensors of a part of a cache that a token replaces."""
    values = part.slots().values() if isinstance(part, StateLayer) else ()
    return [value for value in values if isinstance(value, torch.Tensor)]


def kv_from_config(config: Any, itemsize: int) -> KvSize:
    """The size by `config`, at `itemsize` bytes per value; every layer counts as one without a window."""
    text = config.get_text_config()
    # A family whose layers differ declares the fields per layer; reading them from the whole raises.
    own = getattr(text, "per_layer_config", None)
    layers = [own[number] if own else text for number in range(text.num_hidden_layers)]
    return KvSize(0, tuple((2 * _values_per_token(layer) * itemsize, None) for layer in layers))


def _values_per_token(layer: Any) -> int:
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    width = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return int(heads * width)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers, except a layer's preallocated `_buffers`, which `keys` and `values` view."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "_buffers":
                yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
