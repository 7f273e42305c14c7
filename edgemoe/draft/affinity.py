"""How similar the experts of a layer are to one another.

SpecMoE drafts with resident experts: the resident expert whose weights are closest in L2 distance replaces a chosen
expert that is not resident. As in the paper, the order of an expert's inner neurons matters, although permuting them
does not change what the expert computes.
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

BUFFER_NBYTES = 128 << 20
"""Bytes of weights in memory at once while distances are computed: an engine may need the rest of the memory."""
MAX_RANK = torch.iinfo(torch.int16).max
"""Greater than every rank."""


class Affinity:
    """The experts of every MoE layer, ranked by their similarity to each expert of the layer. Immutable."""

    def __init__(self, ranks: Sequence[torch.Tensor]) -> None:
        self.ranks = tuple(ranks)
        """By layer, int16 [experts, experts]: row e, column o is the number of experts more similar to e than o is.

        An expert is most similar to itself. Of equally distant experts the one with the lower number ranks first.
        """

    @classmethod
    def from_distances(cls, distances: Sequence[torch.Tensor]) -> Affinity:
        """Ranks experts by the distances within each layer, [experts, experts] in any float dtype, squared or not."""
        return cls([_ranks(layer) for layer in distances])

    @property
    def experts(self) -> tuple[int, ...]:
        """The number of experts of each MoE layer."""
        return tuple(len(layer) for layer in self.ranks)

    @property
    def nbytes(self) -> int:
        """Bytes of all ranks: 2 per pair of experts."""
        return sum(layer.nbytes for layer in self.ranks)

    def most_similar(self, layer: int, resident: torch.Tensor) -> torch.Tensor:
        """The most similar resident expert of each expert of `layer`, int64 [experts]; a resident expert's is itself.

        `resident` is bool [experts] on the CPU. Raises ValueError when no expert is resident.
        """
        if not resident.any():
            raise ValueError(f"no expert of layer {layer} is resident, so none can replace another")
        return self.ranks[layer].masked_fill(~resident, MAX_RANK).argmin(dim=1)


def compute(
    store: SafetensorsStore,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    buffer_nbytes: int = BUFFER_NBYTES,
) -> Affinity | None:
    """Compares all experts of each layer of `store`; None once `cancelled` returns True.

    All parts of a record are compared, in float32. Each weight is read once (once per block in records that must be
    assembled), with at most `buffer_nbytes` bytes of weights in memory. May run in any thread; `on_progress` gets the
    bytes read so far. Raises CheckpointError for weights that are not bf16, fp16 or fp32, or not finite, and OSError
    when a file cannot be read.
    """
    _refuse_other_dtypes(store.layouts)
    shapes = list(zip(store.layouts, store.experts, strict=True))
    total = sum(part.nbytes * count for layout, count in shapes for part in layout.parts)
    done = 0
    distances = []
    for layer, (layout, count) in enumerate(shapes):
        products = torch.zeros(count, count, dtype=torch.float64)
        for block in _blocks(layout, count, buffer_nbytes):
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
    """A range of a record's bytes within one part, and the part's dtype."""

    start: int
    nbytes: int
    dtype: torch.dtype


def _blocks(layout: RecordLayout, experts: int, buffer_nbytes: int) -> Iterator[_Block]:
    """Blocks that cover a record; one block of `experts` records, stored and in float32, fits in `buffer_nbytes`."""
    for part, offset in zip(layout.parts, layout.offsets, strict=True):
        size = part.dtype.itemsize
        # At least a cache line, also where the buffer is too small for one.
        step = max(64, buffer_nbytes // (experts * (size + 4)) * size)
        for start in range(0, part.nbytes, step):
            yield _Block(offset + start, min(step, part.nbytes - start), part.dtype)


def _products(store: SafetensorsStore, layer: int, block: _Block) -> torch.Tensor:
    """The inner products of a block's weights, float64 [experts, experts], less the mean over the experts.

    Subtracting the mean changes no distance, and keeps the precision of small differences between large weights.
    """
    raw = torch.empty(store.experts[layer], block.nbytes, dtype=torch.uint8)
    for number, row in enumerate(raw):
        store.read(ExpertId(layer, number), block.start, row)
    weights = raw.view(block.dtype).float()
    weights -= weights.mean(dim=0)
    return (weights @ weights.t()).double()


def _ranks(distances: torch.Tensor) -> torch.Tensor:
    """`Affinity.ranks` of one layer from its distances, [experts, experts]."""
    # By rounding, an identical expert may have a smaller distance than the expert itself.
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
