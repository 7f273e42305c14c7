"""Layers of the past that take back what was drafted, against lists of rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.row_layers import GrowingLayer, WindowLayer

WINDOWS = [None, 2, 3, 6, 17, 100]


def tensors(rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, [1, 2 heads, tokens, width], that say which rows they are; the two widths differ."""
    keys = torch.tensor(rows, dtype=torch.float32)[None, None, :, None].expand(1, 2, len(rows), 3).clone()
    return keys, -keys[..., :2]


class Oracle:
    """Every row there ever was, by number. What a layer with `window` holds follows from that."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.rows: list[int] = []
        self.base: int | None = None

    @property
    def held(self) -> list[int]:
        """The rows that are held between passes: between `draft` and `keep` everything since, too."""
        end = len(self.rows) if self.base is None else self.base
        first = 0 if self.window is None else max(0, end - self.window + 1)
        return self.rows[first:]

    def keep(self, kept: Sequence[int]) -> None:
        assert self.base is not None
        self.rows = self.rows[: self.base] + [self.rows[self.base + row] for row in kept]
        self.base = None


class Pair:
    """A layer and its oracle, driven together."""

    def __init__(self, window: int | None, capacity: int = 4) -> None:
        self.oracle = Oracle(window)
        self.layer = GrowingLayer(capacity) if window is None else WindowLayer(window)
        self._numbers = iter(range(1, 10_000))

    def append(self, count: int) -> None:
        held = self.oracle.held
        assert self.layer.get_mask_sizes(count) == (len(held) + count, len(self.oracle.rows) - len(held))
        new = [next(self._numbers) for _ in range(count)]
        keys, values = self.layer.update(*tensors(new))
        self.oracle.rows += new
        assert_rows(keys, values, [*held, *new])
        self.check()

    def draft(self) -> None:
        self.layer.mark()
        self.oracle.base = len(self.oracle.rows)

    def keep(self, kept: Sequence[int]) -> None:
        assert self.oracle.base is not None
        self.layer.rollback(self.oracle.base, kept)
        self.oracle.keep(kept)
        self.check()

    def check(self) -> None:
        assert self.layer.get_seq_length() == len(self.oracle.rows)
        if self.layer.keys is not None:
            assert_rows(self.layer.keys, self.layer.values, self.oracle.held)
        else:
            assert self.oracle.rows == []


def assert_rows(keys: torch.Tensor | None, values: torch.Tensor | None, rows: Sequence[int]) -> None:
    assert keys is not None
    assert values is not None
    expected = tensors(rows)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("seed", range(4))
def test_random_drafts_are_taken_back_row_by_row(seed: int, window: int | None) -> None:
    """Cycles of plain passes, several draft passes, a second draft after an empty `keep`, and any rows kept."""
    draw = random.Random(seed)
    pair = Pair(window, capacity=draw.choice([1, 8, 200]))
    for _ in range(25):
        for _ in range(draw.randint(0, 2)):
            pair.append(draw.choice([1, 1, 2, 9]))
        for kept_all in (False, True)[draw.randint(0, 1) :]:
            pair.draft()
            drafted = 0
            for _ in range(draw.randint(0, 3)):
                count = draw.choice([1, 2, 5])
                pair.append(count)
                drafted += count
            pair.keep(sorted(draw.sample(range(drafted), draw.randint(0, drafted))) if kept_all else [])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [2, 3, 6, 17])
def test_without_drafts_a_window_is_transformers_own(window: int, seed: int) -> None:
    draw = random.Random(seed)
    own, plain = WindowLayer(window), DynamicSlidingWindowLayer(sliding_window=window)
    assert (own.is_sliding, own.sliding_window) == (plain.is_sliding, plain.sliding_window)
    for number in range(20):
        count = draw.choice([1, 1, 2, 5, 20])
        assert own.get_mask_sizes(count) == plain.get_mask_sizes(count)
        new = tensors([100 * number + row for row in range(count)])
        for found, expected in zip(own.update(*new), plain.update(*new), strict=True):
            assert torch.equal(found, expected)
        if plain.get_seq_length() < window and draw.random() < 0.5:
            own.crop(-1)
            plain.crop(-1)
        assert own.get_seq_length() == plain.get_seq_length()
        for kept, right in ((own.keys, plain.keys), (own.values, plain.values)):
            assert kept is not None
            assert right is not None
            assert torch.equal(kept, right)
    own.reset()
    assert (own.get_seq_length(), own.get_mask_sizes(3)) == (0, (3, 0))


@pytest.mark.parametrize("window", [None, 4])
def test_a_layer_that_no_pass_has_reached_keeps_nothing(window: int | None) -> None:
    """As after a drafting pass that failed in an earlier layer."""
    pair = Pair(window)
    pair.draft()
    pair.keep([])
    pair.append(3)
    pair.draft()
    pair.keep([])
    pair.append(7)


def test_a_window_trims_again_after_a_draft() -> None:
    """Else a layer that once drafted would hold all rows from then on."""
    pair = Pair(3)
    pair.append(5)
    pair.draft()
    pair.append(4)
    assert pair.layer.keys is not None
    assert pair.layer.keys.shape[-2] == 2 + 4
    pair.keep([0])
    pair.append(10)
    assert pair.layer.keys.shape[-2] == 2


def test_rows_that_are_kept_move_up_within_the_buffer() -> None:
    layer = GrowingLayer(32)
    keys, _ = layer.update(*tensors([1, 2, 3]))
    layer.mark()
    layer.update(*tensors([4, 5, 6, 7]))
    layer.rollback(3, [0, 2, 3])
    assert layer.keys is not None
    assert layer.keys.data_ptr() == keys.data_ptr(), "nothing but the kept rows is copied"
    assert_rows(layer.keys, layer.values, [1, 2, 3, 4, 6, 7])


def past_of(layers: Sequence[GrowingLayer | WindowLayer], capacity: int) -> SequenceCache:
    cache = DynamicCache()
    cache.layers = list(layers)
    return SequenceCache(cache, capacity)


def append(cache: SequenceCache, rows: Sequence[int]) -> None:
    with torch.inference_mode():
        for layer in cache.kv.layers:
            layer.update(*tensors(rows))
    cache.tokens += len(rows)


def assert_holds(cache: SequenceCache, rows: Sequence[int]) -> None:
    assert cache.tokens == len(rows)
    for layer in cache.kv.layers:
        window = getattr(layer, "sliding_window", None)
        assert layer.get_seq_length() == len(rows)
        assert_rows(layer.keys, layer.values, rows if window is None else rows[-window + 1 :])


def test_a_past_keeps_the_same_rows_in_all_of_its_layers() -> None:
    cache = past_of([GrowingLayer(8), WindowLayer(3), WindowLayer(9), GrowingLayer(8)], 8)
    assert cache.can_roll_back
    append(cache, range(1, 6))
    cache.mark()
    append(cache, [6, 7])
    append(cache, [8, 9, 10])
    cache.rollback(5, [0, 2, 4])
    assert_holds(cache, [1, 2, 3, 4, 5, 6, 8, 10])
    append(cache, [11])
    assert_holds(cache, [1, 2, 3, 4, 5, 6, 8, 10, 11])


@pytest.mark.parametrize("tokens", [2, 5, 12])
def test_copies_and_cuts_after_a_draft_are_those_of_a_plain_past(tokens: int) -> None:
    """A copy of what was kept, which does not change with the original, and no memory of what was dropped."""
    cache = past_of([GrowingLayer(8), WindowLayer(6)], 8)
    append(cache, range(1, tokens + 1))
    cache.mark()
    append(cache, [50, 51, 52])
    cache.rollback(tokens, [1])
    kept = [*range(1, tokens + 1), 51]
    assert cache.can_crop() == (len(kept) < 6)
    copy = cache.fork(len(kept), 40)
    append(cache, [60])
    assert_holds(copy, kept)
    copy.mark()
    append(copy, [70, 71])
    copy.rollback(len(kept), [0])
    assert_holds(copy, [*kept, 70])
    assert_holds(cache, [*kept, 60])
    copy.trim()
    held = copy.kv.layers[1].keys
    assert held.untyped_storage().nbytes() == held.nbytes
    if tokens == 2:
        shorter = cache.fork(2, 8)
        assert_holds(shorter, kept[:2])
        cache.crop(3)
        append(cache, [80])
        assert_holds(cache, [*kept, 80])


def test_keeping_nothing_gives_back_what_there_was_bit_for_bit() -> None:
    layers: list[GrowingLayer | WindowLayer] = [GrowingLayer(4), WindowLayer(4)]
    cache = past_of(layers, 4)
    append(cache, range(1, 10))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.kv.layers]
    for _ in range(3):
        cache.mark()
        append(cache, [20, 21, 22])
        append(cache, [23])
        cache.rollback(9)
    for layer, (keys, values) in zip(cache.kv.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert cache.tokens == 9


def test_only_rows_can_be_drafted_upon() -> None:
    from transformers.cache_utils import LinearAttentionLayer

    assert not past_of([GrowingLayer(4), LinearAttentionLayer()], 4).can_roll_back  # type: ignore[list-item]
    assert not past_of([DynamicSlidingWindowLayer(sliding_window=4)], 4).can_roll_back  # type: ignore[list-item]
    assert not SequenceCache(None, 4).can_roll_back
    assert past_of([WindowLayer(4)], 4).can_roll_back
