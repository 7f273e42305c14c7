"""`exact`: greedy tokens and prefill logits of every family in the zoo against transformers, in float32."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.measurement import Measurement
from bench.support.zoo import FAMILIES, REFUSED, WRAPPERS, make
from edgemoe import Engine, Sampling
from edgemoe.quiet import quiet_transformers

NAME = "exact"
BAR = "same token ids and length as transformers' generate; prefill logits within 1e-4"
TOKENS = 64
PROMPT = 23


def run() -> Measurement:
    """Every family with a cache of (top-k + 2) slots a layer and with half that many in all."""
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in [name for name in [*FAMILIES, *WRAPPERS] if name not in REFUSED]:
            found[family] = compare(family, Path(folder) / family)
            print(f"{family:20} same tokens: {found[family]['same']}, logits {found[family]['logits']:.1e}", flush=True)
    wrong = [family for family, item in found.items() if not item["same"] or item["logits"] > 1e-4]
    worst = max(item["logits"] for item in found.values())
    value = {"families": len(found), "wrong": wrong, "largest_logit_difference": worst}
    return Measurement(NAME, value, BAR, not wrong, {"tokens": TOKENS})


def compare(family: str, folder: Path) -> dict[str, Any]:
    """Whether both cache sizes give transformers' tokens, and the largest difference of the prefill's logits."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        make(family, folder)
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        prompt = torch.randint(3, 250, (1, PROMPT), generator=torch.Generator().manual_seed(1))
        expected = peer.generate(prompt, max_new_tokens=TOKENS, do_sample=False)[0, PROMPT:].tolist()
        with torch.inference_mode():
            logits = peer(prompt).logits[0, -1]
    plan = Engine.plan_for(folder, device="cpu", expert_cache=1)
    slots = plan.layers * (plan.top_k + 2)
    same, difference = True, 0.0
    for count in (slots, slots // 2):
        with Engine.load(folder, device="cpu", expert_cache=count, threads=1) as engine:
            completion = engine.generate(prompt[0].tolist(), Sampling(max_tokens=TOKENS))
            same = same and list(completion.token_ids) == expected
            found = engine._scheduler.runner.step(engine._scheduler.runner.start(PROMPT), prompt[0].tolist())
            difference = max(difference, float((found - logits).abs().max()))
    return {"same": same, "logits": difference}
