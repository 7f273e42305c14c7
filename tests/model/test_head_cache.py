"""What a draft head keeps of a sequence, against a plain account: which rows it has read, which states wait."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from bench.support.engine_parts import runner_of
from bench.support.zoo_heads import make_with_head
from edgemoe import Engine
from edgemoe.model.head_cache import HeadCache
from edgemoe.model.head_runner import AFTER, BEFORE, HeadInput
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.row_layers import GrowingLayer, WindowLayer
from edgemoe.model.sequential_runner import PassInput
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import random_ids

SIZE = 3
TOKENS = random_ids(20)


class Layers:
    """Stands in for transformers' cache: layers that say how many rows they hold."""

    def __init__(self, *layers: Any) -> None:
        self.layers = list(layers)


def states(first: int, count: int, kinds: int = 2) -> torch.Tensor:
    """Hidden states by number: state i is full of i, and of i + 0.5 in its second kind."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)[:, None, None]
    return (numbers + torch.arange(kinds)[None, :, None] / 2).expand(-1, -1, SIZE).clone()


def numbers(cache: HeadCache, kind: int = 0) -> list[float]:
    """The numbers of all states that wait."""
    return [] if not cache.waiting else [float(each[0]) for each in cache.peek(cache.waiting, kind)]


def filled(*counts: int) -> HeadCache:
    """A cache without layers that got so many states at a time."""
    cache, first = HeadCache(Layers()), 0
    for count in counts:
        cache.give(states(first, count))
        first += count
    return cache


# --- states that wait ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_the_first_ones_are_read_in_their_order_and_stay(count: int) -> None:
    cache = filled(2, 1, 3)
    for kind, more in ((BEFORE, 0.0), (AFTER, 0.5)):
        found = cache.peek(count, kind)
        assert found.shape == (count, SIZE)
        assert found[:, 0].tolist() == [number + more for number in range(count)]
    assert cache.waiting == 6


@pytest.mark.parametrize("count", range(7))
def test_what_was_read_goes_first(count: int) -> None:
    cache = filled(2, 1, 3)
    cache.drop_first(count)
    assert cache.waiting == 6 - count
    assert numbers(cache) == list(range(count, 6))


def test_where_the_kind_is_known_there_is_one() -> None:
    """States of both kinds from before it was known are followed by those of one."""
    cache = filled(2)
    cache.give(states(2, 2, kinds=1))
    assert numbers(cache, AFTER) == [0.5, 1.5, 2.0, 3.0]
    assert numbers(cache, BEFORE) == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("rows", [(), (0,), (0, 1, 2), (1, 3), (0, 2, 4), (4,)])
@pytest.mark.parametrize("parts", [(5,), (2, 3)])
def test_of_drafted_tokens_the_accepted_ones_stay(rows: tuple[int, ...], parts: tuple[int, ...]) -> None:
    cache = filled(2)
    cache.mark()
    first = 10
    for count in parts:
        cache.give(states(first, count))
        first += count
    assert numbers(cache) == [0, 1], "while they are drafted they do not count"
    cache.rollback(rows)
    assert numbers(cache) == [0, 1, *(10 + row for row in rows)]
    cache.give(states(30, 1))
    assert numbers(cache) == [0, 1, *(10 + row for row in rows), 30], "the next ones are no drafts any more"


def test_a_rollback_without_drafts_keeps_all() -> None:
    cache = filled(2)
    cache.mark()
    cache.rollback(())
    assert numbers(cache) == [0, 1]


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_events_is_as_a_list_has_it(seed: int) -> None:
    draw, cache, expected, given = random.Random(seed), HeadCache(Layers()), list[float](), 0
    for _ in range(60):
        what = draw.choice(["give", "drop", "draft"])
        count = draw.randint(1, 5)
        if what == "give":
            cache.give(states(given, count))
            expected += range(given, given + count)
            given += count
        elif what == "drop":
            count = min(count, len(expected))
            cache.drop_first(count)
            del expected[:count]
        else:
            rows = sorted(draw.sample(range(count), draw.randint(0, count)))
            cache.mark()
            cache.give(states(given, count))
            cache.rollback(rows)
            expected += [given + row for row in rows]
            given += count
        assert cache.waiting == len(expected)
        assert numbers(cache) == expected


# --- copies and cuts -------------------------------------------------------------------------------


def with_rows(rows: int, waiting: int, layer: Any = None) -> HeadCache:
    """A head of one layer that has read `rows` states; so many more wait."""
    layer = layer or GrowingLayer(64)
    cache = HeadCache(Layers(layer))
    cache.give(states(0, rows + waiting))
    if rows:
        cache.drop_first(rows)
        keys = torch.arange(rows, dtype=torch.float32)[None, None, :, None].expand(1, 1, rows, 2)
        layer.update(keys, keys + 0.5)
        cache.rows = rows
    return cache


def held(cache: HeadCache) -> list[float]:
    """The numbers of the rows in the layer of a head."""
    keys = cache.kv.layers[0].keys
    return [] if keys is None else keys[0, 0, :, 0].tolist()


@pytest.mark.parametrize("tokens", [1, 4, 6, 7, 8])
def test_a_cut_keeps_what_belongs_to_the_tokens(tokens: int) -> None:
    """The row of the last token goes with the next one; where its hidden state is gone, zeros are in its place."""
    cache = with_rows(rows=6, waiting=2)
    cache.crop(tokens)
    assert cache.rows + cache.waiting == tokens
    if tokens > 6:
        assert held(cache) == list(range(6))
        assert numbers(cache) == list(range(6, tokens))
    else:
        assert held(cache) == list(range(tokens - 1))
        assert numbers(cache) == [0.0]
        assert cache.peek(1, AFTER).abs().max() == 0


@pytest.mark.parametrize("counts", [(8,), (3, 5), (1, 1, 6)])
def test_states_that_wait_are_cut_wherever_they_were_given(counts: Sequence[int]) -> None:
    for tokens in range(1, 9):
        cache = filled(*counts)
        cache.crop(tokens)
        assert numbers(cache) == list(range(tokens))


def test_a_copy_goes_its_own_way() -> None:
    cache = with_rows(rows=4, waiting=3)
    copy = cache.fork([each.fork(4, 64) for each in cache.kv.layers])
    cache.drop_first(3)
    cache.crop(2)
    cache.give(states(50, 1))
    assert (copy.rows, copy.waiting) == (4, 3)
    assert held(copy) == [0, 1, 2, 3]
    assert numbers(copy) == [4, 5, 6]
    copy.crop(3)
    assert held(copy) == [0, 1]
    assert copy.waiting == 1


def test_the_states_of_a_copy_are_its_own_memory() -> None:
    """A slice that waits must not keep the states of a whole prompt alive."""
    cache = with_rows(rows=40, waiting=1)
    copy = cache.fork([each.fork(40, 64) for each in cache.kv.layers])
    (waiting,) = copy._hidden
    assert waiting.untyped_storage().nbytes() == waiting.nbytes


@pytest.mark.parametrize("layer", [GrowingLayer(64), WindowLayer(4)], ids=["rows", "window"])
def test_drafted_rows_are_dropped(layer: Any) -> None:
    cache = with_rows(rows=6, waiting=0, layer=layer)
    before = held(cache)
    cache.mark_rows()
    drafted = torch.full((1, 1, 3, 2), 99.0)
    layer.update(drafted, drafted)
    cache.rows += 3
    cache.drop_rows(6)
    assert cache.rows == 6
    assert held(cache) == before


def test_a_reserve_is_for_the_heads_layers_too() -> None:
    cache = with_rows(rows=2, waiting=0)
    cache.reserve(100)
    assert cache.kv.layers[0].capacity == 100
    cache.reserve(10)
    assert cache.kv.layers[0].capacity == 100
    with_rows(2, 0, WindowLayer(4)).reserve(100)


# --- with a model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "deepseek_v3"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelRunner]:
    """A model with rows, one with windows of 6 tokens, and one whose sequences do not share passes."""
    with quiet_transformers():
        folder = make_with_head(request.param, tmp_path_factory.mktemp("head") / "model")
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "threads": 1, "state_folder": "none"}
    with Engine.load(folder, speculate="mtp", **settings) as engine:
        yield runner_of(engine)


def head_of(cache: SequenceCache) -> HeadCache:
    assert cache.head is not None
    return cache.head


def after(runner: ModelRunner, tokens: Sequence[int], read: int = 0) -> SequenceCache:
    """The past of `tokens`, of whose hidden states the head has read the first `read`."""
    cache = runner.start(64)
    runner.step(cache, tokens)
    if read:
        read_on(runner, cache, [*tokens, 7], read)
    return cache


def read_on(runner: ModelRunner, cache: SequenceCache, tokens: Sequence[int], count: int) -> torch.Tensor:
    """The head reads `count` more states; the logits after the last one."""
    own = head_of(cache)
    assert runner.head is not None
    follow = tokens[own.rows + 1 : own.rows + 1 + count]
    (output,) = runner.head.run([HeadInput(own, follow, own.peek(count, AFTER), 1)])
    own.drop_first(count)
    return torch.as_tensor(output.logits)[0]


def test_every_token_gives_a_hidden_state(runner: ModelRunner) -> None:
    cache = after(runner, TOKENS[:5])
    runner.step(cache, TOKENS[5:7])
    assert (head_of(cache).rows, head_of(cache).waiting) == (0, 7)
    fresh = after(runner, TOKENS[:7])
    for kind in (BEFORE, AFTER):
        assert (head_of(cache).peek(7, kind) - head_of(fresh).peek(7, kind)).abs().max() < 1e-4


@pytest.mark.parametrize("kept", [(), (0,), (0, 1), (0, 2)])
def test_a_rollback_keeps_the_states_of_the_accepted_tokens(kept: tuple[int, ...], runner: ModelRunner) -> None:
    """Drafts of a chain; with a gap, what is kept was computed behind a token that is not."""
    base, drafts = TOKENS[:5], TOKENS[5:8]
    cache = after(runner, base)
    cache.mark()
    runner.run([PassInput(cache, drafts, every=True)])
    assert head_of(cache).waiting == 5
    cache.rollback(5, kept)
    assert head_of(cache).waiting == cache.tokens == 5 + len(kept)
    if list(kept) == list(range(len(kept))):
        fresh = after(runner, TOKENS[: 5 + len(kept)])
        found, expected = (head_of(each).peek(cache.tokens, AFTER) for each in (cache, fresh))
        assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("read", [0, 3, 5])
@pytest.mark.parametrize("tokens", [2, 4, 5])
def test_a_cut_and_a_copy_of_a_sequence_take_its_head_along(read: int, tokens: int, runner: ModelRunner) -> None:
    """Short enough for windows to be cut. Where no row was read of what is left out, the head goes on as if fresh."""
    cache = after(runner, TOKENS[:5], read)
    assert cache.can_crop()
    copy = cache.fork(tokens, 32)
    cache.crop(tokens)
    for each in (cache, copy):
        own = head_of(each)
        assert own.rows + own.waiting == each.tokens == tokens
        assert own.rows < tokens or tokens == 5
    if read < tokens:
        fresh = after(runner, TOKENS[:tokens], read)
        follow = [*TOKENS[:tokens], 9]
        expected = read_on(runner, fresh, follow, tokens - read)
        for each in (cache, copy):
            assert (read_on(runner, each, follow, tokens - read) - expected).abs().max() < 1e-4


def test_a_whole_copy_drafts_like_the_original(runner: ModelRunner) -> None:
    """Longer than windows; the original goes on meanwhile."""
    cache = after(runner, TOKENS, read=15)
    copy = cache.fork(len(TOKENS), 64)
    runner.step(cache, [9])
    read_on(runner, cache, [*TOKENS, 9, 11], 6)
    own = head_of(copy)
    assert (own.rows, own.waiting) == (15, 5)
    fresh = after(runner, TOKENS, read=15)
    expected = read_on(runner, fresh, [*TOKENS, 9], 5)
    assert (read_on(runner, copy, [*TOKENS, 9], 5) - expected).abs().max() < 1e-4


def test_a_window_of_the_heads_that_is_full_is_not_cut(runner: ModelRunner) -> None:
    """gpt-oss's head is like its last layer, which has no window; what it has is as with the model's own."""
    cache = after(runner, TOKENS, read=20)
    windows = [type(layer) is WindowLayer for layer in (*cache.kv.layers, *head_of(cache).kv.layers)]
    assert cache.can_crop() is not any(windows)
