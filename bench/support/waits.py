"""How fast a link is while somebody waits for it: pieces and waits recorded, then laid over each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgemoe.cache import ExpertId, Link, Transfer
from edgemoe.cache.store import ExpertStore, Piece

Interval = tuple[float, float]


class WaitRecorder:
    """Records every piece that a store moves and every wait for a link, from when it is made."""

    def __init__(self, store: ExpertStore, link: Link) -> None:
        self.pieces: list[tuple[float, float, int]] = []
        self.waits: list[Interval] = []
        store.pieces = self._recorded(store.pieces)  # type: ignore[method-assign]
        link.wait_any = self._waited(link.wait_any)  # type: ignore[method-assign]

    def waited_bandwidth(self) -> float:
        """Bytes/s during the waits: each piece counts with the part of its time that falls into one."""
        total = sum(stop - start for start, stop in self.waits)
        moved = 0.0
        for start, stop, nbytes in self.pieces:
            shared = sum(max(0.0, min(stop, end) - max(start, begin)) for begin, end in self.waits)
            moved += nbytes * shared / max(stop - start, 1e-9)
        return moved / max(total, 1e-9)

    def _recorded(
        self, pieces: Callable[[ExpertId, torch.Tensor], Sequence[Piece]]
    ) -> Callable[[ExpertId, torch.Tensor], Sequence[Piece]]:
        def timed(nbytes: int, move: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                start = time.perf_counter()
                move()
                self.pieces.append((start, time.perf_counter(), nbytes))

            return run

        return lambda expert, slot: [(nbytes, timed(nbytes, move)) for nbytes, move in pieces(expert, slot)]

    def _waited(self, wait_any: Callable[[Sequence[Transfer]], Any]) -> Callable[[Sequence[Transfer]], Any]:
        def run(transfers: Sequence[Transfer]) -> Any:
            start = time.perf_counter()
            arrived = wait_any(transfers)
            self.waits.append((start, time.perf_counter()))
            return arrived

        return run
