"""What to bring before anything is known of the text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgemoe.cache.record import ExpertId


def fill_order(
    experts: Sequence[int], slots: int, heat: Mapping[ExpertId, float] | None = None
) -> list[tuple[int, int]]:
    """The first `slots` experts, as (layer, index), that an idle link should bring into free slots.

    `experts[layer]` is the number of experts of each layer. Every layer gets an equal share, in the order
    in which a pass reaches the layers, so that whatever fits is spread evenly and, where everything fits,
    everything is resident in the end. Within its share a layer's hottest experts come first, then those of which
    no heat is known, by their number. Heat is never compared between layers, so it may be known for some only.
    """
    known = heat or {}
    ranked = [
        sorted(range(count), key=lambda index: -known.get(ExpertId(layer, index), -math.inf))
        for layer, count in enumerate(experts)
    ]
    rounds = range(max(experts, default=0))
    order = [(layer, ranked[layer][place]) for place in rounds for layer, count in enumerate(experts) if place < count]
    return sorted(order[:slots], key=lambda expert: expert[0])
