"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 1 << 10, "MIB": 1 << 20,
         "GIB": 1 << 30, "TIB": 1 << 40, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "6GiB", "500 MB" or "2G" (binary). Raises ValueError for any other form."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"{text!r} is not a size such as 6GiB or 500MB")
    try:
        return int(float(match[1]) * UNITS[match[2].upper()])
    except OverflowError:
        raise ValueError(f"{text[:20]!r}… is too large for a size") from None


def format_bytes(count: float) -> str:
    """`count` bytes for people, in binary units: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
