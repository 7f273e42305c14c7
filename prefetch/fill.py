"""Which experts fill the free slots at the start, before any text is known."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from edgemoe.cache.record import ExpertId


def fill_order(
    experts: Sequence[int],
    slots: int,
    heat: Mapping[ExpertId, float] | None = None,
    layers: Collection[int] | None = None,
) -> list[tuple[int, int]]:
    """The first `slots` experts to load into free slots, as (layer, index in the layer), in the order of loading.

    `experts[layer]` is the number of experts of each layer. `layers` are those whose records the slots hold, None for
    all. These layers get equal shares, apart from those with fewer
    experts, and are loaded in the order of a pass. Within a layer the hottest experts come first, then those without
    heat by index. Heats of different layers are never compared, so `heat` may cover some layers only.
    """
    known = heat or {}
    ranked = [
        sorted(range(count), key=lambda index: -known.get(ExpertId(layer, index), -math.inf))
        for layer, count in enumerate(experts)
    ]
    ranks = range(max(experts, default=0))
    filled = sorted(range(len(experts)) if layers is None else layers)
    order = [(layer, ranked[layer][rank]) for rank in ranks for layer in filled if rank < experts[layer]]
    return sorted(order[:slots], key=lambda expert: expert[0])
