"""`exact`: greedy tokens and prefill logits of every family in the zoo against transformers, in float32."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.measurement import BaseSize, Measurement
from bench.support.engine_parts import runner_of
from bench.support.zoo import TESTED, make
from edgemoe import Engine, Sampling
from edgemoe.quiet import quiet_transformers

NAME = "exact"
BAR = "same token ids and length as transformers' generate; prefill logits within 1e-4"
PROMPT = 23


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The families, and the greedy tokens of each."""

    families: tuple[str, ...] = TESTED
    tokens: int = 64


FULL, SMALL = Size(), Size(small=True, families=("mixtral",), tokens=8)


def run(size: Size = FULL) -> Measurement:
    """Every family with a cache of (top-k + 2) slots a layer and with half that many in all."""
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in size.families:
            found[family] = compare(family, Path(folder) / family, size.tokens)
            print(f"{family:20} same tokens: {found[family]['same']}, logits {found[family]['logits']:.1e}", flush=True)
    wrong = [family for family, item in found.items() if not item["same"] or item["logits"] > 1e-4]
    worst = max(item["logits"] for item in found.values())
    value = {"families": len(found), "wrong": wrong, "largest_logit_difference": worst}
    return Measurement(NAME, value, BAR, not wrong, {"tokens": size.tokens})


def compare(family: str, folder: Path, tokens: int, device: str = "cpu") -> dict[str, Any]:
    """Whether both cache sizes give transformers' tokens, and the largest difference of the prefill's logits.

    Both sides run on `device`.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        make(family, folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        peer = model.to(device).eval()
        prompt = torch.randint(3, 250, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
        expected = peer.generate(prompt, max_new_tokens=tokens, do_sample=False)[0, PROMPT:].tolist()
        with torch.inference_mode():
            logits = peer(prompt).logits[0, -1].cpu()
    plan = Engine.plan_for(folder, device=device, expert_cache=1)
    slots = plan.layers * (plan.top_k + 2)
    same, difference = True, 0.0
    for count in (slots, slots // 2):
        with Engine.load(folder, device=device, expert_cache=count, threads=1) as engine:
            completion = engine.generate(prompt[0].tolist(), Sampling(max_tokens=tokens))
            same = same and list(completion.token_ids) == expected
            runner = runner_of(engine)
            found = runner.step(runner.start(PROMPT), prompt[0].tolist())
            difference = max(difference, float((found - logits).abs().max()))
    return {"same": same, "logits": difference}
