from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from edgemoe.model.kv_cache import cache_argument, has_recurrent_state, new_cache
from edgemoe.model.row_layers import GrowingLayer
from edgemoe.plan.kv_size import measure_kv
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import Zoo, running


def rows(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """New keys and values, [1, 2 heads, tokens, width]; the two widths differ, as in multi-head latent attention."""
    return torch.randn(1, 2, tokens, 6).to(dtype), torch.randn(1, 2, tokens, 4).to(dtype)


@pytest.mark.parametrize("capacity", [1, 7, 64])
@pytest.mark.parametrize("seed", range(5))
def test_it_holds_what_transformers_own_layer_holds(seed: int, capacity: int) -> None:
    """Random appends and cuts; both give the same keys, values, length and mask sizes at every step."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    own, plain = GrowingLayer(capacity), DynamicLayer()
    for _ in range(30):
        count = draw.choice([1, 1, 1, 2, 5])
        assert own.get_mask_sizes(count) == plain.get_mask_sizes(count)
        new = rows(count)
        for found, expected in zip(own.update(*new), plain.update(*new), strict=True):
            assert torch.equal(found, expected)
        if draw.random() < 0.3:
            cut = draw.randint(0, min(3, plain.get_seq_length() - 1))
            own.crop(-cut)
            plain.crop(-cut)
        assert own.get_seq_length() == plain.get_seq_length()
        for kept, right in ((own.keys, plain.keys), (own.values, plain.values)):
            assert kept is not None
            assert right is not None
            assert torch.equal(kept, right)


def test_a_step_within_its_room_copies_nothing() -> None:
    layer = GrowingLayer(10)
    keys, values = layer.update(*rows(3))
    before = keys.data_ptr(), values.data_ptr()
    for _ in range(7):
        keys, values = layer.update(*rows(1))
    assert (keys.data_ptr(), values.data_ptr()) == before
    keys, _ = layer.update(*rows(1))
    assert keys.data_ptr() != before[0], "the eleventh row needs a new buffer"


def test_beyond_its_room_it_grows_by_half_so_that_copies_stay_rare() -> None:
    layer = GrowingLayer(1)
    moves, last = 0, 0
    for _ in range(1000):
        keys, _ = layer.update(*rows(1))
        moves += keys.data_ptr() != last
        last = keys.data_ptr()
    assert moves < 25


def test_reset_forgets_everything() -> None:
    layer = GrowingLayer(10)
    layer.update(*rows(4))
    layer.reset()
    assert layer.get_seq_length() == 0
    new = rows(2)
    keys, _ = layer.update(*new)
    assert torch.equal(keys, new[0])


@pytest.mark.parametrize(
    ("family", "recurrent", "growing"),
    [("mixtral", False, 4), ("gpt_oss", False, 2), ("qwen3_next", True, 1), ("minimax", True, 0)],
)
def test_only_plain_layers_are_replaced(family: str, recurrent: bool, growing: int, zoo: Zoo) -> None:
    with running(zoo(family)) as own:
        cache = new_cache(own.model, 16)
        assert has_recurrent_state(cache) is recurrent
        layers = [] if cache is None else cache.layers
        assert sum(isinstance(layer, GrowingLayer) for layer in layers) == growing


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (CacheLayerMixin, LinearAttentionCacheLayerMixin)):
        yield from tensors_in([kept for name, kept in vars(value).items() if name != "_buffers"])
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)


@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 40])
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v32", "nemotron_h", "qwen3_next", "minimax"]
)
def test_the_measured_size_is_what_a_sequence_takes(family: str, tokens: int, zoo: Zoo) -> None:
    """The plan's numbers are the run's numbers, windows and states included, whoever makes the cache."""
    with running(zoo(family)) as own:
        size = measure_kv(own.blueprint)
        cache = new_cache(own.model, tokens)
        with quiet_transformers(), torch.inference_mode():
            cache = own.model(torch.full((1, tokens), 5), past_key_values=cache, use_cache=True).past_key_values
        held = sum(one.nbytes for one in tensors_in(list(vars(cache).values())))
        assert size.nbytes(tokens) >= held
        window_rows = sum(each for each, window in size.layers if window is not None)
        assert size.nbytes(tokens) <= held + window_rows, "a window may keep one row less than it spans"


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_called_as_the_forward_calls_it(name: str) -> None:
    forwards = {"cache": lambda input_ids, cache: None, "past_key_values": lambda input_ids, past_key_values: None}
    assert cache_argument(SimpleNamespace(forward=forwards[name])) == name
