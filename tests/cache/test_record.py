from __future__ import annotations

import pytest
import torch

from edgemoe.cache.record import ALIGNMENT, ExpertId, Part, RecordLayout, host_bytes, round_up

LAYOUT = RecordLayout(
    [
        Part("gate_up_proj", (6, 5), torch.bfloat16),
        Part("gate_up_proj_bias", (6,), torch.float32),
        Part("down_proj", (3, 3), torch.float16),
    ]
)


def test_parts_lie_one_after_the_other_each_at_a_multiple_of_the_alignment() -> None:
    assert ALIGNMENT == 64
    assert [part.nbytes for part in LAYOUT.parts] == [60, 24, 18]
    assert LAYOUT.offsets == (0, 64, 128)
    assert LAYOUT.nbytes == 192


def test_a_part_that_fills_its_alignment_leaves_no_gap() -> None:
    layout = RecordLayout([Part("a", (32,), torch.bfloat16), Part("b", (1,), torch.uint8)])
    assert layout.offsets == (0, 64)
    assert layout.nbytes == 128


def test_views_have_the_declared_shapes_and_share_the_record() -> None:
    record = torch.zeros(LAYOUT.nbytes, dtype=torch.uint8)
    views = LAYOUT.views(record)
    assert {name: (tuple(view.shape), view.dtype) for name, view in views.items()} == {
        "gate_up_proj": ((6, 5), torch.bfloat16),
        "gate_up_proj_bias": ((6,), torch.float32),
        "down_proj": ((3, 3), torch.float16),
    }
    views["gate_up_proj_bias"].fill_(1.0)
    assert record[64:88].view(torch.float32).tolist() == [1.0] * 6
    assert int(record.count_nonzero()) == 12, "1.0 in float32 has two bytes that are not 0; nothing else was written"


def test_views_of_a_longer_slot_take_its_beginning() -> None:
    slot = torch.arange(256, dtype=torch.uint8)
    views = LAYOUT.views(slot)
    assert views["down_proj"].data_ptr() == slot.data_ptr() + 128


def test_part_offset_finds_by_name_and_refuses_strangers() -> None:
    assert [LAYOUT.part_offset(part.name) for part in LAYOUT.parts] == list(LAYOUT.offsets)
    with pytest.raises(KeyError):
        LAYOUT.part_offset("up_proj")


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, 64), (63, 64), (64, 64), (65, 128)])
def test_round_up(value: int, expected: int) -> None:
    assert round_up(value, 64) == expected


def test_host_bytes_writes_into_the_tensor() -> None:
    tensor = torch.zeros(4, dtype=torch.uint8)
    host_bytes(tensor)[1:3] = b"\x07\x08"
    assert tensor.tolist() == [0, 7, 8, 0]


def test_expert_ids_order_by_layer_then_number() -> None:
    assert sorted([ExpertId(1, 0), ExpertId(0, 5), ExpertId(0, 2)]) == [(0, 2), (0, 5), (1, 0)]


def test_places_are_the_offsets_of_a_matrix_s_own_parts() -> None:
    parts = [
        Part(name, (3,), torch.float32) for name in ("up_proj", "up_proj.scale", "up_proj_bias", "gate_up_proj.scale")
    ]
    layout = RecordLayout(parts)
    offset = layout.part_offset
    assert layout.places("up_proj") == {"": offset("up_proj"), ".scale": offset("up_proj.scale")}
