from __future__ import annotations

import gc
import weakref

import pytest
import torch

from edgemoe.cache import Part, RecordLayout, SlotClass, SlotPool
from edgemoe.cache.record import ALIGNMENT

CPU = torch.device("cpu")
LAYOUT = RecordLayout([Part("w", (8,), torch.float32)])


def test_slots_are_equal_rows_of_one_allocation_rounded_to_the_alignment() -> None:
    with SlotPool([SlotClass(100, 3)], CPU) as pool:
        region = pool.region(100)
        assert (pool.count, region.count, region.slot_nbytes, region.first) == (3, 3, 128, 0)
        assert region.memory.shape == (3, 128)
        assert region.memory.is_contiguous()
        assert pool.memory.data_ptr() % 4096 == 0
        assert not pool.memory.any()


def test_views_read_and_write_the_slot_and_are_made_once() -> None:
    with SlotPool([SlotClass(LAYOUT.nbytes, 2)], CPU) as pool:
        region = pool.region(LAYOUT.nbytes)
        region.views(1, LAYOUT)["w"].copy_(torch.arange(8.0))
        assert region.memory[1, :32].view(torch.float32).tolist() == list(range(8))
        assert not region.memory[0].any()
        assert region.views(1, LAYOUT) is region.views(1, LAYOUT)


def test_regions_are_aligned_and_do_not_overlap() -> None:
    classes = [SlotClass(100, 3), SlotClass(300, 2), SlotClass(4096, 5)]
    with SlotPool(classes, CPU) as pool:
        assert pool.count == 10
        assert [number for region in pool.regions for number in region.numbers] == list(range(10))
        assert [region.memory.shape for region in pool.regions] == [(3, 128), (2, 320), (5, 4096)]
        for value, region in enumerate(pool.regions, start=1):
            assert region.memory.data_ptr() % ALIGNMENT == 0
            assert region.memory.is_contiguous()
            assert not region.memory.any(), "another region wrote here"
            region.memory.fill_(value)
        assert pool.memory.unique(return_counts=True)[1].tolist() == [3 * 128, 2 * 320, 5 * 4096]


def test_a_record_goes_where_it_fits_most_closely() -> None:
    with SlotPool([SlotClass(320, 1), SlotClass(128, 1)], CPU) as pool:
        assert [pool.region(nbytes).slot_nbytes for nbytes in (1, 128, 129, 320)] == [128, 128, 320, 320]
        with pytest.raises(ValueError, match="no slot holds a record of 321 bytes"):
            pool.region(321)


def test_layers_with_different_layouts_share_a_pool() -> None:
    other = RecordLayout([Part("v", (4,), torch.float64)])
    with SlotPool([SlotClass(64, 1)], CPU) as pool:
        pool.region(64).views(0, LAYOUT)["w"].fill_(0)
        assert list(pool.region(64).views(0, other)) == ["v"]
        assert list(pool.region(64).views(0, LAYOUT)) == ["w"]


def test_close_gives_the_memory_back_and_may_be_repeated() -> None:
    pool = SlotPool([SlotClass(4096, 4)], CPU)
    pool.region(64).views(0, LAYOUT)["w"].fill_(1)
    mapped = weakref.ref(pool._map)
    pool.close()
    gc.collect()
    assert mapped() is None
    assert pool.memory.numel() == 0
    pool.close()


def test_leaving_the_block_closes() -> None:
    with SlotPool([SlotClass(64, 1)], CPU) as pool:
        pass
    assert pool.memory.numel() == 0


def test_layers_with_equal_layouts_share_the_views_of_a_slot() -> None:
    with SlotPool([SlotClass(LAYOUT.nbytes, 1)], CPU) as pool:
        region = pool.region(LAYOUT.nbytes)
        first = region.views(0, LAYOUT)
        assert all(region.views(0, RecordLayout(LAYOUT.parts)) is first for _ in range(3))


def test_of_each_slot_one_set_of_views_is_kept_however_many_layouts_there_are() -> None:
    layouts = [RecordLayout([Part(f"w{layer}", (8,), torch.float32)]) for layer in range(20)]
    with SlotPool([SlotClass(LAYOUT.nbytes, 2)], CPU) as pool:
        region = pool.region(LAYOUT.nbytes)
        made = [weakref.ref(region.views(0, layout)[f"w{layer}"]) for layer, layout in enumerate(layouts)]
        gc.collect()
        assert sum(view() is not None for view in made) == 1
