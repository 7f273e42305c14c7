"""How fast a link is while somebody waits for it: pieces and waits recorded, then laid over each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from edgemoe.cache import ExpertId, Link, Transfer
from edgemoe.cache.store import ExpertStore, Piece

Interval = tuple[float, float]


class WaitRecorder:
    """Records every piece that a store moves and every wait for a link, from when it is made."""

    def __init__(self, store: ExpertStore, link: Link) -> None:
        self.pieces: list[tuple[float, float, int]] = []
        self.waits: list[Interval] = []
        self._record_pieces(store)
        self._record_waits(link)

    def waited_bandwidth(self) -> float:
        """Bytes/s during the waits: each piece counts with the part of its time that falls into one."""
        total = sum(stop - start for start, stop in self.waits)
        moved = 0.0
        for start, stop, nbytes in self.pieces:
            shared = sum(max(0.0, min(stop, end) - max(start, begin)) for begin, end in self.waits)
            moved += nbytes * shared / max(stop - start, 1e-9)
        return moved / max(total, 1e-9)

    def _record_pieces(self, store: ExpertStore) -> None:
        def timed(nbytes: int, move: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                start = time.perf_counter()
                move()
                self.pieces.append((start, time.perf_counter(), nbytes))

            return run

        def pieces(expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
            return [(nbytes, timed(nbytes, move)) for nbytes, move in untimed(expert, slot)]

        untimed = store.pieces
        store.pieces = pieces  # type: ignore[method-assign]

    def _record_waits(self, link: Link) -> None:
        def wait_any(transfers: Sequence[Transfer], seconds: float | None = None) -> list[Transfer]:
            start = time.perf_counter()
            arrived = untimed(transfers, seconds)
            self.waits.append((start, time.perf_counter()))
            return arrived

        untimed = link.wait_any
        link.wait_any = wait_any  # type: ignore[method-assign]
