from __future__ import annotations

from edgemoe.cache import ExpertId
from edgemoe.prefetch.fill import fill_order


def test_fill_order_spreads_evenly_and_goes_in_layer_order() -> None:
    assert fill_order([4, 4], 3) == [(0, 0), (0, 1), (1, 0)]
    assert fill_order([4, 4], 5) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_fill_order_names_everything_once_where_everything_fits() -> None:
    experts = [2, 5, 1]
    everything = [(layer, index) for layer, count in enumerate(experts) for index in range(count)]
    assert fill_order(experts, 8) == everything
    assert fill_order(experts, 100) == everything


def test_fill_order_gives_the_room_of_a_short_layer_to_the_others() -> None:
    assert fill_order([1, 3], 4) == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert fill_order([], 4) == []
    assert fill_order([3], 0) == []


def test_fill_order_of_the_layers_that_share_slots() -> None:
    assert fill_order([4, 4, 4], 3, layers=[0, 2]) == [(0, 0), (0, 1), (2, 0)]
    assert fill_order([1, 4, 2], 99, {ExpertId(2, 1): 1.0}, [2, 0]) == [(0, 0), (2, 1), (2, 0)]
    assert fill_order([4, 4], 3, layers=[]) == []
