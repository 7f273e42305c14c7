"""The similarity of experts: exact against a naive computation, small, bounded in memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch

from edgemoe.cache import ExpertId, Part, RecordLayout
from edgemoe.cache.safetensors_store import Extent, RecordSource, SafetensorsStore
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.draft.affinity import BUFFER_NBYTES, Affinity, compute
from edgemoe.errors import CheckpointError
from edgemoe.results import Progress
from tests.support.checkpoints import Zoo, reference

Layer = Sequence[torch.Tensor]
"""The parts of a layer's experts, each [experts, ...]."""


class Recording(SafetensorsStore):
    """A store that records its reads, and can fail."""

    def __init__(self, *of: object, **how: object) -> None:
        super().__init__(*of, **how)  # type: ignore[arg-type]
        self.reads: list[tuple[ExpertId, int, int]] = []
        """Each read's expert, first byte and number of bytes."""
        self.fault: OSError | None = None

    def read(self, expert: ExpertId, start: int, into: torch.Tensor) -> None:
        if self.fault is not None:
            raise self.fault
        self.reads.append((expert, start, len(into)))
        super().read(expert, start, into)


def store_of(path: Path, layers: Sequence[Layer]) -> Recording:
    """A store over a file with these experts; seven bytes precede each part, so that no part is aligned."""
    layouts, sources, at = [], {}, 0
    with path.open("wb") as file:
        for layer, parts in enumerate(layers):
            layout = RecordLayout([Part(f"p{n}", tuple(part.shape[1:]), part.dtype) for n, part in enumerate(parts)])
            layouts.append(layout)
            for number in range(len(parts[0])):
                extents = []
                for part, offset in zip(parts, layout.offsets, strict=True):
                    data = part[number].contiguous().view(-1).view(torch.uint8)
                    file.write(bytes(7) + data.numpy().tobytes())
                    extents.append(Extent(0, at + 7, tuple(part.shape[1:]), part.dtype, data.numel(), offset))
                    at += 7 + data.numel()
                sources[ExpertId(layer, number)] = RecordSource(tuple(extents), None)
    return Recording([path], layouts, sources)


