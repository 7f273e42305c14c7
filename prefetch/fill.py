"""What to bring before anything is known of the text."""

from __future__ import annotations

from collections.abc import Sequence


def fill_order(experts: Sequence[int], slots: int) -> list[tuple[int, int]]:
    """The first `slots` experts, as (layer, index), that an idle link should bring into free slots.

    `experts[layer]` is the number of experts of each layer. Every layer gets an equal share, in the order
    in which a pass reaches the layers, so that whatever fits is spread evenly and, where everything fits,
    everything is resident in the end.
    """
    rounds = range(max(experts, default=0))
    order = [(layer, index) for index in rounds for layer, count in enumerate(experts) if index < count]
    return sorted(order[:slots])
