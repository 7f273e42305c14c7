"""`batch-exact`: 32 mixed requests together against one by one, in float32, for every family of the zoo."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.measurement import BaseSize, Measurement
from bench.support.byte_tokenizer import with_tokenizer
from bench.support.engine_parts import runner_of
from bench.support.zoo import TESTED, make
from edgemoe import Completion, Engine, RequestError, Sampling
from edgemoe.quiet import quiet_transformers

NAME = "batch-exact"
BAR = "identical token ids, per request, in every family"
LONG = (600, 433, 257, 130)
"""Tokens of the longest prompts; the others have 1 to 60."""
CONTEXT = 768

Request = tuple[list[int], Sampling]


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The families, and the requests of each: six at least."""

    families: tuple[str, ...] = TESTED
    requests: int = 32


FULL, SMALL = Size(), Size(small=True, families=("mixtral",), requests=6)


def run(size: Size = FULL) -> Measurement:
    """Every family with a cache of (top-k + 2) slots a layer: 16 at a time, then one at a time."""
    torch.set_num_threads(1)
    found = {}
    requests = mixed_requests(size.requests)
    with tempfile.TemporaryDirectory() as folder:
        for family in size.families:
            found[family] = compare(family, Path(folder) / family, requests)
            way = "packed" if found[family]["packed"] else "side by side"
            print(f"{family:20} {found[family]['same']} of {size.requests} the same, {way}", flush=True)
    wrong = [family for family, item in found.items() if item["same"] != size.requests]
    packed = sum(item["packed"] for item in found.values())
    value = {"families": len(found), "packed": packed, "side_by_side": len(found) - packed, "wrong": wrong}
    return Measurement(NAME, value, BAR, not wrong, {"requests": size.requests, "batch": 16})


def mixed_requests(count: int) -> list[Request]:
    """Short and long prompts; greedy and sampled, with seeds, stop texts, lengths, log-probabilities of all kinds."""
    draw = random.Random(0)
    lengths = [*LONG, 1, 2, *(draw.randint(1, 60) for _ in range(count - len(LONG) - 2))]
    draw.shuffle(lengths)
    requests = []
    for number, length in enumerate(lengths):
        prompt = [draw.randint(3, 250) for _ in range(length)]
        sampled: dict[str, Any] = {"temperature": 0.0}
        if number % 2:
            sampled = {"temperature": draw.choice([0.7, 1.0, 1.5]), "seed": number, "top_p": draw.choice([1.0, 0.9])}
        stop = tuple(chr(draw.randint(97, 122)) for _ in range(3)) if number % 3 == 0 else ()
        settings = Sampling(
            max_tokens=draw.randint(1, 24), stop=stop, logprobs=2 if number % 5 == 0 else None, **sampled
        )
        requests.append((prompt, settings))
    return requests


def compare(family: str, folder: Path, requests: list[Request]) -> dict[str, Any]:
    """How many requests get the same token ids together as alone."""
    with quiet_transformers():
        make(family, folder, max_position_embeddings=CONTEXT)
        with_tokenizer(folder)
    plan = Engine.plan_for(folder, device="cpu", expert_cache=1)
    slots = plan.layers * (plan.top_k + 2)
    settings: dict[str, Any] = {"device": "cpu", "expert_cache": slots, "threads": 1, "context": CONTEXT}
    with Engine.load(folder, batch=1, **settings) as engine:
        alone = [engine.generate(*request) for request in requests]
    with Engine.load(folder, batch=16, **settings) as engine:
        together = dict(engine.generate_batch(requests))
        packed = runner_of(engine).packs
    same = sum(_same(reply, together[number]) for number, reply in enumerate(alone))
    return {"same": same, "packed": packed}


def _same(alone: Completion, together: Completion | RequestError) -> bool:
    if isinstance(together, RequestError):
        return False
    return alone.token_ids == together.token_ids and alone.text == together.text
