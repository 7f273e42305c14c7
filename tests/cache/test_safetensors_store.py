from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from edgemoe.cache import ExpertId, Part, RecordLayout
from edgemoe.cache.safetensors_store import PIECE_NBYTES, Extent, RecordSource, SafetensorsStore

E0, E1 = ExpertId(0, 0), ExpertId(0, 1)


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write(path: Path, data: torch.Tensor) -> Path:
    path.write_bytes(data.numpy().tobytes())
    return path


def extent(file: int, offset: int, nbytes: int, slot_offset: int | None) -> Extent:
    return Extent(file, offset, (nbytes,), torch.uint8, nbytes, slot_offset)


def fill(store: SafetensorsStore, expert: ExpertId, backwards: bool = False) -> torch.Tensor:
    """The slot after all pieces have run; 0xAA where none wrote."""
    slot = torch.full((store.slot_nbytes,), 0xAA, dtype=torch.uint8)
    pieces = list(store.pieces(expert, slot))
    for _, move in reversed(pieces) if backwards else pieces:
        move()
    return slot


def test_extents_of_several_files_go_where_the_layout_wants_them(tmp_path: Path) -> None:
    layout = RecordLayout([Part("up", (100,), torch.uint8), Part("down", (30,), torch.uint8)])
    one, two = random_bytes(500, 1), random_bytes(500, 2)
    files = [write(tmp_path / "1", one), write(tmp_path / "2", two)]
    sources = {
        E0: RecordSource((extent(0, 7, 60, 0), extent(1, 11, 40, 60), extent(1, 400, 30, 128)), None),
        E1: RecordSource((extent(1, 0, 100, 0), extent(0, 470, 30, 128)), None),
    }
    store = SafetensorsStore(files, [layout], sources)
    slot = fill(store, E0)
    assert torch.equal(slot[:60], one[7:67])
    assert torch.equal(slot[60:100], two[11:51])
    assert torch.equal(slot[128:158], two[400:430])
    assert (slot[100:128] == 0xAA).all(), "padding is not written"
    assert torch.equal(fill(store, E1)[128:158], one[470:])
    store.close()


def test_it_knows_how_many_and_how_large(tmp_path: Path) -> None:
    small = RecordLayout([Part("w", (10,), torch.uint8)])
    large = RecordLayout([Part("w", (100,), torch.uint8)])
    file = write(tmp_path / "1", random_bytes(1000))
    sources = {ExpertId(0, n): RecordSource((extent(0, n, 10, 0),), None) for n in range(3)}
    sources |= {ExpertId(1, n): RecordSource((extent(0, n, 100, 0),), None) for n in range(2)}
    store = SafetensorsStore([file], [small, large], sources)
    assert store.experts == (3, 2)
    assert (store.record_nbytes(E0), store.record_nbytes(ExpertId(1, 0)), store.slot_nbytes) == (64, 128, 128)
    assert store.nbytes == 3 * 64 + 2 * 128
    store.close()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("surplus", [-1, 0, 1, PIECE_NBYTES // 2])
def test_large_extents_are_read_in_pieces_of_bounded_size(
    tmp_path: Path, surplus: int, backwards: bool, direct: bool
) -> None:
    nbytes = 2 * PIECE_NBYTES + surplus
    data = random_bytes(nbytes + 3)
    layout = RecordLayout([Part("w", (nbytes,), torch.uint8)])
    sources = {E0: RecordSource((extent(0, 3, nbytes, 0),), None)}
    store = SafetensorsStore([write(tmp_path / "1", data)], [layout], sources, direct=direct)
    sizes = [size for size, _ in store.pieces(E0, torch.empty(layout.nbytes, dtype=torch.uint8))]
    assert sum(sizes) == nbytes
    assert max(sizes) <= PIECE_NBYTES
    assert len(sizes) == -(-nbytes // PIECE_NBYTES)
    assert torch.equal(fill(store, E0, backwards)[:nbytes], data[3:])
    store.close()


def test_an_assembled_record_gets_its_raw_tensors_in_order_and_is_converted(tmp_path: Path) -> None:
    gate = torch.arange(6, dtype=torch.float32).view(2, 3)
    up = torch.arange(6, 12, dtype=torch.float32).view(2, 3)
    layout = RecordLayout([Part("gate_up", (4, 3), torch.bfloat16), Part("sum", (2, 3), torch.float32)])
    data = torch.cat([torch.zeros(5, dtype=torch.uint8), *(t.flatten().view(torch.uint8) for t in (gate, up))])
    extents = (Extent(0, 29, (2, 3), torch.float32, 24, None), Extent(0, 5, (2, 3), torch.float32, 24, None))

    def assemble(raw: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        assert torch.equal(raw[0], up)
        assert torch.equal(raw[1], gate)
        return {"sum": raw[0] + raw[1], "gate_up": torch.cat([raw[1], raw[0]])}

    store = SafetensorsStore([write(tmp_path / "1", data)], [layout], {E0: RecordSource(extents, assemble)})
    pieces = store.pieces(E0, torch.empty(layout.nbytes, dtype=torch.uint8))
    assert [nbytes for nbytes, _ in pieces] == [48]
    views = layout.views(fill(store, E0))
    assert torch.equal(views["gate_up"], torch.cat([gate, up]).bfloat16())
    assert torch.equal(views["sum"], gate + up)
    store.close()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("assembled", [False, True])
def test_a_file_that_was_cut_short_is_an_error_that_names_it(tmp_path: Path, assembled: bool, direct: bool) -> None:
    file = write(tmp_path / "model.safetensors", random_bytes(200))
    layout = RecordLayout([Part("w", (100,), torch.uint8)])
    assemble = (lambda raw: {"w": raw[0]}) if assembled else None
    offset = None if assembled else 0
    store = SafetensorsStore(
        [file], [layout], {E0: RecordSource((extent(0, 100, 100, offset),), assemble)}, direct=direct
    )
    fill(store, E0)
    with file.open("r+b") as opened:
        opened.truncate(150)
    with pytest.raises(OSError, match=r"model\.safetensors ends .*, in the middle of an expert"):
        fill(store, E0)
    store.close()


def open_descriptors(folder: Path) -> int:
    """The number of this process's open files in `folder`; 0 on systems without /proc."""
    if not Path("/proc/self/fd").exists():
        return 0
    targets = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
    return sum(target.parent == folder for target in targets)


@pytest.mark.parametrize("direct", [False, True])
def test_descriptors_do_not_grow_with_threads_and_are_given_back(tmp_path: Path, direct: bool) -> None:
    """Large checkpoints have over a hundred files. One descriptor per file and thread would exceed the usual limit."""
    files = [write(tmp_path / str(number), random_bytes(100, number)) for number in range(6)]
    layout = RecordLayout([Part("w", (60,), torch.uint8)])
    spread = tuple(extent(number, number, 10, 10 * number) for number in range(6))
    store = SafetensorsStore(files, [layout], {E0: RecordSource(spread, None)}, direct=direct)
    together = threading.Barrier(4)

    def read(_: int) -> torch.Tensor:
        together.wait(10)
        return fill(store, E0)

    with ThreadPoolExecutor(4) as pool:
        slots = list(pool.map(read, range(4)))
        assert open_descriptors(tmp_path) <= len(files)
    assert all(torch.equal(slot, slots[0]) for slot in slots)
    store.close()
    assert open_descriptors(tmp_path) == 0
    store.close()
