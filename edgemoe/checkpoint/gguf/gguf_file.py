"""The header of a GGUF file: its metadata, and the place and type of each tensor. Loads no tensor.

The format is llama.cpp's (`gguf.md`, versions 2 and 3). Everything that a header says is checked against the size of
the file before it is believed.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from edgemoe.cache.file_reader import FileIdentity
from edgemoe.checkpoint.foreign.foreign_file import check_file, open_file
from edgemoe.errors import CheckpointError
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.gguf_format import BLOCKS, IDS, GgufFormat
from edgemoe.formats.weight_format import WeightFormat
from edgemoe.values import shown

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
"""The struct formats of the metadata's types; 8 is a text, 9 an array."""
TEXT, ARRAY = 8, 9
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""The types of tensors that are plain floats."""
OTHER_TYPES = {
    19: "IQ1_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    40: "NVFP4",
}  # fmt: skip
"""Types that are not read, for messages."""
MAX_HEADER = 64 << 20
"""Bytes that a header may take: those of the largest vocabularies take 20 MB."""
MAX_DIMENSIONS, MAX_ENTRIES, MAX_NESTING = 4, 1 << 17, 2
MAX_VALUES = 1 << 22
"""Values of all arrays: tokens, scores, types and merges of the largest vocabularies are 2 million."""
MAX_NAME = 1000
"""Characters of a name."""
ALIGNMENT = 32
SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: the number of its file, its byte offset there, its shape with the rows first, and its format."""

    file: int
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    format: WeightFormat


@dataclass(frozen=True)
class GgufFile:
    """A model's file, or all files of a split one."""

    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    identities: tuple[FileIdentity, ...] = ()
    """Those of `files` before their headers were read."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata `key` of the architecture, without its name."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_gguf(path: Path) -> GgufFile:
    """The model in `path`, a file or the first one of a split model.

    Raises CheckpointError, with the file and what is wrong, for a damaged or truncated file, for a type of tensor that
    is not read, and for a part of a split model that is missing or is not the first.
    """
    paths = _parts(path)
    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    identities = []
    for number, file in enumerate(paths):
        check_file(file)
        identities.append(FileIdentity.of(file))
        found, own = _read(file, number)
        metadata = metadata or found
        for name, tensor in own.items():
            if name in tensors:
                raise CheckpointError(f"{file}: {name} is in two files of the model: fetch it again")
            tensors[name] = tensor
    count = metadata.get("split.count", len(paths))
    if isinstance(count, int) and count > 1 and count != len(paths):
        raise CheckpointError(f"{path} is one of {count} files: give the first one, named …-00001-of-{count:05}.gguf")
    return GgufFile(tuple(paths), metadata, tensors, tuple(identities))


def _parts(path: Path) -> list[Path]:
    """All files of a split model, of which `path` is the first; else `path` itself."""
    match = SPLIT.match(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    if int(match[2]) != 1:
        raise CheckpointError(f"{path} is a later part of a split model: give the first one, -00001-of-{match[3]}.gguf")
    parts = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    missing = [part for part in parts if not part.exists()]
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} of {count} parts, {missing[0].name} first: fetch it again")
    return parts


def _read(path: Path, number: int) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    stream, size = open_file(path)
    try:
        with stream:
            return _Header(path, stream, size).read(number)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): give it to this user") from error


class _Header:
    """Reads one header from its beginning to its end."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path = path
        self._stream = stream
        self._size = size
        self._limit = min(size, MAX_HEADER)
        self._at = 0
        self._values = 0
        """Values of arrays read so far."""

    def read(self, number: int) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """The metadata and the tensors of file `number`."""
        if self._take(4) != MAGIC:
            raise CheckpointError(f"{self._path} does not begin as a GGUF file: fetch it again")
        version = self._number("<I")
        if version not in VERSIONS:
            raise self._damaged(f"version {version}, and 2 and 3 are read")
        tensors, entries = self._number("<Q"), self._number("<Q")
        if max(tensors, entries) > MAX_ENTRIES:
            raise self._damaged(f"{tensors} tensors and {entries} entries")
        metadata = {}
        for _ in range(entries):
            key = self._name()
            if key in metadata:
                raise self._damaged(f"{shown(key)} twice")
            metadata[key] = self._value(self._number("<I"), 0)
        table = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise self._damaged(f"an alignment of {alignment}")
        start = -(-self._at // alignment) * alignment
        return metadata, self._placed(table, start, number)

    def _placed(
        self, table: Sequence[tuple[str, tuple[int, ...], WeightFormat, int, int]], start: int, number: int
    ) -> dict[str, GgufTensor]:
        """The tensors with their places in the file, none of which may overlap another."""
        found: dict[str, GgufTensor] = {}
        end = start
        for name, shape, kind, offset, nbytes in sorted(table, key=lambda row: row[3]):
            place = start + offset
            if name in found or place < end:
                raise self._damaged(f"{name} overlaps another tensor")
            end = place + nbytes
            if end > self._size:
                raise CheckpointError(
                    f"{self._path} is truncated: {name} ends at byte {end} and the file at {self._size}: fetch it again"
                )
            found[name] = GgufTensor(number, place, nbytes, shape, kind)
        return found

    def _tensor(self) -> tuple[str, tuple[int, ...], WeightFormat, int, int]:
        name = self._name()
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._damaged(f"{name} with {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        kind, offset = self._number("<I"), self._number("<Q")
        values = math.prod(shape)
        if not 0 < values < 1 << 50:
            raise self._damaged(f"{name} of shape {list(shape)}")
        if kind in FLOATS:
            return name, shape, FloatFormat(FLOATS[kind]), offset, values * FLOATS[kind].itemsize
        if kind not in IDS:
            told = OTHER_TYPES.get(kind, f"number {kind}")
            raise CheckpointError(f"{self._path}: {name} is of the type {told}, which is not read: use another file")
        block, nbytes = BLOCKS[IDS[kind]]
        if shape[-1] % block:
            raise self._damaged(f"{name} with rows of {shape[-1]} in blocks of {block}")
        return name, shape, GgufFormat(IDS[kind]), offset, values // block * nbytes

    def _value(self, kind: int, depth: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == TEXT:
            return self._text()
        if kind != ARRAY or depth >= MAX_NESTING:
            raise self._damaged(f"metadata of the type {kind}")
        inner, count = self._number("<I"), self._number("<Q")
        self._values += count
        if count > self._limit - self._at or self._values > MAX_VALUES:
            raise self._damaged(f"an array of {count} entries")
        if inner in SCALARS:
            code = SCALARS[inner]
            return list(struct.unpack(f"<{count}{code[1:]}", self._take(count * struct.calcsize(code))))
        read: Callable[[], Any] = self._text if inner == TEXT else lambda: self._value(inner, depth + 1)
        return [read() for _ in range(count)]

    def _name(self) -> str:
        found = self._text()
        if len(found) > MAX_NAME:
            raise self._damaged(f"a name of {len(found)} characters")
        return found

    def _text(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8", errors="replace")

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _take(self, count: int) -> bytes:
        if count > self._limit - self._at:
            raise CheckpointError(
                f"{self._path} has a header beyond byte {self._limit}: it is truncated or damaged, fetch it again"
            )
        self._at += count
        return self._stream.read(count)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} has a damaged header ({what}): fetch it again")
