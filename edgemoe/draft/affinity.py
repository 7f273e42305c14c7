"""Which experts of a layer resemble one another most.

SpecMoE drafts with what is resident: a chosen expert that is not is replaced by the resident one most similar to
it, by the L2 distance between their weights. Inner neurons of an expert may be permuted without changing what it
computes; as in the paper, that is ignored, so two experts that only differ by it count as far apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from edgemoe.cache.record import ExpertId, RecordLayout
from edgemoe.cache.safetensors_store import SafetensorsStore
from edgemoe.checkpoint.checkpoint import WEIGHT_DTYPES
from edgemoe.errors import CheckpointError
from edgemoe.results import Progress

BUDGET = 128 << 20
"""Bytes of weights that are held at once while distances are computed: an engine beside it may have all the rest."""
FARTHEST = torch.iinfo(torch.int16).max
"""Beyond every rank."""


class Affinity:
    """For every expert of every MoE layer, the others of its layer in the order of their distance. Immutable.

    `ranks[layer]` is int16 [experts, experts]: in row e, column o is how many experts are nearer to e than o is.
    An expert is nearest to itself, and of equally distant ones the one with the lower number is nearer.
    """

    def __init__(self, ranks: Sequence[torch.Tensor]) -> None:
        self.ranks = tuple(ranks)

    @classmethod
    def from_distances(cls, distances: Sequence[torch.Tensor]) -> Affinity:
        """From the distances within each layer, [experts, experts] in any float dtype; any increasing scale will do."""
        return cls([_ranks(layer) for layer in distances])

    @property
    def experts(self) -> tuple[int, ...]:
        """Experts in each MoE layer."""
        return tuple(len(layer) for layer in self.ranks)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers: 2 a pair of experts."""
        return sum(layer.nbytes for layer in self.ranks)

    def most_similar(self, layer: int, resident: torch.Tensor) -> torch.Tensor:
        """For each expert of `layer` the most similar resident one, int64 [experts]: itself where it is resident.

        `resident` is bool [experts] on the CPU. Raises ValueError where no expert is resident.
        """
        if not resident.any():
            raise ValueError(f"no expert of layer {layer} is resident, so none can stand in for another")
        return self.ranks[layer].masked_fill(~resident, FARTHEST).argmin(dim=1)


def compute(
    store: SafetensorsStore,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    budget: int = BUDGET,
) -> Affinity | None:
    """Compares all experts of `store`, layer after layer; None when `cancelled` said so before the end.

    Every part of a record counts, in float32. Each weight is read once (records that must be assembled, once a
    block), and at most `budget` bytes of them are held. May run in any thread; `on_progress` is told the bytes that
    have been read. Raises CheckpointError for weights that are not bf16, fp16 or fp32, or not finite, and OSError when
    the files cannot be read.
    """
    _refuse_other_dtypes(store.layouts)
    shapes = list(zip(store.layouts, store.experts, strict=True))
    total = sum(part.nbytes * count for layout, count in shapes for part in layout.parts)
    done = 0
    distances = []
    for layer, (layout, count) in enumerate(shapes):
        products = torch.zeros(count, count, dtype=torch.float64)
        for block in _blocks(layout, count, budget):
            if cancelled is not None and cancelled():
                return None
            products += _products(store, layer, block)
            done += block.nbytes * count
            if on_progress is not None:
                on_progress(Progress("affinity", done, total))
        if not products.isfinite().all():
            raise CheckpointError(f"the experts of MoE layer {layer} have weights that are not finite: fetch it again")
        squares = products.diagonal()
        distances.append(squares[:, None] + squares[None, :] - 2 * products)
    return Affinity.from_distances(distances)


class _Block(NamedTuple):
    """Some of a record's bytes, all of one part, and the dtype of the numbers in them."""

    start: int
    nbytes: int
    dtype: torch.dtype


def _blocks(layout: RecordLayout, experts: int, budget: int) -> Iterator[_Block]:
    """Cuts a record so that a block of `experts` records, as stored and in float32, stays within `budget` bytes."""
    for part, offset in zip(layout.parts, layout.offsets, strict=True):
        size = part.dtype.itemsize
        # At least a cache line, so that a tiny budget costs time and not the result.
        step = max(64, budget // (experts * (size + 4)) * size)
        for start in range(0, part.nbytes, step):
            yield _Block(offset + start, min(step, part.nbytes - start), part.dtype)


def _products(store: SafetensorsStore, layer: int, block: _Block) -> torch.Tensor:
    """The inner products of a block's weights, float64 [experts, experts], after their mean was taken off.

    Distances do not change by that, and what is common to all experts no longer drowns what is not.
    """
    raw = torch.empty(store.experts[layer], block.nbytes, dtype=torch.uint8)
    for number, row in enumerate(raw):
        store.read(ExpertId(layer, number), block.start, row)
    weights = raw.view(block.dtype).float()
    weights -= weights.mean(dim=0)
    return (weights @ weights.t()).double()


def _ranks(distances: torch.Tensor) -> torch.Tensor:
    """int16 [experts, experts] from distances: see `Affinity`."""
    # Rounding may leave a twin nearer than the expert itself.
    own = torch.eye(len(distances), dtype=torch.bool)
    order = distances.masked_fill(own, -torch.inf).argsort(dim=1, stable=True)
    return order.argsort(dim=1).to(torch.int16)


def _refuse_other_dtypes(layouts: Sequence[RecordLayout]) -> None:
    for layer, layout in enumerate(layouts):
        for part in layout.parts:
            if part.dtype not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{part.name} of MoE layer {layer} is stored as {part.dtype}: only experts in bf16, fp16 or fp32 "
                    "can be compared"
                )
