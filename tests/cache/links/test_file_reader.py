from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgemoe.cache.file_reader import BLOCK, DirectReader, open_file

SIZE = 5 * BLOCK + 123
DATA = random.Random(0).randbytes(SIZE)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("direct", [False, True])
def test_any_stretch_is_read_exactly(file: Path, direct: bool) -> None:
    reader = open_file(file, direct=direct)
    draw = random.Random(1)
    edges = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, SIZE - 1, SIZE]
    stretches = [(first, last) for first in edges for last in edges if first < last]
    for _ in range(50):
        first, last = sorted(draw.sample(range(SIZE), 2))
        stretches.append((first, last))
    for first, last in stretches:
        into = bytearray(last - first)
        assert reader.read(first, memoryview(into)) == last - first
        assert into == DATA[first:last]
    reader.close()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("offset", "found"), [(SIZE - 10, 10), (SIZE - BLOCK, BLOCK), (SIZE, 0), (SIZE + BLOCK, 0)])
def test_the_files_end_cuts_a_read_and_the_rest_is_left_alone(
    file: Path, direct: bool, offset: int, found: int
) -> None:
    reader = open_file(file, direct=direct)
    into = bytearray(b"\xaa" * (2 * BLOCK))
    assert reader.read(offset, memoryview(into)) == found
    assert into[:found] == DATA[offset : offset + found]
    assert set(into[found:]) == {0xAA}
    reader.close()


@pytest.mark.parametrize("direct", [False, True])
def test_threads_do_not_share_buffers(file: Path, direct: bool) -> None:
    reader = open_file(file, direct=direct)

    def read(seed: int) -> bool:
        first, last = sorted(random.Random(seed).sample(range(SIZE), 2))
        into = bytearray(last - first)
        return reader.read(first, memoryview(into)) == last - first and into == DATA[first:last]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(400)))
    reader.close()


def test_only_direct_reads_go_past_the_page_cache(file: Path) -> None:
    reader = open_file(file, direct=False)
    assert not isinstance(reader, DirectReader)
    reader.close()