def random_layer(experts: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Layer:
    """Experts of different scale, so that no two distances are nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(experts, generator=generator) * 2
    return [
        (torch.randn(experts, *shape, generator=generator) * scales.view(-1, *[1] * len(shape))).to(dtype)
        for shape in shapes
    ]


def naive_distances(layer: Layer) -> list[list[float]]:
    """The L2 distances between flattened experts in float64."""
    experts = [torch.cat([part[number].double().flatten() for part in layer]) for number in range(len(layer[0]))]
    return [[float((one - other).norm()) for other in experts] for one in experts]


def naive_nearest(distances: list[list[float]], resident: Sequence[bool]) -> list[int]:
    """The expert itself if resident, else the first of the closest ones."""
    choice = []
    for expert, row in enumerate(distances):
        there = [other for other in range(len(row)) if resident[other]]
        choice.append(expert if resident[expert] else min(there, key=row.__getitem__))
    return choice


def residencies(experts: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Non-empty sets of resident experts: single ones, all, and random ones."""
    generator = torch.Generator().manual_seed(seed)
    yield from torch.eye(experts, dtype=torch.bool)[:3]
    yield torch.ones(experts, dtype=torch.bool)
    for share in (0.1, 0.3, 0.5, 0.9) * 3:
        resident = torch.rand(experts, generator=generator) < share
        if resident.any():
            yield resident


def made(store: SafetensorsStore, **how: int) -> Affinity:
    affinity = compute(store, **how)  # type: ignore[arg-type]
    assert affinity is not None
    return affinity


def assert_as_naive(affinity: Affinity, layers: Sequence[Layer]) -> None:
    assert affinity.experts == tuple(len(layer[0]) for layer in layers)
    for number, layer in enumerate(layers):
        distances = naive_distances(layer)
        gaps = [b / a - 1 for row in distances for a, b in itertools.pairwise(sorted(row)) if a > 0]
        assert min(gaps, default=1) > 1e-6, "the test itself has a tie"
        for resident in residencies(len(distances), seed=number):
            nearest = affinity.most_similar(number, resident)
            assert nearest.dtype == torch.int64
            assert nearest.tolist() == naive_nearest(distances, resident.tolist())


# --- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("buffer", [1, 1500, BUFFER_NBYTES])
def test_the_most_similar_experts_are_those_of_a_naive_computation(
    dtype: torch.dtype, buffer: int, tmp_path: Path
) -> None:
    layers = [
        random_layer(11, (6, 7), (5,), (3, 9), dtype=dtype),
        random_layer(4, (301,), dtype=dtype, seed=1),
        random_layer(1, (3,), dtype=dtype, seed=2),
    ]
    with closing(store_of(tmp_path / "weights", layers)) as store:
        assert_as_naive(made(store, buffer_nbytes=buffer), layers)


def test_parts_of_different_dtypes_have_the_same_weight(tmp_path: Path) -> None:
    mixed = [
        *random_layer(9, (40,), dtype=torch.bfloat16),
        *random_layer(9, (60,), dtype=torch.float32, seed=1),
        *random_layer(9, (50,), dtype=torch.float16, seed=2),
    ]
    with closing(store_of(tmp_path / "weights", [mixed])) as store:
        assert_as_naive(made(store, buffer_nbytes=2000), [mixed])


@pytest.mark.parametrize(
    ("family", "dtype"), [("mixtral", "auto"), ("mixtral", "bfloat16"), ("gpt_oss", "auto"), ("deepseek_v3", "auto")]
)
def test_the_distance_is_that_between_transformers_weights(family: str, dtype: str, zoo: Zoo) -> None:
    folder = zoo(family)
    blueprint = open_blueprint(folder, dtype)
    model = reference(folder, blueprint.dtype)
    layers = []
    for moe in blueprint.experts_modules:
        parts = dict(moe.module(model).named_parameters())
        layers.append([parts[part.name].detach() for part in moe.layout.parts])
    layouts = [moe.layout for moe in blueprint.experts_modules]
    for buffer in (5000, BUFFER_NBYTES):
        with closing(SafetensorsStore(blueprint.checkpoint.files, layouts, blueprint.records)) as store:
            assert_as_naive(made(store, buffer_nbytes=buffer), layers)


def test_small_differences_between_large_weights_are_not_lost(tmp_path: Path) -> None:
    """As in experts copied from one dense layer and trained a little."""
    common = torch.randn(1, 4000, generator=torch.Generator().manual_seed(5)) * 1000
    layer = [common + differing * 0.5 for differing in random_layer(8, (4000,))]
    with closing(store_of(tmp_path / "weights", [layer])) as store:
        assert_as_naive(made(store), [layer])


def test_an_expert_ranks_before_its_duplicates_and_they_rank_by_number(tmp_path: Path) -> None:
    (part,) = random_layer(6, (500,))
    part[1] = part[4] = part[2]
    with closing(store_of(tmp_path / "weights", [[part]])) as store:
        affinity = made(store)
    assert affinity.most_similar(0, torch.ones(6, dtype=torch.bool)).tolist() == [0, 1, 2, 3, 4, 5]
    assert affinity.most_similar(0, torch.tensor([1, 0, 1, 0, 1, 0]).bool())[1] in (2, 4)
    exact = Affinity.from_distances([torch.zeros(4, 4)])
    assert exact.most_similar(0, torch.tensor([0, 1, 1, 0]).bool()).tolist() == [1, 1, 2, 1]


def test_ranks_from_distances_by_hand() -> None:
    affinity = Affinity.from_distances([torch.tensor([[0.0, 3, 1], [3, 0, 2], [1, 2, 0]])])
    assert affinity.ranks[0].tolist() == [[0, 2, 1], [2, 0, 1], [1, 2, 0]]
    assert affinity.ranks[0].dtype == torch.int16
    assert affinity.most_similar(0, torch.tensor([False, True, True])).tolist() == [2, 1, 2]


def test_no_resident_expert_is_an_error_that_names_the_layer() -> None:
    affinity = Affinity.from_distances([torch.zeros(3, 3), torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="no expert of layer 1 is resident"):
        affinity.most_similar(1, torch.zeros(2, dtype=torch.bool))


def test_another_thread_computes_the_same(tmp_path: Path) -> None:
    with closing(store_of(tmp_path / "weights", [random_layer(9, (400,))])) as store:
        results: list[Affinity | None] = []
        thread = threading.Thread(target=lambda: results.append(compute(store)))
        thread.start()
        thread.join(60)
        assert results[0] is not None
        assert torch.equal(results[0].ranks[0], made(store).ranks[0])


# --- small and bounded ---------------------------------------------------------------------------


def test_it_takes_two_bytes_per_pair_and_answers_fast() -> None:
    affinity = Affinity.from_distances([torch.rand(128, 128, generator=torch.Generator().manual_seed(0))] * 48)
    assert affinity.nbytes <= 2 * 128 * 128 * 48
    resident = torch.arange(128) % 4 == 0
    seconds = []
    for layer in range(48):
        started = time.perf_counter()
        affinity.most_similar(layer, resident)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_byte_is_read_once_and_few_at_a_time(dtype: torch.dtype, tmp_path: Path) -> None:
    layers = [random_layer(6, (5, 77), (1001,), dtype=dtype), random_layer(3, (999,), dtype=dtype)]
    buffer = 9000
    with closing(store_of(tmp_path / "weights", layers)) as store:
        made(store, buffer_nbytes=buffer)
    for layer, parts in enumerate(layers):
        layout = store.layouts[layer]
        expected = [set(range(o, o + p.nbytes)) for p, o in zip(layout.parts, layout.offsets, strict=True)]
        for number in range(len(parts[0])):
            spans = [range(at, at + count) for expert, at, count in store.reads if expert == (layer, number)]
            covered = [byte for span in spans for byte in span]
            assert len(covered) == len(set(covered))
            assert set(covered) == set().union(*expected)
        mine = [entry for entry in store.reads if entry[0].layer == layer]
        for first, group in itertools.groupby(mine, key=lambda entry: entry[1]):
            held = [count for _, _, count in group]
            assert len(held) == len(parts[0])
            # The weights as stored, and in float32.
            assert sum(held) * (1 + 4 / dtype.itemsize) <= buffer, first


LARGE = """
import resource, sys
from pathlib import Path
import torch
from edgemoe.draft.affinity import compute
from edgemoe.cache import ExpertId, Part, RecordLayout
from edgemoe.cache.safetensors_store import Extent, RecordSource, SafetensorsStore

path, nbytes, experts = Path(sys.argv[1]), 64 << 20, 8
with path.open("wb") as file:
    file.truncate(nbytes * experts)
shape = (nbytes // 2,)
sources = {
    ExpertId(0, n): RecordSource((Extent(0, n * nbytes, shape, torch.bfloat16, nbytes, 0),), None)
    for n in range(experts)
}
store = SafetensorsStore([path], [RecordLayout([Part("w", shape, torch.bfloat16)])], sources)
torch.rand(64, 64) @ torch.rand(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compute(store, buffer_nbytes=16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_a_layer_larger_than_the_buffer_is_not_read_whole(tmp_path: Path) -> None:
    """512 MiB of experts with a buffer of 16 MiB, and the memory that matrix products need."""
    command = [sys.executable, "-c", LARGE, str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 10, "KiB"


# --- progress, ends and refusals -----------------------------------------------------------------


def test_progress_rises_to_the_total_bytes(tmp_path: Path) -> None:
    layers = [random_layer(4, (5, 20), (30,)), random_layer(3, (100,), dtype=torch.float16)]
    said: list[Progress] = []
    with closing(store_of(tmp_path / "weights", layers)) as store:
        compute(store, said.append, buffer_nbytes=2000)
    total = sum(part.nbytes for layer in layers for part in layer)
    assert [entry.done for entry in said] == sorted({entry.done for entry in said})
    assert len(said) > 3
    assert {(entry.stage, entry.total) for entry in said} == {("affinity", total)}
    assert said[-1].done == total


def test_it_stops_when_cancelled(tmp_path: Path) -> None:
    with closing(store_of(tmp_path / "weights", [random_layer(4, (1000,))] * 3)) as store:
        said: list[Progress] = []
        assert compute(store, said.append, cancelled=lambda: len(said) == 2, buffer_nbytes=4000) is None
        assert len(said) == 2
        assert compute(store, cancelled=lambda: True) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float64], ids=str)
def test_other_dtypes_are_refused_by_name_before_anything_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    layers = [random_layer(2, (4,)), [*random_layer(2, (4,)), torch.zeros(2, 4).to(dtype)]]
    with closing(store_of(tmp_path / "weights", layers)) as store:
        with pytest.raises(CheckpointError, match=rf"p1 of MoE layer 1 is stored as {dtype}: only .* bf16, fp16"):
            compute(store)
        assert store.reads == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    (part,) = random_layer(5, (400,))
    part[3, 17] = value
    with (
        closing(store_of(tmp_path / "weights", [random_layer(5, (400,)), [part]])) as store,
        pytest.raises(CheckpointError, match="MoE layer 1 have weights that are not finite"),
    ):
        compute(store)


def test_a_file_that_ends_too_soon_is_an_os_error(tmp_path: Path) -> None:
    with closing(store_of(tmp_path / "weights", [random_layer(5, (400,))])) as store:
        os.truncate(tmp_path / "weights", 5000)
        with pytest.raises(OSError, match="changed since it was loaded"):
            compute(store)


# --- part of a record ----------------------------------------------------------------------------


@pytest.mark.parametrize("assembled", [False, True])
def test_a_range_of_a_record_has_the_bytes_of_the_whole(assembled: bool, zoo: Zoo) -> None:
    blueprint = open_blueprint(zoo("mixtral"), "bfloat16" if assembled else "auto")
    layouts = [moe.layout for moe in blueprint.experts_modules]
    expert = ExpertId(1, 2)
    assert (blueprint.records[expert].assemble is not None) is assembled
    with closing(SafetensorsStore(blueprint.checkpoint.files, layouts, blueprint.records)) as store:
        whole = torch.zeros(store.record_nbytes(expert), dtype=torch.uint8)
        for _, move in store.pieces(expert, whole):
            move()
        assert whole.any()
        size = len(whole)
        spans = [(0, size), (1, 2), (size - 3, size), (100, 100), *((at, at + 997) for at in range(0, size - 997, 513))]
        for start, stop in spans:
            into = torch.zeros(stop - start, dtype=torch.uint8)
            store.read(expert, start, into)
            assert torch.equal(into, whole[start:stop]), (start, stop)


def test_padding_is_not_written(tmp_path: Path) -> None:
    with closing(store_of(tmp_path / "weights", [random_layer(2, (3,), (5,), dtype=torch.float16)])) as store:
        into = torch.full((128,), 0xAA, dtype=torch.uint8)
        store.read(ExpertId(0, 1), 0, into)
        assert (into[6:64] == 0xAA).all()
        assert (into[74:] == 0xAA).all()
        assert not (into[64:74] == 0xAA).all()
        later = torch.full((68,), 0xAA, dtype=torch.uint8)
        store.read(ExpertId(0, 1), 60, later)
        assert torch.equal(later, into[60:])
