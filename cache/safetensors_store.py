"""Records read directly from the safetensors files of a checkpoint, without a second copy on disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edgemoe.cache.file_reader import FileChanged, FileIdentity, open_file
from edgemoe.cache.record import ExpertId, RecordLayout, host_bytes
from edgemoe.cache.store import ExpertStore, Piece

PIECE_NBYTES = 2 << 20
"""Maximum bytes per read: large enough for the full disk bandwidth, small enough that a demand load does not wait long
for a piece of a prefetch."""


@dataclass(frozen=True)
class Extent:
    """A tensor, or a slice of one, in a file: `nbytes` bytes from `offset` on in file number `file`.

    `slot_offset` is the offset in bytes in the record; None where the record must be assembled.
    """

    file: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    slot_offset: int | None


Assemble = Callable[[Sequence[torch.Tensor]], Mapping[str, torch.Tensor]]
"""Converts the raw tensors of a record, in the order of its extents, to the parts of its layout by name."""


@dataclass(frozen=True)
class RecordSource:
    """The extents of one record, and the function that assembles it; None where the extents lie as in the layout."""

    extents: tuple[Extent, ...]
    assemble: Assemble | None


class SafetensorsStore(ExpertStore):
    """Positioned reads from the checkpoint's files. Thread-safe.

    `direct` bypasses the page cache where the file system supports it. It is for experts larger than the page cache,
    where caching only costs time and evicts the pages of other processes.

    A file that is written to while it is open is noticed at the next read from it, which raises FileChanged: no read
    ever returns a mix of two checkpoints. A file that is replaced by another one of its name is read on as it was.
    """

    def __init__(
        self,
        files: Sequence[Path],
        layouts: Sequence[RecordLayout],
        sources: Mapping[ExpertId, RecordSource],
        *,
        direct: bool = False,
        identities: Sequence[FileIdentity] = (),
    ) -> None:
        """`identities` are those of the files when their headers were read; without them, those that they have now.

        Raises OSError for a file that cannot be opened, and FileChanged, which is one, for a file that has changed.
        """
        self.layouts = tuple(layouts)
        counts = [0] * len(self.layouts)
        for expert in sources:
            counts[expert.layer] += 1
        self.experts = tuple(counts)
        self._sources = sources
        self._paths = tuple(files)
        self._files = [open_file(path, direct=direct) for path in files]
        self._identities = tuple(identities) or tuple(file.identity for file in self._files)
        try:
            for number in range(len(self._files)):
                self._check(number)
        except OSError:
            self.close()
            raise

    def pieces(self, expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
        """See the base class. A record that must be assembled is one piece; any other is split for parallel reads."""
        source = self._sources[expert]
        if source.assemble is not None:
            nbytes = sum(extent.nbytes for extent in source.extents)
            return [(nbytes, lambda: self._assemble(source, self.layouts[expert.layer], slot))]
        memory = host_bytes(slot)
        return [
            piece
            for extent in source.extents
            if extent.slot_offset is not None
            for piece in self._cut(extent, memory[extent.slot_offset : extent.slot_offset + extent.nbytes])
        ]

    def read(self, expert: ExpertId, start: int, into: torch.Tensor) -> None:
        """Fills `into`, uint8 [n] on the host, with the record's bytes from `start` on, in the calling thread.

        Reads only these bytes, except for a record that must be assembled. Does not write the padding between parts.
        Raises OSError when the record cannot be read.
        """
        source = self._sources[expert]
        stop = start + len(into)
        if source.assemble is not None:
            record = torch.zeros(self.record_nbytes(expert), dtype=torch.uint8)
            self._assemble(source, self.layouts[expert.layer], record)
            into.copy_(record[start:stop])
            return
        memory = host_bytes(into)
        for extent in source.extents:
            if extent.slot_offset is not None:
                first = max(start, extent.slot_offset)
                last = min(stop, extent.slot_offset + extent.nbytes)
                if first < last:
                    at = extent.offset + first - extent.slot_offset
                    self._read(extent.file, at, memory[first - start : last - start])

    def _cut(self, extent: Extent, memory: memoryview) -> list[Piece]:
        def piece(start: int, stop: int) -> Piece:
            return stop - start, lambda: self._read(extent.file, extent.offset + start, memory[start:stop])

        count = -(-extent.nbytes // PIECE_NBYTES)
        bounds = [extent.nbytes * part // count for part in range(count + 1)]
        return [piece(start, stop) for start, stop in itertools.pairwise(bounds)]

    def _read(self, file: int, offset: int, into: memoryview) -> None:
        if self._files[file].read(offset, into) < len(into):
            raise OSError(f"{self._paths[file]} ends before byte {offset + len(into)}, in the middle of an expert")
        # After the read: what was written to the file before it has changed its time.
        self._check(file)

    def _check(self, file: int) -> None:
        if self._files[file].identity != self._identities[file]:
            raise FileChanged(self._paths[file])

    def _assemble(self, source: RecordSource, layout: RecordLayout, slot: torch.Tensor) -> None:
        assert source.assemble is not None
        raw = []
        for extent in source.extents:
            buffer = torch.empty(extent.nbytes, dtype=torch.uint8)
            self._read(extent.file, extent.offset, host_bytes(buffer))
            raw.append(buffer.view(extent.dtype).view(extent.shape))
        parts = source.assemble(raw)
        for name, view in layout.views(slot).items():
            view.copy_(parts[name])

    def close(self) -> None:
        """See the base class."""
        while self._files:
            self._files.pop().close()
