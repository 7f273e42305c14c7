"""Settings of a checkpoint's generation_config.json that were ignored elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.field.case import PROMPT, Case, edit, reference, reply, same, speaking, tiny, weights, words_tokenizer
from bench.support.zoo import make
from edgemoe import Engine, RequestError, Sampling


def _as_generate(folder: Path, family: str = "qwen3_moe", prompt: Any = PROMPT, **fields: Any) -> str:
    """Whether the reply under `fields` is transformers', and not what it would be without them."""
    tiny(folder, family)
    before = reply(folder, prompt, 12)
    edit(folder / "generation_config.json", **{name: _value(value, before) for name, value in fields.items()})
    right = reference(folder, prompt, 12)
    if right == before:
        return f"the setting changes nothing: {before}"
    return same(reply(folder, prompt, 12), right) or same(reply(folder, prompt, 12, speculate="ngram"), right)


def _value(value: Any, before: list[int]) -> Any:
    """`value`, or what it makes of the ids that are said without the setting."""
    return value(before) if callable(value) else value


def _min_tokens_and_an_eos_list(folder: Path) -> str:
    tiny(folder)
    before = reply(folder, PROMPT, 12)
    edit(folder / "generation_config.json", eos_token_id=[2, before[1]], min_new_tokens=5)
    right = reference(folder, PROMPT, 12)
    if before[1] in right[:5] or len(right) == 0:
        return f"the setting changes nothing: {right}"
    return same(reply(folder, PROMPT, 12), right)


def _ignored_eos_leaves_the_last_id(folder: Path) -> str:
    tiny(folder)
    before = reply(folder, PROMPT, 12)
    edit(folder / "generation_config.json", eos_token_id=before[2])
    return same(reply(folder, PROMPT, 12, sampling={"ignore_eos": True}), before)


def _penalties_of_the_reply_alone(folder: Path) -> str:
    """The model says A after A, and B is nearly as likely: in the prompt A costs nothing, in the reply it does."""
    speaking(folder, words_tokenizer(["A", "B"], []), ["A", "A"])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        ids = words_tokenizer(["A", "B"], []).get_vocab()
        tensors["lm_head.weight"][ids["B"]] = 0.99 * tensors["lm_head.weight"][ids["A"]]

    weights(folder, change)
    a, b = (words_tokenizer(["A", "B"], []).get_vocab()[word] for word in "AB")
    logits = 50 * 8 * 0.01
    penalty = min(2.0, logits / 2 + 1)
    return same(reply(folder, [a, a, a], 2, sampling={"presence_penalty": penalty})[0], a) or same(
        reply(folder, [a, a, a], 1, sampling={"repetition_penalty": 2.0}), [b]
    )


def _bias_beyond_the_vocabulary(folder: Path) -> str:
    tiny(folder)
    with Engine.load(folder, state_folder="none", device="cpu") as engine:
        for token in (256, -1):
            try:
                engine.generate(list(PROMPT), Sampling(temperature=0, max_tokens=2, logit_bias={token: 5.0}))
            except RequestError as error:
                if str(token) not in str(error):
                    return f"the id {token} is not named: {error}"
            else:
                return f"the id {token} is accepted"
        return same(len(engine.generate(list(PROMPT), Sampling(temperature=0, max_tokens=2)).token_ids), 2)


def _sampled_by_default(folder: Path) -> str:
    tiny(folder)
    greedy = reply(folder, PROMPT, 12)
    edit(folder / "generation_config.json", do_sample=True, temperature=1.5, top_k=64, top_p=0.99)
    with Engine.load(folder, state_folder="none", device="cpu") as engine:
        drawn = {
            tuple(engine.generate(list(PROMPT), Sampling(max_tokens=12, seed=seed)).token_ids) for seed in range(6)
        }
        told = list(engine.generate(list(PROMPT), Sampling(max_tokens=12, temperature=0)).token_ids)
    return same(told, greedy) or ("" if len(drawn) > 1 else "every reply is the same")


def _no_eos_in_the_tokenizer(folder: Path) -> str:
    make("qwen3_moe", folder)
    words_tokenizer(["a"], []).save_pretrained(folder)
    before = reply(folder, PROMPT, 8)
    edit(folder / "generation_config.json", eos_token_id=before[0], min_new_tokens=3)
    return same(reply(folder, PROMPT, 8), reference(folder, PROMPT, 8))


def _suppressed(folder: Path) -> str:
    return _as_generate(folder, "gemma4", suppress_tokens=lambda before: [before[0]])


def _no_repeated_ngrams(folder: Path) -> str:
    """The model says A after B and B after A: the prompt has every three of them already."""
    tokenizer = words_tokenizer(["A", "B"], [])
    speaking(folder, tokenizer, ["A", "B", "A"])
    a, b = (tokenizer.get_vocab()[word] for word in "AB")
    edit(folder / "generation_config.json", no_repeat_ngram_size=3)
    found = reply(folder, [a, b, a, b], 4)
    return same(found, reference(folder, [a, b, a, b], 4)) or ("" if found[0] != a else "repeated")


def _bad_words_of_several_tokens(folder: Path) -> str:
    return _as_generate(folder, bad_words_ids=lambda before: [before[1:3], [before[4]]])


CASES = [
    Case("cloudrift-ai/emmy#413, microsoft/onnxruntime-genai#2201", "suppress_tokens", _suppressed),
    Case("microsoft/onnxruntime-genai#2241", "no_repeat_ngram_size counts the prompt", _no_repeated_ngrams),
    Case("vllm-project/vllm#15407", "min_new_tokens holds every end back", _min_tokens_and_an_eos_list),
    Case("NVIDIA/TensorRT-LLM#12358", "an ignored end masks no other token", _ignored_eos_leaves_the_last_id),
    Case("osaurus-ai/vmlx-swift#295", "presence penalty counts the reply alone", _penalties_of_the_reply_alone),
    Case("vllm-project/vllm#16529", "a bias beyond the vocabulary is refused by its id", _bias_beyond_the_vocabulary),
    Case("Blaizzy/mlx-vlm#1331", "a checkpoint that samples samples", _sampled_by_default),
    Case("sgl-project/sglang#31972", "min_new_tokens without an end in the tokenizer", _no_eos_in_the_tokenizer),
    Case("vllm-project/vllm#23886", "bad words of one and of several tokens", _bad_words_of_several_tokens),
]
