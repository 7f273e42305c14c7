"""Of a device's logits the best few are read in one copy, and they say what all of them would, or that they cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from edgemoe import Engine, Sampling
from edgemoe.model import model_runner, packed_runner, sequential_runner
from edgemoe.model.pass_logits import BEST, DeviceRows, LogitsRows, PassLogits, on_host, split_rows
from edgemoe.results import Completion
from tests.support.logits import CountedLogits, spoiled_topk

VOCABULARY = 1000


def rows_of(seed: int, rows: int = 3, *, ties: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    drawn = 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return (drawn.round() if ties else drawn).to(dtype)


def kept_by_all(row: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens of the `count` largest logits and those that equal the last one, by all of them."""
    return (row >= row.sort(descending=True).values[count - 1]).nonzero()[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 20, BEST - 1, BEST, BEST + 1])
def test_the_largest_are_those_of_all_or_not_known(count: int, dtype: torch.dtype) -> None:
    known = 0
    for seed in range(20):
        rows = rows_of(seed, dtype=dtype)
        (part,) = PassLogits(rows).split([3])
        for row, found in zip(rows.float(), part, strict=True):
            largest = found.largest(count)
            if largest is not None:
                known += 1
                assert torch.equal(largest[1], kept_by_all(row, count))
                assert torch.equal(largest[0], row[largest[1]])
    if count <= 20 and dtype is torch.float32:
        assert known == 60, "no two of these are equal, so that all are known"
    if count >= BEST:
        assert known == 0, "others may equal the last one that was read"


def test_equal_logits_are_known_where_all_of_them_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the equal ones a device's top-k returns, and in whichever order."""
    monkeypatch.setattr(torch.Tensor, "topk", spoiled_topk)
    row = torch.zeros(VOCABULARY)
    row[[900, 4, 77]] = 3.0
    row[[5, 600]] = 2.0
    (part,) = PassLogits(row[None]).split([1])
    for count, expected in ((1, [4, 77, 900]), (3, [4, 77, 900]), (4, [4, 5, 77, 600, 900]), (5, [4, 5, 77, 600, 900])):
        largest = part[0].largest(count)
        assert largest is not None
        assert largest[1].tolist() == expected
        assert largest[0].tolist() == [float(row[token]) for token in expected]
    assert part[0].largest(6) is None, "995 others equal the sixth"
    assert part[0].argmax == 4


@pytest.mark.parametrize("count", [BEST - 1, BEST, BEST + 1, 500])
def test_the_first_of_many_equal_ones_wins(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "topk", spoiled_topk)
    for first in (0, 3, 490):
        row = torch.full((VOCABULARY,), -1.0)
        row[first : first + count] = 7.0
        (part,) = PassLogits(row[None]).split([1])
        assert part[0].argmax == first == int(row.argmax())


def test_a_vocabulary_smaller_than_what_is_read_is_known_whole() -> None:
    row = torch.tensor([1.0, 3.0, -torch.inf, 3.0, 0.0])
    (part,) = PassLogits(row[None]).split([1])
    for count in (1, 2, 3, 5, 9):
        largest = part[0].largest(count)
        assert largest is not None
        assert largest[1].tolist() == kept_by_all(row, min(count, 5)).tolist()


@pytest.mark.parametrize("place", [0, 500, 999])
def test_what_is_no_number_is_not_known(place: int) -> None:
    row = rows_of(1, 1)[0]
    row[place] = float("nan")
    (part,) = PassLogits(row[None]).split([1])
    assert part[0].largest(1) is None
    assert part[0].argmax == int(row.argmax())
    assert part[0].likeliest(3) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_those_among_all(dtype: torch.dtype) -> None:
    rows = rows_of(2, dtype=dtype)
    (part,) = PassLogits(rows).split([3])
    for row, found in zip(rows.float(), part, strict=True):
        likeliest = found.likeliest(5)
        assert len(likeliest) == 5
        for (token, share), value in zip(likeliest, row.sort(descending=True).values, strict=False):
            assert row[token] == value
            assert share == pytest.approx(float(row.softmax(-1)[token]), rel=1e-4)


