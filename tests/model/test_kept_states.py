"""States that tokens replace are given back as they were after any token since the mark, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.rewind.kept_states import StatePool
from edgemoe.model.rewind.state_layers import (
    RecurrentGrowingLayer,
    RecurrentLayer,
    RecurrentWindowLayer,
    mixed,
    own_layer,
)
from edgemoe.model.row_layers import IndexedLayer

WIDTH = 3


def state(token: int) -> torch.Tensor:
    return torch.full((1, 2, WIDTH), float(token))


def rows(tokens: list[int]) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.float32).view(1, 1, -1, 1)


def append(layer: RecurrentLayer, token: int) -> None:
    """What a mixer does for one token: a convolution that writes into its state, and a state that is replaced."""
    held = layer.conv_states[0]
    if held is None or not layer.has_previous_state[0]:
        layer.update_conv_state(state(token))
    else:
        held.copy_(torch.cat([held, state(token)[..., :1]], -1)[..., -WIDTH:])
    layer.update_recurrent_state(state(-token))


def states(layer: RecurrentLayer) -> list[torch.Tensor]:
    held = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return [each.clone() for each in held if each is not None]


@pytest.mark.parametrize("replaces", [False, True])
def test_a_rollback_gives_the_state_after_the_last_token_that_is_kept(replaces: bool) -> None:
    pool = StatePool()
    pool.replaces = replaces
    for kept in range(-1, 4):
        layer, other = RecurrentLayer(1, pool), RecurrentLayer(1, pool)
        for each in (layer, other):
            append(each, 5)
        layer.mark()
        for node in range(4):
            append(layer, 10 + node)
            layer.settle(node, run=bool(node % 2))
        for node in range(kept + 1):
            append(other, 10 + node)
        layer.rollback(1, range(kept + 1))
        assert layer.kept is None
        for _ in range(2):
            assert all(map(torch.equal, states(layer), states(other)))
            append(layer, 7)
            append(other, 7)


def test_siblings_follow_the_state_of_their_parent() -> None:
    pool = StatePool()
    pool.replaces = True
    layer, other = RecurrentLayer(1, pool), RecurrentLayer(1, pool)
    append(layer, 5)
    append(other, 5)
    layer.mark()
    kept = layer.kept
    assert kept is not None
    slots = list(layer.slots())
    for node, parent in enumerate([-1, 0, 0, 2]):
        kept.go_back(layer, parent, slots)
        append(layer, 10 + node)
        kept.keep(layer, node, slots)
    layer.rollback(1, [0, 2])
    for token in (10, 12):
        append(other, token)
    assert all(map(torch.equal, states(layer), states(other)))


def test_a_state_that_began_after_the_mark_is_none_again() -> None:
    layer = RecurrentLayer()
    layer.mark()
    append(layer, 5)
    layer.settle(0, run=True)
    layer.rollback(0, [])
    assert not layer.has_previous_state[0]
    append(layer, 6)
    assert torch.equal(states(layer)[0], state(6))


def test_memory_of_kept_states_is_used_again() -> None:
    pool = StatePool()
    layer = RecurrentLayer(1, pool)
    append(layer, 5)
    held = set()
    for turn in range(5):
        layer.mark()
        for node in range(3):
            append(layer, 10 * turn + 11 + node)
            layer.settle(node, run=False)
        assert layer.kept is not None
        assert layer.kept.nbytes == 4 * 2 * state(0).nbytes
        held |= {id(each) for nodes in layer.kept._nodes.values() for each in nodes.values()}
        layer.rollback(1, [0])
    # A kept state takes the place of the other one, which goes back.
    assert len(held) <= 2 * (4 + 1)


@pytest.mark.parametrize("window", [None, 3])
def test_rows_and_states_go_back_together(window: int | None) -> None:
    layer: Any = RecurrentGrowingLayer(16) if window is None else RecurrentWindowLayer(window)
    for token in range(1, 6):
        layer.update(rows([token]), rows([-token]))
        append(layer, token)
    layer.mark()
    for node, token in enumerate([6, 7, 8]):
        layer.update(rows([token]), rows([-token]))
        append(layer, token)
        layer.settle(node, run=False)
    layer.rollback(5, [0])
    assert layer.get_seq_length() == 6
    assert torch.equal(layer.keys, rows([1, 2, 3, 4, 5, 6] if window is None else [5, 6]))
    assert float(layer.recurrent_states[0][0, 0, 0]) == -6
    assert float(layer.conv_states[0][0, 0, -1]) == 6


def test_a_copy_has_states_of_its_own() -> None:
    layer: Any = RecurrentGrowingLayer(16)
    layer.update(rows([1]), rows([1]))
    append(layer, 1)
    cache = SequenceCache(DynamicCache(), 16, 1)
    cache.kv.layers = [layer]
    other = cache.fork(1, 16).kv.layers[0]
    append(layer, 2)
    assert float(other.recurrent_states[0][0, 0, 0]) == -1
    assert float(copy.deepcopy(layer).recurrent_states[0][0, 0, 0]) == -2


def test_an_indexers_keys_are_rows() -> None:
    layer = IndexedLayer(16)

    def grow(tokens: list[int]) -> None:
        layer.update(rows(tokens), rows(tokens))
        layer.update_indexer(rows(tokens)[0])

    grow([1, 2])
    layer.mark()
    grow([3, 4, 5])
    layer.rollback(2, [0, 2])
    assert layer.keys is not None
    assert layer.indexer_keys is not None
    assert layer.keys.flatten().tolist() == layer.indexer_keys.flatten().tolist() == [1, 2, 3, 5]
    copied = layer.fork(3, 8)
    assert copied.indexer_keys is not None
    assert copied.indexer_keys.flatten().tolist() == [1, 2, 3]


def test_classes_of_ours_do_not_take_the_places_of_transformers() -> None:
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLSparseCacheLayer

    made = own_layer(MiniMaxM3VLSparseCacheLayer(), 8, StatePool())
    assert isinstance(made, MiniMaxM3VLSparseCacheLayer)
    assert type(made) is mixed(type(made).__mro__[1], MiniMaxM3VLSparseCacheLayer)
    assert DYNAMIC_LAYER_TYPE_MAPPING["minimax_m3_sparse"] is MiniMaxM3VLSparseCacheLayer
