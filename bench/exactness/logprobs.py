"""`logprobs`: log-probabilities of tokens and of their alternatives against the log-softmax of transformers' logits."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.exactness.generate_parity import FAMILIES
from bench.measurement import BaseSize, Measurement
from bench.support.zoo import make
from edgemoe import Engine, Sampling
from edgemoe.quiet import quiet_transformers
from edgemoe.results import TokenLogprob

NAME = "logprobs"
BAR = "within 1e-4, as many alternatives as asked for, and the likeliest ones"
LARGEST = 1e-4
ALTERNATIVES = (0, 1, 8, 20)
SAMPLINGS = (Sampling(temperature=0.0), Sampling(temperature=1.3, top_k=0, seed=5))
DRAFTERS = ("off", "ngram+self")
PROMPT = [5, 60, 70, 80, 60, 70]


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The families, and the tokens of a reply."""

    families: tuple[str, ...] = FAMILIES
    tokens: int = 24


FULL, SMALL = Size(), Size(small=True, families=("mixtral",), tokens=4)


def run(size: Size = FULL) -> Measurement:
    """Greedy and sampled replies, with and without drafts, with every number of alternatives."""
    torch.set_num_threads(1)
    worst, count = 0.0, 0
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for family in size.families:
            for drafter, case, entries, truth in replies(family, Path(folder) / family, size.tokens):
                difference, fault = compared(entries, truth, case)
                worst, count = max(worst, difference), count + len(entries)
                wrong += [f"{family} {drafter} {case}: {fault}"] if fault else []
            print(f"{family:20} largest difference {worst:.1e}", flush=True)
    value = {"tokens": count, "largest_difference": worst, "wrong": wrong}
    return Measurement(NAME, value, BAR, worst <= LARGEST and not wrong)


def replies(family: str, folder: Path, tokens: int) -> Any:
    """The drafter, the alternatives asked for, what the engine says of each token, and the right log-probabilities."""
    with quiet_transformers():
        make(family, folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for drafter in DRAFTERS:
        with Engine.load(folder, device="cpu", threads=1, speculate=drafter, state_folder="none") as engine:
            for sampling in SAMPLINGS:
                for alternatives in ALTERNATIVES:
                    asked = Sampling(**{**vars(sampling), "logprobs": alternatives, "max_tokens": tokens})
                    reply = engine.generate(PROMPT, asked)
                    with torch.inference_mode():
                        logits = model(torch.tensor([[*PROMPT, *reply.token_ids]])).logits[0]
                    yield drafter, alternatives, reply.logprobs, logits[len(PROMPT) - 1 : -1].log_softmax(-1)


def compared(entries: tuple[TokenLogprob, ...], truth: torch.Tensor, alternatives: int) -> tuple[float, str]:
    """The largest difference, and what is wrong otherwise."""
    worst = 0.0
    for entry, right in zip(entries, truth, strict=True):
        if len(entry.top) != alternatives:
            return worst, f"{len(entry.top)} alternatives"
        if len({token for token, _, _ in entry.top}) != alternatives:
            return worst, "a token twice among the alternatives"
        said = torch.tensor([value for _, _, value in entry.top])
        ids = [token for token, _, _ in entry.top]
        best = right.topk(alternatives).values
        differences = [
            (said - right[ids]).abs(),
            (said - best).abs(),
            (entry.logprob - right[entry.token_id]).abs()[None],
        ]
        worst = max(worst, float(torch.cat(differences).max()))
        if any(token == entry.token_id and value != entry.logprob for token, _, value in entry.top):
            return worst, "two values for one token"
    return worst, ""
