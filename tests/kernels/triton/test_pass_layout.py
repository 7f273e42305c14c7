from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from edgemoe.kernels.triton.pass_layout import Buffer, PassLayout, PassSequence, buffer_table

LAYERS, CONTEXT = 2, 600


def table(layers: int = LAYERS, dropped: int = 0) -> torch.Tensor:
    return buffer_table([Buffer(torch.empty(1, 2, 80, 16), torch.empty(1, 2, 80, 16), dropped)] * layers)


def test_metadata_says_positions_and_clears_what_was_there() -> None:
    layout = PassLayout(6, LAYERS, CONTEXT)
    metadata = torch.full((layout.size,), -1)
    buffers = table()
    layout.fill(metadata, [PassSequence.causal(7, 2, buffers), PassSequence(40, [0b1001, 0b11001], buffers, 3)])
    assert layout.positions(metadata).tolist() == [[7, 8, 41, 42, 0, 0]]
    assert int(metadata.min()) == 0
    assert int(metadata[3 * 6]) == 4
    paths = metadata[3 * 6 + 1 :].view(-1)[: 6 * 64].view(6, 64)
    assert paths[:4, :3].tolist() == [[0, 0, 0], [0, 1, 0], [0, 3, 0], [0, 3, 4]]


def refused(layers: int = LAYERS, seen: Sequence[int] = (1,), base: int = 0, drafted: int = 0, dropped: int = 0) -> str:
    layout = PassLayout(2, LAYERS, CONTEXT)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        layout.fill(
            torch.zeros(layout.size, dtype=torch.int64), [PassSequence(base, seen, table(layers, dropped), drafted)]
        )
    return str(refusal.value)


def test_what_does_not_fit_into_a_pass_is_refused() -> None:
    assert refused(layers=1) == "buffers of 1 layers for a pass over 2"
    assert refused(seen=[1, 3, 7]) == "3 tokens in a pass of 2"
    assert refused(seen=[1 << 64], drafted=64).startswith("65 tokens behind the base")
    assert refused(base=600) == "a sequence of 601 tokens in passes of at most 600"
    assert refused(base=80) == "a sequence of 81 tokens in buffers that end at token 80"
    assert refused(seen=[0b11]) == "mask 0x3 of the token at row 0 + 0, which has to be its highest bit"
    assert refused(base=4, dropped=5) == "5 dropped rows of a sequence with 4 kept tokens"
    layout = PassLayout(2, LAYERS, CONTEXT)
    with pytest.raises(ValueError, match=rf"int64 \[{layout.size}\], not torch.int32"):
        layout.fill(torch.zeros(layout.size, dtype=torch.int32), [])


def test_buffers_that_kernels_cannot_address_are_refused() -> None:
    fine = torch.empty(1, 2, 8, 16)
    for keys, why in (
        (torch.empty(1, 3, 8, 16), "do not fit values"),
        (torch.empty(1, 8, 2, 16).transpose(1, 2), "contiguous"),
        (torch.empty(257)[1:].view(1, 2, 8, 16), "multiples of 16"),
    ):
        with pytest.raises(ValueError, match=f"layer 1: .*{why}"):
            buffer_table([Buffer(fine, fine), Buffer(keys, fine)])
