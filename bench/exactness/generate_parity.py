"""`generate-parity`: replies under random generation settings of a checkpoint against transformers' `generate`."""

from __future__ import annotations

import itertools
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from bench.measurement import BaseSize, Measurement
from bench.support.engine_parts import generation_defaults
from bench.support.zoo import make
from edgemoe import Engine, Sampling
from edgemoe.checkpoint.generation_defaults import NOT_SERVED, not_served
from edgemoe.quiet import quiet_transformers
from edgemoe.request.gumbel_noise import gumbel_noise

NAME = "generate-parity"
BAR = "the same tokens as generate alone, with drafts and in a batch, or the field is named as not served"
FAMILIES = (
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "glm4_moe",
    "ernie4_5_moe",
    "phimoe",
    "qwen3_next",
    "gemma4",
)
TOGETHER = 5
"""Draws that run as one batch."""
TOKENS = 14
VOCABULARY = 256


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The families, and the draws of settings for each."""

    families: tuple[str, ...] = FAMILIES
    draws: int = 200


FULL, SMALL = Size(), Size(small=True, families=("mixtral",), draws=15)


@dataclass(frozen=True)
class Draw:
    """A prompt, the seed of its noise, and what the checkpoint says about generation."""

    prompt: list[int]
    seed: int
    fields: dict[str, Any]

    def config(self) -> GenerationConfig:
        """The fields, as transformers holds them."""
        return GenerationConfig(**self.fields)


def run(size: Size = FULL) -> Measurement:
    """For every draw the tokens of `generate`, of an engine without drafts, of one with drafts and of a batch."""
    torch.set_num_threads(1)
    wrong: dict[str, list[str]] = {}
    compared = named = 0
    with tempfile.TemporaryDirectory() as folder:
        for family in size.families:
            draws = list(random_draws(random.Random(family), size.draws))
            served = [draw for draw in draws if not not_served(draw.config())]
            wrong[family] = compare(family, Path(folder) / family, served)
            compared, named = compared + len(served), named + len(draws) - len(served)
            print(f"{family:20} {len(served)} draws, wrong: {wrong[family] or 'none'}", flush=True)
    found = {family: each for family, each in wrong.items() if each}
    return Measurement(NAME, {"compared": compared, "named": named, "wrong": found}, BAR, not found)


def random_draws(draw: random.Random, count: int) -> Iterator[Draw]:
    """Settings of which each is there or not, with values that matter for so short a reply."""
    while count:
        fields = {name: make_value(draw) for name, make_value in FIELDS.items() if draw.random() < _share(name)}
        fields |= {"do_sample": draw.random() < 0.5, "eos_token_id": _ids(draw, 3)}
        fields.setdefault("max_new_tokens", TOKENS)
        if draw.random() < 0.1:
            del fields["max_new_tokens"]
            fields["max_length"] = 24
        made = Draw(_ids(draw, draw.choice((1, 4, 20))), draw.randrange(1 << 40), fields)
        # transformers refuses some together, as a token that is both forced and suppressed.
        with suppress(ValueError):
            made.config()
            count -= 1
            yield made


def _share(name: str) -> float:
    """How often a field is there: seldom where all that it can show is that it is named."""
    return 0.02 if name in NOT_SERVED else 0.17


def _ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(3, VOCABULARY) for _ in range(count)]


def _number(low: float, high: float) -> Callable[[random.Random], float]:
    return lambda draw: round(draw.uniform(low, high), 3)


def _whole(low: int, high: int) -> Callable[[random.Random], int]:
    return lambda draw: draw.randint(low, high)


def _many_ids(draw: random.Random) -> list[int]:
    return _ids(draw, 120)


FIELDS: dict[str, Callable[[random.Random], Any]] = {
    "temperature": _number(0.2, 2),
    "top_k": _whole(1, 80),
    "top_p": _number(0.1, 1),
    "min_p": _number(0, 0.5),
    "typical_p": _number(0.2, 1),
    "top_h": _number(0.2, 1),
    "epsilon_cutoff": _number(0.001, 0.01),
    "eta_cutoff": _number(0.001, 0.01),
    "repetition_penalty": _number(0.5, 2),
    "no_repeat_ngram_size": _whole(1, 3),
    "bad_words_ids": lambda draw: [_ids(draw, draw.randint(1, 2)) for _ in range(60)],
    "min_length": _whole(1, 24),
    "min_new_tokens": _whole(1, 12),
    "max_new_tokens": _whole(1, TOKENS),
    "forced_bos_token_id": lambda draw: draw.randrange(VOCABULARY),
    "forced_eos_token_id": lambda draw: draw.randrange(VOCABULARY),
    "remove_invalid_values": lambda draw: True,
    "exponential_decay_length_penalty": lambda draw: (draw.randint(1, 6), draw.uniform(1, 1.5)),
    "suppress_tokens": _many_ids,
    "begin_suppress_tokens": _many_ids,
    "sequence_bias": lambda draw: [[_ids(draw, draw.randint(1, 2)), draw.uniform(-4, 4)] for _ in range(60)],
    "renormalize_logits": lambda draw: True,
    "watermarking_config": lambda draw: {"bias": draw.uniform(0, 3), "greenlist_ratio": 0.25},
    "num_beams": _whole(1, 2),
    "guidance_scale": _number(1, 2),
    "penalty_alpha": _number(0.1, 1),
}
"""Fields of GenerationConfig that bear on the tokens."""


def compare(family: str, folder: Path, draws: list[Draw]) -> list[str]:
    """What differs: the way of running, and the fields of the draw."""
    with quiet_transformers():
        make(family, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        answers = [generated(model, draw) for draw in draws]
    draws = [draw for draw, answer in zip(draws, answers, strict=True) if answer is not None]
    expected = [answer for answer in answers if answer is not None]
    wrong = []
    for way, drafter in {"alone": "off", "drafts": "ngram+self"}.items():
        with Engine.load(folder, device="cpu", threads=1, batch=1, speculate=drafter, state_folder="none") as engine:
            found = [replies(engine, [draw])[0] for draw in draws]
        wrong += [f"{way}: {draw.fields}" for draw, *pair in zip(draws, expected, found, strict=True) if _differ(pair)]
    with Engine.load(
        folder, device="cpu", threads=1, batch=TOGETHER, speculate="ngram+self", state_folder="none"
    ) as engine:
        batches = [draws[at : at + TOGETHER] for at in range(0, len(draws), TOGETHER)]
        found = [reply for batch in batches for reply in replies(engine, batch)]
    return wrong + [
        f"batch: {draw.fields}" for draw, *pair in zip(draws, expected, found, strict=True) if _differ(pair)
    ]


def _differ(pair: list[list[int]]) -> bool:
    return pair[0] != pair[1]


def generated(model: Any, draw: Draw) -> list[int] | None:
    """The reply of `generate`, which draws tokens by the noise of the engine's sampler; None where it fails.

    It fails where processors make a NaN: where a token that may not come yet is made likelier by its position.
    """
    samples = itertools.count()

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        if probabilities.isnan().any():
            raise ArithmeticError
        noise = gumbel_noise(draw.seed, next(samples), torch.arange(probabilities.shape[-1]))
        return (probabilities.log() + noise).argmax(-1, keepdim=True)

    model.generation_config = draw.config()
    patched = mock.patch.object(torch, "multinomial", multinomial)
    with patched, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ids = model.generate(torch.tensor([draw.prompt]))
        except (ArithmeticError, ValueError):
            return None
    return [int(token) for token in ids[0, len(draw.prompt) :]]


def replies(engine: Engine, draws: list[Draw]) -> list[list[int]]:
    """The replies of `engine` as if its checkpoint said what each of `draws` says; all at once."""

    def requests() -> Iterator[tuple[list[int], Sampling]]:
        for draw in draws:
            with generation_defaults(engine, draw.config()):
                yield draw.prompt, Sampling(seed=draw.seed)

    found: dict[int, list[int]] = {}
    for number, reply in engine.generate_batch(requests()):
        if isinstance(reply, Exception):
            raise reply
        found[number] = list(reply.token_ids)
    return [found[number] for number in range(len(draws))]
