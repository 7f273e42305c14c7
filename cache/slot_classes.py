"""The sizes of slots for layers whose records differ in size, and how many slots of each size there are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from edgemoe.cache.record import ALIGNMENT, round_up

MIN_USED_PERCENT = 95
"""Layers share slots if the smallest record takes at least this part of a slot."""


@dataclass(frozen=True)
class SlotClass:
    """Slots of one size. They hold the records of all layers that fit, and do not fit the next smaller class."""

    nbytes: int
    """Bytes of one slot."""
    count: int
    """Number of slots."""


def slot_classes(records: Sequence[int], experts: Sequence[int]) -> tuple[SlotClass, ...]:
    """The classes with one slot for every expert, the smallest slots first.

    `records` are the bytes of a record, and `experts` the number of experts, of each layer.
    """
    counts: dict[int, int] = {}
    largest = 0
    for nbytes, count in sorted(zip(records, experts, strict=True), reverse=True):
        if 100 * nbytes < MIN_USED_PERCENT * largest or not largest:
            largest = nbytes
        counts[largest] = counts.get(largest, 0) + count
    return tuple(SlotClass(round_up(nbytes, ALIGNMENT), counts[nbytes]) for nbytes in sorted(counts))


def limit_slots(classes: Sequence[SlotClass], slots: int) -> tuple[SlotClass, ...]:
    """`slots` of the slots of `classes`, at most all of them: the same share of each class, and at least 1 slot.

    Fewer slots than classes become one class of the largest size. `slots` must be at least 1.
    """
    slots = min(slots, sum(each.count for each in classes))
    if slots < len(classes):
        return (SlotClass(classes[-1].nbytes, slots),)
    counts = [1] * len(classes)
    for index in _order(classes)[: slots - len(classes)]:
        counts[index] += 1
    return tuple(SlotClass(each.nbytes, count) for each, count in zip(classes, counts, strict=True))


def fitting_slots(classes: Sequence[SlotClass], room: int) -> int:
    """The largest number of slots for which `limit_slots` takes at most `room` bytes; below 1 where not one fits."""
    smallest = sum(each.nbytes for each in classes)
    if room < smallest:
        return room // classes[-1].nbytes
    totals = list(accumulate(classes[index].nbytes for index in _order(classes)))
    return len(classes) + bisect_right(totals, room - smallest)


def total_nbytes(classes: Iterable[SlotClass]) -> int:
    """Bytes of all slots."""
    return sum(each.count * each.nbytes for each in classes)


def _order(classes: Sequence[SlotClass]) -> list[int]:
    """The class of each slot after the first of every class.

    The next slot goes to the class with the smallest share of its slots (Webster's method). Where remainders of shares
    are compared, one slot more in all may be one less in a class; here more slots always take more bytes.
    """
    shares = [
        ((count + 0.5) / each.count, index) for index, each in enumerate(classes) for count in range(1, each.count)
    ]
    return [index for _, index in sorted(shares)]
