"""The sizes of slots: what layers share one, how slots are divided among them, and what is wasted."""

from __future__ import annotations

import random

import pytest

from edgemoe.cache import SlotClass
from edgemoe.cache.slot_classes import fitting_slots, limit_slots, slot_classes, total_nbytes

MIXED = (SlotClass(640, 24), SlotClass(1024, 8))


def drawn(seed: int) -> tuple[list[int], list[int]]:
    """Bytes of a record, and the number of experts, of each layer of a random model."""
    draw = random.Random(seed)
    sizes = [64 * draw.randint(1, 200) for _ in range(draw.randint(1, 6))]
    records = [draw.choice(sizes) for _ in range(draw.randint(1, 12))]
    return records, [draw.randint(1, 20) for _ in records]


def test_layers_share_slots_if_their_records_nearly_fill_them() -> None:
    assert slot_classes([6400, 6400], [8, 4]) == (SlotClass(6400, 12),)
    assert slot_classes([6400, 6080], [8, 4]) == (SlotClass(6400, 12),), "95 %"
    assert slot_classes([6400, 6016], [8, 4]) == (SlotClass(6016, 4), SlotClass(6400, 8))
    assert slot_classes([6080, 6400, 5824], [1, 2, 4]) == (SlotClass(5824, 4), SlotClass(6400, 3)), "of the largest"


@pytest.mark.parametrize("seed", range(50))
def test_at_most_a_twentieth_is_wasted_with_a_slot_for_each_class(seed: int) -> None:
    records, experts = drawn(seed)
    every = slot_classes(records, experts)
    assert sum(each.count for each in every) == sum(experts)
    for slots in range(len(every), sum(experts) + 1):
        classes = limit_slots(every, slots)
        # At worst the slots of each class hold the smallest records of its layers.
        used = 0
        for index, each in enumerate(classes):
            below = classes[index - 1].nbytes if index else 0
            used += each.count * min(nbytes for nbytes in records if below < nbytes <= each.nbytes)
        assert used >= 0.95 * total_nbytes(classes)


@pytest.mark.parametrize("seed", range(50))
def test_classes_get_the_same_share_of_their_experts(seed: int) -> None:
    every = slot_classes(*drawn(seed))
    experts, before = sum(each.count for each in every), (0,) * len(every)
    for slots in range(len(every), experts + 3):
        classes = limit_slots(every, slots)
        counts = tuple(each.count for each in classes)
        assert sum(counts) == min(slots, experts)
        assert all(now >= earlier for now, earlier in zip(counts, before, strict=True)), "one more takes none away"
        for each, whole in zip(classes, every, strict=True):
            assert each.nbytes == whole.nbytes
            assert 1 <= each.count <= whole.count
            if slots >= 2 * experts / min(other.count for other in every):
                assert abs(each.count - whole.count * min(1, slots / experts)) < len(every)
        before = counts


def test_fewer_slots_than_classes_are_of_the_largest_size() -> None:
    assert limit_slots(MIXED, 1) == (SlotClass(1024, 1),)
    assert limit_slots(MIXED, 2) == (SlotClass(640, 1), SlotClass(1024, 1))
    assert limit_slots(MIXED, 8) == (SlotClass(640, 6), SlotClass(1024, 2))
    assert limit_slots(MIXED, 99) == MIXED
    assert limit_slots(MIXED[:1], 5) == (SlotClass(640, 5),)


@pytest.mark.parametrize("seed", range(30))
def test_what_fits_takes_no_more_than_the_room_and_one_slot_more_does(seed: int) -> None:
    every = slot_classes(*drawn(seed))
    experts, whole = sum(each.count for each in every), total_nbytes(every)
    draw = random.Random(seed)
    for room in [-1, 0, every[-1].nbytes, whole - 1, whole, 2 * whole, *(draw.randint(0, whole) for _ in range(30))]:
        slots = fitting_slots(every, room)
        assert (slots < 1) == (room < every[-1].nbytes)
        if slots >= 1:
            assert total_nbytes(limit_slots(every, slots)) <= room
        if len(every) <= slots < experts:
            assert total_nbytes(limit_slots(every, slots + 1)) > room
        assert (slots >= experts) == (room >= whole)
    assert [fitting_slots(every[:1], count * every[0].nbytes) for count in range(5)] == [
        min(count, every[0].count) for count in range(5)
    ]
