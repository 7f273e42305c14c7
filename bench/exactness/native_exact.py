"""`native-exact`: packed checkpoints with few slots against transformers on the same values in float32."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.measurement import BaseSize, Measurement
from bench.support.packing import PACKINGS, mxfp4_checkpoint, packed_checkpoint, widened
from bench.support.zoo import make
from edgemoe import Engine, Sampling
from edgemoe.quiet import quiet_transformers

NAME = "native-exact"
BAR = "greedy tokens equal transformers' on the widened weights; log-probabilities within 1e-4"
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "olmoe", "minimax_m2", "qwen2_moe")
PROMPT = (5, 60, 70, 80, 9, 200, 31)


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Families, formats and tokens of a reply."""

    families: tuple[str, ...] = FAMILIES
    packings: tuple[str, ...] = tuple(PACKINGS)
    tokens: int = 64


FULL, SMALL = Size(), Size(small=True, families=("qwen3_moe",), packings=("fp8", "awq"), tokens=6)


def run(size: Size = FULL, device: str = "cpu") -> Measurement:
    """Every family in every format, and gpt-oss in its own."""
    wrong: dict[str, Any] = {}
    largest, count = 0.0, 0
    cases = [("gpt_oss", "mxfp4"), *((family, packing) for family in size.families for packing in size.packings)]
    for family, packing in cases:
        with tempfile.TemporaryDirectory(prefix="edgemoe-native-") as folder, quiet_transformers():
            found = compare(Path(folder), family, packing, size.tokens, device)
        count += 1
        largest = max(largest, found["logprob"])
        if not found["same"] or found["logprob"] > 1e-4:
            wrong[f"{family}, {packing}"] = found
    value = {"cases": count, "wrong": sorted(wrong), "largest_difference": largest}
    return Measurement(NAME, value, BAR, not wrong, wrong)


def compare(folder: Path, family: str, packing: str, tokens: int, device: str) -> dict[str, Any]:
    """Whether the tokens are the same, and the largest difference of the chosen tokens' log-probabilities."""
    packed = make(family, folder / "packed")
    if packing == "mxfp4":
        mxfp4_checkpoint(packed)
    else:
        packed_checkpoint(packed, PACKINGS[packing])
    names = list(widened(packed, folder / "widened"))
    with Engine.load(packed, device=device, dtype="float32", state_folder="none", expert_cache="30%") as engine:
        sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0)
        reply = engine.generate(list(PROMPT), sampling)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "widened", dtype=torch.float32)
    model = model.to(device).eval()
    with torch.inference_mode():
        right = model.generate(
            torch.tensor([PROMPT], device=device), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    ids = right.sequences[0, len(PROMPT) :].tolist()
    differences = [
        abs(float(torch.log_softmax(logits[0].float(), 0)[token]) - item.logprob)
        for logits, token, item in zip(right.logits, ids, reply.logprobs or (), strict=False)
    ]
    same = ids == list(reply.token_ids)
    return {"same": same, "logprob": max(differences) if same else float("inf"), "packed": len(names)}
