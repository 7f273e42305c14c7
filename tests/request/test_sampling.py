"""Sampling settings: their ranges, the checkpoint's defaults, and the distribution of the samples."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from edgemoe import CheckpointError, LogitsError, RequestError, Sampling
from edgemoe.request.sampler import Sampler, check_defaults
from edgemoe.sampling import ResolvedSampling, resolve
from tests.support.logits import CountedLogits
from tests.support.samplers import sampler

PROBABILITIES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])


def draws(count: int, tokens: tuple[int, ...] = (4,), **changed: Any) -> list[int]:
    drawing = sampler(**changed)
    return [drawing.draw(tokens, PROBABILITIES.log()) for _ in range(count)]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_k": 2}, [4 / 7, 3 / 7]),
        ({"top_k": 99}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.8}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85]),
        ({"top_p": 0.01}, [1.0]),
        ({"min_p": 0.3}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85]),
        ({"min_p": 1.0}, [1.0]),
        ({"temperature": 0.5}, [0.16 / 0.285, 0.09 / 0.285, 0.0225 / 0.285, 0.01 / 0.285, 0.0025 / 0.285]),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9}, [0.16 / 0.25, 0.09 / 0.25]),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.3}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85]),
        ({"repetition_penalty": 2.0}, [0.4 / 0.9525, 0.3 / 0.9525, 0.15 / 0.9525, 0.1 / 0.9525, 0.0025 / 0.9525]),
    ],
    ids=str,
)
def test_the_distribution_is_the_one_computed_by_hand(setting: dict[str, Any], expected: list[float]) -> None:
    """Within 4 standard deviations for a fixed sequence of samples; the set of possible tokens is exact."""
    count = 3000
    found = draws(count, **setting)
    assert set(found) == set(range(len(expected)))
    for token, probability in enumerate(expected):
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(found.count(token) - count * probability) <= 4 * deviation + 1e-9


def test_the_penalty_counts_prompt_and_reply() -> None:
    logits = torch.tensor([2.0, 1.9, 1.0])
    greedy = sampler(temperature=0.0, repetition_penalty=1.5)
    assert greedy.draw([2], logits) == 0
    assert greedy.draw([0, 2], logits) == 1
    assert greedy.draw([0, 1], logits) == 0, "2.0 / 1.5 is above 1.9 / 1.5 and above 1.0"


def test_greedy_takes_the_first_of_equally_probable_tokens() -> None:
    assert sampler(temperature=0.0).draw([0], torch.tensor([0.5, 2.0, 2.0])) == 1


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others() -> None:
    assert draws(50, seed=7) == draws(50, seed=7)
    assert draws(50, seed=7) != draws(50, seed=8)


def test_sampling_does_not_use_torchs_global_random_state() -> None:
    before = torch.get_rng_state()
    draws(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_are_not_changed() -> None:
    logits = PROBABILITIES.log()
    sampler(top_k=1, repetition_penalty=2.0, temperature=0.5).draw([0], logits)
    assert torch.equal(logits, PROBABILITIES.log())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", math.inf),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("seed", -1),
        ("seed", 0.5),
        ("seed", 1 << 64),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", math.inf),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", 1.5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", 5]),
        ("stop", 5),
        ("stop", ["a"] * 1025),
        ("stop", b"a"),
        ("stop", {"a": 1}),
        ("stop", (text for text in "ab")),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", Decimal(1)),
        ("top_p", "x" * 5000),
        ("repetition_penalty", 1e-320),
        ("repetition_penalty", math.inf),
        ("top_k", [1] * 10_000),
        ("seed", 10**400),
        ("max_tokens", 10**400),
        ("max_tokens", 10**5000),
        ("max_tokens", 1 << 63),
        ("logprobs", True),
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be ") as refusal:
        Sampling(**{name: value})
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 2.5),
        ("top_k", 0),
        ("top_p", 1),
        ("top_p", 1e-6),
        ("min_p", 0),
        ("min_p", 1.0),
        ("repetition_penalty", 0.5),
        ("seed", 0),
        ("seed", (1 << 63) - 1),
        ("max_tokens", 1),
        ("logprobs", 0),
        ("logprobs", 20),
    ],
)
def test_the_ends_of_every_range_are_valid(name: str, value: Any) -> None:
    settings = resolve(Sampling(**{"temperature": 1.0, name: value}), GenerationConfig(), 10, 100)
    assert 0 <= Sampler(settings, 1, 5).draw([0], PROBABILITIES.log()) < 5


@pytest.mark.parametrize("name", ["seed", "max_tokens", "logprobs", "top_k"])
def test_whole_floats_become_integers(name: str) -> None:
    """As in JSON from languages with one type of number."""
    given: dict[str, Any] = {name: 3.0}
    sampling = Sampling(**given)
    assert getattr(sampling, name) == 3
    assert isinstance(getattr(sampling, name), int)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert set(draws(20, temperature=temperature)) == {0}


@pytest.mark.parametrize(("given", "kept"), [("a", ("a",)), (["a", "b"], ("a", "b")), (None, ()), ((), ())])
def test_stop_takes_a_text_or_several(given: Any, kept: tuple[str, ...]) -> None:
    assert Sampling(stop=given).stop == kept


def test_settings_cannot_be_misspelt_or_changed() -> None:
    with pytest.raises(TypeError):
        Sampling(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        Sampling().top_k = 3  # type: ignore[misc]


def resolved(sampling: Sampling, **defaults: Any) -> ResolvedSampling:
    return resolve(sampling, GenerationConfig(**defaults), default_max_tokens=1024, room=2000)


def of(settings: ResolvedSampling) -> tuple[Any, ...]:
    chosen = settings.generation
    return chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p, chosen.repetition_penalty


def test_the_defaults_are_those_of_generate() -> None:
    settings = resolved(Sampling())
    assert not settings.generation.do_sample
    assert of(settings) == (0.0, 50, None, None, None)
    assert (settings.max_tokens, settings.eos, settings.stop) == (1024, frozenset(), ())


def test_the_checkpoints_settings_fill_the_gaps() -> None:
    defaults = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05}
    settings = resolved(Sampling(top_k=5), **defaults, repetition_penalty=1.1, max_new_tokens=77, eos_token_id=[2, 9])
    assert of(settings) == (0.6, 5, 0.95, 0.05, 1.1)
    assert (settings.max_tokens, settings.eos) == (77, frozenset({2, 9}))


def test_a_temperature_counts_only_where_the_checkpoint_samples() -> None:
    assert resolved(Sampling(), do_sample=False, temperature=0.6).temperature == 0
    assert resolved(Sampling(), do_sample=True).temperature == 1
    assert resolved(Sampling(temperature=0), do_sample=True, temperature=0.6).temperature == 0
    assert resolved(Sampling(temperature=0.3), do_sample=False).temperature == 0.3


def test_neutral_values_override_the_checkpoints() -> None:
    defaults = {"do_sample": True, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3}
    settings = resolved(Sampling(top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0), **defaults)
    assert of(settings) == (1.0, 0, 1.0, 0.0, 1.0)


def test_the_checkpoint_is_not_changed() -> None:
    defaults = GenerationConfig(sequence_bias=[[[1, 2], 3.0]])
    resolve(Sampling(logit_bias={4: 5.0}, top_k=3), defaults, 10, 10)
    assert defaults.sequence_bias == [[[1, 2], 3.0]]
    assert defaults.top_k is None


def test_a_checkpoint_may_limit_prompt_and_reply_together() -> None:
    assert resolve(Sampling(), GenerationConfig(max_length=30), 1024, 2000, 10).max_tokens == 20
    assert resolve(Sampling(), GenerationConfig(max_length=5), 1024, 2000, 10).max_tokens == 1
    assert resolve(Sampling(max_tokens=7), GenerationConfig(max_length=30), 1024, 2000, 10).max_tokens == 7


def test_the_shortest_reply_counts_before_the_shortest_sequence() -> None:
    generation = resolve(Sampling(), GenerationConfig(min_length=14, min_new_tokens=5), 1024, 2000, 4).generation
    assert generation.min_length == 9
    assert resolve(Sampling(), GenerationConfig(min_length=14), 1024, 2000, 4).generation.min_length == 14


def test_the_checkpoints_stop_strings_are_stops() -> None:
    assert resolved(Sampling(stop=("a",)), stop_strings=["b", "c"]).stop == ("a", "b", "c")
    assert resolved(Sampling(), stop_strings="b").stop == ("b",)


def test_openais_penalties_count_the_reply_and_not_the_prompt() -> None:
    logits = torch.tensor([2.0, 1.9, 1.0])
    once = sampler(3, 2, temperature=0, presence_penalty=0.2)
    assert once.draw([0, 0], logits) == 0, "the prompt"
    assert once.draw([0, 0, 0], logits) == 1
    assert once.draw([0, 0, 0, 0, 1], logits) == 0, "however often"
    each = sampler(3, 2, temperature=0, frequency_penalty=0.2)
    assert each.draw([0, 0, 0, 1], logits) == 0
    assert each.draw([0, 0, 0, 0, 1], logits) == 1


def test_a_bias_makes_tokens_likelier_or_not() -> None:
    logits = torch.tensor([2.0, 1.9, 1.0])
    assert sampler(3, temperature=0, logit_bias={1: 0.2}).draw([0], logits) == 1
    assert sampler(3, temperature=0, logit_bias={"0": -100, "1": -100.0}).draw([0], logits) == 2


@pytest.mark.parametrize(
    "bias",
    [{"a": 1}, {1: 101}, {-1: 1}, {1: "x"}, [1], {1: math.nan}, {1.5: 1}, {True: 1}, {"1.0": 1}, {1: 10**400},
     {10**400: 1}, {"9" * 5000: 1}, {None: 1}],
    ids=lambda bias: repr(bias)[:12] if "9" not in repr(bias) else "long",
)  # fmt: skip
def test_another_bias_is_refused(bias: Any) -> None:
    with pytest.raises(RequestError, match="^logit_bias must be "):
        Sampling(logit_bias=bias)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "abc"),
        ("temperature", [1]),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_k", []),
        ("top_p", "x"),
        ("top_p", -1),
        ("min_p", "x"),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.nan),
        ("eos_token_id", [[1]]),
        ("eos_token_id", 1.5),
        ("suppress_tokens", ["a"]),
        ("bad_words_ids", [1]),
        ("no_repeat_ngram_size", "x"),
        ("sequence_bias", 5),
        ("max_new_tokens", -3),
    ],
    ids=str,
)
def test_a_checkpoint_that_says_nonsense_is_refused_at_load(field: str, value: Any) -> None:
    defaults = GenerationConfig()
    setattr(defaults, field, value)
    with pytest.raises(CheckpointError, match="^the file does not say how to sample"):
        check_defaults(defaults, "the file", 5)


@pytest.mark.parametrize(("asked", "room", "expected"), [(10, 50, 10), (100, 50, 50), (None, 50, 50)])
def test_the_reply_is_bounded_by_the_context(asked: int | None, room: int, expected: int) -> None:
    assert resolve(Sampling(max_tokens=asked), GenerationConfig(), 1024, room).max_tokens == expected


def test_end_tokens_can_be_ignored() -> None:
    assert resolved(Sampling(), eos_token_id=2).eos == {2}
    assert resolved(Sampling(ignore_eos=True), eos_token_id=2).eos == frozenset()


def test_a_seed_is_chosen_when_none_is_given() -> None:
    assert resolved(Sampling(seed=5)).seed == 5
    assert resolved(Sampling()).seed != resolved(Sampling()).seed


def test_half_of_a_character_is_no_stop_text() -> None:
    with pytest.raises(RequestError, match="^stop has half of a character"):
        Sampling(stop=("a", "\ud800"))


def test_numbers_of_numpy_are_numbers() -> None:
    settings = Sampling(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        max_tokens=5.0,  # type: ignore[arg-type]
        logit_bias={np.int32(3): np.float64(-2)},
    )
    assert settings == Sampling(temperature=0.5, top_k=3, max_tokens=5, logit_bias={3: -2.0})
    assert type(settings.top_k) is type(settings.max_tokens) is int


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_settings_that_leave_no_token_are_an_error(temperature: float) -> None:
    defaults = GenerationConfig(suppress_tokens=[0, 1, 2])
    settings = resolve(Sampling(temperature=temperature, seed=1), defaults, 10, 10, 1)
    with pytest.raises(LogitsError, match="^the settings of the request leave no token"):
        Sampler(settings, 1, 3).draw([0], torch.zeros(3))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_logits_that_are_not_finite_are_an_error(wrong: float, settings: dict[str, Any], on_device: bool) -> None:
    row = torch.randn(400, generator=torch.Generator().manual_seed(1))
    drawing = sampler(400, **settings)
    logits = split_on_device(row) if on_device else row
    drawing.draw([0], logits)
    row[123] = wrong
    logits = split_on_device(row) if on_device else row
    with pytest.raises(LogitsError, match="^the model's logits are not finite"):
        drawing.draw([0], logits)


def split_on_device(row: torch.Tensor) -> Any:
    return CountedLogits(row[None]).split([1])[0][0]


def test_a_token_that_the_settings_force_is_taken() -> None:
    """As at the end of a reply by `exponential_decay_length_penalty`, whose power exceeds all numbers."""
    defaults = GenerationConfig(exponential_decay_length_penalty=(1, 1e30), eos_token_id=2)
    settings = resolve(Sampling(temperature=0), defaults, 10, 10, 1)
    assert Sampler(settings, 1, 3).draw([0] * 9, torch.tensor([5.0, 4.0, 1.0])) == 2
