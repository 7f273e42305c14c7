from __future__ import annotations

import pytest

from edgemoe.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1B", 1),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("1k", 1024),
        ("1.5 MiB", 3 << 19),
        ("500MB", 500_000_000),
        ("2G", 2 << 30),
        (" 6GiB ", 6 << 30),
        ("6gib", 6 << 30),
        ("1TB", 10**12),
        ("0.5TiB", 1 << 39),
    ],
)
def test_sizes_as_people_write_them(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "5", "GiB", "-1GiB", "1,5GiB", "6 GiB each", "1e3MB", "6XB", "nanGiB"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (5 << 29, "2.5 GiB"), (1 << 42, "4.0 TiB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
    assert count == 0 or parse_bytes(text) == count
