from __future__ import annotations

import gc
import weakref

import torch

from edgemoe.cache import Part, RecordLayout, SlotPool

CPU = torch.device("cpu")
LAYOUT = RecordLayout([Part("w", (8,), torch.float32)])


def test_slots_are_equal_rows_of_one_allocation_rounded_to_the_alignment() -> None:
    with SlotPool(3, 100, CPU) as pool:
        assert (pool.count, pool.slot_nbytes) == (3, 128)
        assert pool.memory.shape == (3, 128)
        assert pool.memory.is_contiguous()
        assert pool.memory.data_ptr() % 4096 == 0
        assert not pool.memory.any()


def test_views_read_and_write_the_slot_and_are_made_once() -> None:
    with SlotPool(2, LAYOUT.nbytes, CPU) as pool:
        pool.views(1, LAYOUT)["w"].copy_(torch.arange(8.0))
        assert pool.memory[1, :32].view(torch.float32).tolist() == list(range(8))
        assert not pool.memory[0].any()
        assert pool.views(1, LAYOUT) is pool.views(1, LAYOUT)


def test_layers_with_different_layouts_share_a_pool() -> None:
    other = RecordLayout([Part("v", (4,), torch.float64)])
    with SlotPool(1, 64, CPU) as pool:
        pool.views(0, LAYOUT)["w"].fill_(0)
        assert list(pool.views(0, other)) == ["v"]
        assert list(pool.views(0, LAYOUT)) == ["w"]


def test_close_gives_the_memory_back_and_may_be_repeated() -> None:
    pool = SlotPool(4, 4096, CPU)
    pool.views(0, LAYOUT)["w"].fill_(1)
    mapped = weakref.ref(pool._map)
    pool.close()
    gc.collect()
    assert mapped() is None
    assert pool.memory.numel() == 0
    pool.close()


def test_leaving_the_block_closes() -> None:
    with SlotPool(1, 64, CPU) as pool:
        pass
    assert pool.memory.numel() == 0
