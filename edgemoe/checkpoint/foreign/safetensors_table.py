"""The header of a safetensors file: the place, shape and dtype of each tensor, checked. Loads no tensor."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from edgemoe.checkpoint.foreign.foreign_file import open_file
from edgemoe.checkpoint.foreign.foreign_json import parse_json
from edgemoe.checkpoint.tensor_entry import TensorEntry
from edgemoe.errors import CheckpointError
from edgemoe.values import shown

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The supported dtypes of safetensors files."""
HEADER_LIMIT = 100 << 20
"""The safetensors format's limit of a header, in bytes; a larger one means a damaged file or another format."""
MAX_DIMENSIONS = 8
"""Dimensions of a tensor: those of published weights have 5 at most."""
MAX_NAME = 1000
"""Characters of a tensor's name."""
AGAIN = "fetch it again"


def read_table(file: Path, number: int) -> Iterator[tuple[str, TensorEntry]]:
    """Yields the name and entry of each tensor of a safetensors file, which is number `number` of its checkpoint.

    Raises CheckpointError for a damaged or truncated file, for tensors that overlap or leave holes, which the format
    does not allow, and for a tensor of an unsupported dtype.
    """
    size, text = _header(file)
    try:
        header = parse_json(text, unique=True, depth=None, finite=True)
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(header, dict):
        raise _damaged(file, "no table")
    data = 8 + len(text)
    places = []
    for key, record in header.items():
        if key == "__metadata__":
            continue
        start, stop = _place(file, key, record)
        if data + stop > size:
            raise CheckpointError(
                f"{file} is truncated: {key} ends at byte {data + stop} and the file at {size}: {AGAIN}"
            )
        if record["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{file}: {key} has dtype {record['dtype']}: only bf16, fp16 and fp32 weights and packed ones are read"
            )
        dtype = DTYPES[record["dtype"]]
        places.append((start, stop, key))
        yield key, TensorEntry(number, data + start, stop - start, tuple(record["shape"]), dtype)
    _check_places(file, places)


def _place(file: Path, key: str, record: Any) -> tuple[int, int]:
    """Where the tensor's bytes begin and end, after the header. Raises CheckpointError unless all of it is sound."""
    try:
        start, stop = record["data_offsets"]
        shape, name = record["shape"], record["dtype"]
        sound = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and len(key) <= MAX_NAME
        sound = sound and all(type(side) is int and 0 <= side < 1 << 63 for side in [*shape, start, stop])
        sound = sound and isinstance(name, str) and start <= stop
        if sound and name in DTYPES:
            sound = stop - start == math.prod(shape) * DTYPES[name].itemsize
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise _damaged(file, f"at {shown(key)}: {shown(record)}")
    return start, stop


def _check_places(file: Path, places: list[tuple[int, int, str]]) -> None:
    """Raises CheckpointError unless the tensors follow one another, as the format demands."""
    end = 0
    for start, stop, key in sorted(places):
        if start != end:
            what = "overlaps another tensor" if start < end else f"leaves a hole of {start - end} bytes before it"
            raise _damaged(file, f"{shown(key)} {what}")
        end = stop


def _header(file: Path) -> tuple[int, bytes]:
    """The size of a safetensors file, and the text of its header."""
    stream, size = open_file(file)
    try:
        with stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else HEADER_LIMIT + 1
            if length <= min(HEADER_LIMIT, max(0, size - 8)):
                return size, stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error}): give it to this user") from error
    raise CheckpointError(f"{file} is truncated or no safetensors file ({size} bytes): {AGAIN}")


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} has a damaged header ({what}): {AGAIN}")
