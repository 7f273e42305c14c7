"""The stand-in for PyTorch's allocator: its rounding, its segments, and what it gives back."""

from __future__ import annotations

import pytest
import torch

from bench.no_card.caching_allocator import CachingAllocator
from bench.no_card.counted_card import CARD, CountedCard

MIB = 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (21 * MIB, 22 * MIB, 22 * MIB),
    ],
)
def test_sizes_are_rounded_as_pytorchs_are(nbytes: int, allocated: int, reserved: int) -> None:
    """The rest of a segment of a large request is no block of its own where it is at most 1 MiB."""
    memory = CachingAllocator(1 << 30)
    memory.take(1, nbytes)
    assert (memory.allocated, memory.held, memory.reserved) == (allocated, reserved, reserved)
    memory.give(1)
    assert (memory.allocated, memory.held, memory.reserved) == (0, 0, reserved)
    memory.empty()
    assert memory.reserved == 0


def test_freed_neighbours_are_one_block_again() -> None:
    memory = CachingAllocator(1 << 30)
    for key in range(4):
        memory.take(key, 5 * MIB)
    assert memory.reserved == 20 * MIB
    for key in (1, 3, 2):
        memory.give(key)
    memory.take(9, 9 * MIB)
    assert memory.reserved == 20 * MIB, "it lies where two were"


def test_the_smallest_block_that_fits_is_taken() -> None:
    memory = CachingAllocator(1 << 30)
    memory.take(1, 40 * MIB)
    memory.take(2, 30 * MIB)
    memory.give(1)
    memory.give(2)
    memory.take(3, 30 * MIB)
    memory.take(4, 40 * MIB)
    assert memory.reserved == memory.allocated == 70 * MIB


def test_what_is_only_kept_is_given_back_when_memory_is_short_and_gaps_are_not() -> None:
    memory = CachingAllocator(100 * MIB)
    memory.take(1, 60 * MIB)
    memory.give(1)
    memory.take(2, 90 * MIB)
    assert memory.reserved == 90 * MIB
    memory.give(2)
    memory.take(3, 10 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        memory.take(4, 90 * MIB)


def test_tensors_of_a_counted_card_take_memory_while_they_or_their_views_live() -> None:
    card = CountedCard(1 << 30)
    with card.there(), card.tensors():
        memory = torch.empty(64 * MIB, dtype=torch.uint8, device=CARD)
        part = memory[32 * MIB :].view(torch.float32)
        del memory
        assert card.memory.allocated == 64 * MIB
        other = part + 1
        assert card.memory.allocated == 96 * MIB
        other[2:] = part[2:]
        assert card.memory.allocated == 96 * MIB
        del part, other
        assert card.memory.allocated == 0
    assert card.memory.peak_allocated == 96 * MIB
