"""Log-probabilities that were too few, cut by the sampling settings, or no JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from bench.field.case import PROMPT, Case, edgemoe, edit, same, speaking, tiny, words_tokenizer
from edgemoe import Engine, Sampling


def _listed(folder: Path, **settings: Any) -> Any:
    """The log-probabilities of a greedy reply."""
    with Engine.load(folder, state_folder="none", device="cpu") as engine:
        sampling = Sampling(**{"temperature": 0.0, "max_tokens": 6, "logprobs": 5, "ignore_eos": True} | settings)
        return engine.generate(list(PROMPT), sampling)


def _as_many_as_asked_for(folder: Path) -> str:
    tiny(folder)
    for count in (0, 1, 5, 20):
        for item in _listed(folder, logprobs=count).logprobs:
            values = [value for _, _, value in item.top]
            if len(values) != count or values != sorted(values, reverse=True):
                return f"{count} asked for, {values}"
    return ""


def _bytes_that_are_no_character(folder: Path) -> str:
    """Tokens that are single bytes: eight alternatives, and the chosen one's value the same in both places."""
    tiny(folder)
    line = json.dumps({"prompt": "a", "max_tokens": 4, "temperature": 0, "logprobs": 8})
    done = edgemoe(["run", "-", "-m", folder], stdin=line + "\n")
    found = json.loads(done.stdout)["response"]["body"]["choices"][0]["logprobs"]
    for chosen, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        if len(top) != 8 or abs(max(top.values()) - chosen) > 1e-6:
            return f"{chosen}: {top}"
    return ""


def _before_the_settings(folder: Path) -> str:
    """Whatever cuts the distribution, the values are those of the model."""
    tiny(folder)
    plain, cut = _listed(folder), _listed(folder, top_p=0.1, top_k=2, temperature=1e-7)
    return same(
        [(item.token_id, round(item.logprob, 5), len(item.top)) for item in cut.logprobs],
        [(item.token_id, round(item.logprob, 5), len(item.top)) for item in plain.logprobs],
    )


def _impossible_tokens_are_json(folder: Path) -> str:
    speaking(folder, words_tokenizer(["a", "b"], []), ["a", "b"])
    edit(folder / "generation_config.json", suppress_tokens=list(range(10, 256)))
    line = json.dumps(
        {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 20, "max_tokens": 2}
    )
    done = edgemoe(["run", "-", "-m", folder], stdin=line + "\n")

    def refuse(name: str) -> None:
        raise ValueError(name)

    record = json.loads(done.stdout, parse_constant=refuse)
    content = record["response"]["body"]["choices"][0]["logprobs"]["content"]
    return same([len(item["top_logprobs"]) for item in content], [20, 20])


def _as_many_as_tokens(folder: Path) -> str:
    """An entry for each token that was generated, with either of two ends."""
    tiny(folder)
    ids = list(_listed(folder, logprobs=None).token_ids)
    for end in (ids[2], ids[4]):
        edit(folder / "generation_config.json", eos_token_id=[2, end])
        found = _listed(folder, logprobs=2, ignore_eos=False)
        if len(found.logprobs) != len(found.token_ids):
            return f"{len(found.logprobs)} entries for {len(found.token_ids)} tokens"
    return ""


def _true_values(folder: Path) -> str:
    """Against the log-softmax of transformers' logits, at any temperature."""
    from transformers import AutoModelForCausalLM

    tiny(folder)
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([PROMPT])).logits[0, -1]
    right = torch.log_softmax(logits.float(), 0)
    for temperature in (0.0, 0.7, 2.0):
        item = _listed(folder, temperature=temperature, seed=1, max_tokens=1).logprobs[0]
        if not math.isclose(item.logprob, float(right[item.token_id]), abs_tol=1e-4):
            return f"{item.logprob} at temperature {temperature}, not {float(right[item.token_id])}"
    return ""


CASES = [
    Case("sgl-project/sglang#32290", "tokens that decode alike", _bytes_that_are_no_character),
    Case("InternLM/lmdeploy#1548", "as many alternatives as asked for", _as_many_as_asked_for),
    Case("huggingface/text-generation-inference#2108", "top_p does not change them", _before_the_settings),
    Case("dphnAI/sonar#183, sgl-project/sglang#5984", "suppressed tokens are still JSON", _impossible_tokens_are_json),
    Case("NVIDIA/TensorRT-LLM#18190", "an entry for each token, the end included", _as_many_as_tokens),
    Case("ollama/ollama#16196", "the model's own values at every temperature", _true_values),
]