def test_masked_tokens_are_not_likely() -> None:
    row = torch.full((VOCABULARY,), -torch.inf)
    row[[7, 9]] = torch.tensor([1.0, 2.0])
    (part,) = PassLogits(row[None]).split([1])
    assert [token for token, _ in part[0].likeliest(5)] == [9, 7]
    assert part[0].largest(3) is None


def test_one_copy_for_all_rows_and_one_for_everything() -> None:
    logits = CountedLogits(rows_of(3, 6, dtype=torch.bfloat16))
    parts = logits.split([1, 4, 1])
    assert logits.reads == []
    for part in parts:
        part.read_best()
        for row in part:
            row.largest(5), row.likeliest(2)
    assert logits.reads == [6 * BEST * 3 * 4]
    assert torch.equal(parts[1].whole, rows_of(3, 6, dtype=torch.bfloat16)[1:5].float())
    assert torch.equal(parts[2][-1].whole, rows_of(3, 6, dtype=torch.bfloat16)[5].float())
    assert logits.reads == [6 * BEST * 3 * 4, 6 * VOCABULARY * 2]


def test_rows_of_a_cpu_are_tensors_as_ever() -> None:
    rows = rows_of(4, 5)
    one, four = split_rows(rows, [1, 4])
    assert isinstance(one, torch.Tensor)
    assert isinstance(four, torch.Tensor)
    assert one.data_ptr() == rows.data_ptr(), "nothing is copied"
    assert torch.equal(four, rows[1:])
    assert on_host(four) is four


def test_rows_of_a_device_stay_there() -> None:
    part, other = split_rows(torch.empty(3, VOCABULARY, device="meta"), [1, 2])
    assert isinstance(part, DeviceRows)
    assert isinstance(other, DeviceRows)
    assert (len(part), len(other)) == (1, 2)


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3},
    {"temperature": 1.0, "top_k": 0, "seed": 3},
    {"temperature": 0.0, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("speculate", ["off", "self"])
def test_an_engine_gives_the_same_replies(
    settings: dict[str, Any], speculate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of the second engine count as a device's: what a pass reads of them is the best few."""
    prompts = ["reverse: abcd", "add 7 and 5", "count from 3 to 9"]
    made: list[CountedLogits] = []

    def stays(logits: torch.Tensor, counts: list[int]) -> list[LogitsRows]:
        made.append(CountedLogits(logits.clone()))
        return list(made[-1].split(counts))

    def replies() -> list[Sequence[int]]:
        with Engine.load(None, device="cpu", speculate=speculate, state_folder="none") as engine:
            sampling = Sampling(**settings, max_tokens=12)
            found = dict(engine.generate_batch([(prompt, sampling) for prompt in prompts]))
            completions = [found[number] for number in range(len(prompts))]
            return [each.token_ids for each in completions if isinstance(each, Completion)]

    expected = replies()
    for module in (packed_runner, sequential_runner, model_runner):
        monkeypatch.setattr(module, "split_rows", stays)
    assert replies() == expected
    assert len(expected) == 3
    passes = [each.reads for each in made if each.reads]
    assert passes
    if settings in SETTINGS[:2]:
        assert sum(map(len, passes)) == len(passes), "one copy a pass, of the best few"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operations_on_a_card_mix_no_devices(dtype: torch.dtype) -> None:
    """With tensors that claim to be a card's: nothing asks for a value before the copy."""
    with FakeTensorMode():
        part, _ = split_rows(torch.empty(3, VOCABULARY, device="cuda", dtype=dtype), [1, 2])
        assert isinstance(part, DeviceRows)
        part.read_best()
        best = part[0].logits.best
        assert {each.device.type for each in best} == {"cpu"}
        assert [each.shape for each in best] == [(3, BEST)] * 3
        assert part.whole.shape == (1, VOCABULARY)
        assert part.whole.device.type == "cpu"
