"""Replies that consist of reasoning and an answer, and turns that did not end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.field.case import CHATML, Case, choice, edit, holds, same, speaking, words_tokenizer
from edgemoe import Engine

ASK = ({"role": "user", "content": "Hello!"},)
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


def _parts(found: dict[str, Any], content: str, reasoning: str | None) -> str:
    message = found["message"]
    return same((message["content"], message.get("reasoning_content")), (content, reasoning))


def _harmony(folder: Path) -> str:
    said = ["assistant", "<|channel|>", "analysis", "<|message|>", "We must greet.", "<|end|>"]
    said += ["final", "Hello!", "<|return|>"]
    template = "{% for m in messages %}<|start|>{{m.role}}<|message|>{{m.content}}<|end|>{% endfor %}<|start|>assistant"
    tokenizer = words_tokenizer([*said, "user"], HARMONY, template=template, eos="<|return|>")
    return _parts(choice(speaking(folder, tokenizer, said, "gpt_oss"), ASK), "Hello!", "We must greet.")


def _thinking(
    folder: Path, said: list[str], template: str, *, added: tuple[str, ...] = ("<think>", "</think>")
) -> Path:
    words = [each for each in said if each not in added]
    tokenizer = words_tokenizer(
        [*words, "Hello!", "user"], ["<|im_start|>", "<|im_end|>"], added=added, template=template, eos="<|im_end|>"
    )
    return speaking(folder, tokenizer, said)


def _thinking_switched_off(folder: Path) -> str:
    template = CHATML.replace(
        "{% endif %}",
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}",
    )
    _thinking(folder, ["</think>", "391", "<|im_end|>"], template)
    return _parts(choice(folder, ASK, variables={"enable_thinking": False}), "391", None)


def _template_opens_the_reasoning(folder: Path) -> str:
    _thinking(
        folder, ["<think>", "r", "</think>", "ans", "<|im_end|>"], CHATML.replace("assistant\n", "assistant\n<think>")
    )
    return _parts(choice(folder, ASK), "ans", "r")


def _closing_mark_in_pieces(folder: Path) -> str:
    template = CHATML.replace("assistant\n", "assistant\n<think>")
    _thinking(folder, ["assistant\n<think>", "r", "</th", "ink>", "ans", "<|im_end|>"], template, added=())
    return _parts(choice(folder, ASK), "ans", "r")


def _harmony_cut_short(folder: Path) -> str:
    said = ["assistant", "<|channel|>", "analysis", "<|message|>", "a", "b", "c", "<|end|>"]
    template = "{% for m in messages %}<|start|>{{m.role}}<|message|>{{m.content}}<|end|>{% endfor %}<|start|>assistant"
    tokenizer = words_tokenizer([*said, "user", "final"], HARMONY, template=template, eos="<|return|>")
    speaking(folder, tokenizer, said, "gpt_oss")
    found = choice(folder, ASK, max_tokens=5)
    return _parts(found, "", "ab") or same(found["finish_reason"], "length")


def _reasoning_goes_back_to_the_template(folder: Path) -> str:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>"
        "{% endfor %}<|im_start|>assistant\n"
    )
    _thinking(folder, ["assistant\n", "ok", "<|im_end|>"], template)
    asked = [*ASK, {"role": "assistant", "content": "a", "reasoning_content": "because"}, *ASK]
    with Engine.load(folder, state_folder="none", device="cpu") as engine:
        ids = engine.chat_prompt(asked)
        text = engine._texts.tokenizer.decode(ids)
    return holds(text, "<think>", "</think>")


def _ends_of_all_files_count(folder: Path) -> str:
    said = ["assistant\n", "ans", "<|end|>", "more"]
    template = CHATML.replace("<|im_end|>", "<|end|>")
    tokenizer = words_tokenizer([*said, "user"], ["<|im_start|>", "<|end|>", "<eos>"], template=template, eos="<eos>")
    speaking(folder, tokenizer, said)
    eos = tokenizer.get_vocab()["<eos>"]
    edit(folder / "config.json", eos_token_id=[eos, tokenizer.get_vocab()["<|end|>"]])
    edit(folder / "generation_config.json", eos_token_id=eos)
    found = choice(folder, ASK)
    return _parts(found, "ans", None) or same(found["finish_reason"], "stop")


def _end_in_the_generation_config_alone(folder: Path) -> str:
    said = ["assistant\n", "ans", "<|eot_id|>", "more"]
    template = CHATML.replace("<|im_end|>", "")
    tokenizer = words_tokenizer(
        [*said, "user"], ["<|im_start|>", "<|eot_id|>", "<eos>"], template=template, eos="<eos>"
    )
    speaking(folder, tokenizer, said)
    ids = tokenizer.get_vocab()
    edit(folder / "generation_config.json", eos_token_id=[ids["<eos>"], ids["<|eot_id|>"]])
    return _parts(choice(folder, ASK), "ans", None)


def _effort_reaches_the_template(folder: Path) -> str:
    _thinking(folder, ["assistant\n", "ok", "<|im_end|>", "low", "high"], "{{ reasoning_effort }}" + CHATML)
    with Engine.load(folder, state_folder="none", device="cpu") as engine:
        ids = [engine.chat_prompt(list(ASK), {"reasoning_effort": effort})[0] for effort in ("low", "high")]
        return same([engine._texts.tokenizer.decode([each]) for each in ids], ["low", "high"])


CASES = [
    Case("llamafarm/llamafarm#753", "harmony: the analysis is not the answer", _harmony),
    Case("jundot/omlx#83, ggml-org/llama.cpp#13160, InternLM/lmdeploy#3511", "thinking off", _thinking_switched_off),
    Case("sgl-project/sglang#26873", "the template opens the reasoning", _template_opens_the_reasoning),
    Case("InternLM/lmdeploy#4754", "a closing mark in two tokens", _closing_mark_in_pieces),
    Case("raullenchai/Rapid-MLX#794", "harmony cut short in the analysis", _harmony_cut_short),
    Case("ollama/ollama#18281", "earlier reasoning goes back to the template", _reasoning_goes_back_to_the_template),
    Case("Blaizzy/mlx-vlm#1501", "the ends of config.json and generation_config.json", _ends_of_all_files_count),
    Case("vllm-project/vllm#4180", "an end in generation_config.json alone", _end_in_the_generation_config_alone),
    Case("ggml-org/llama.cpp#15130", "the effort reaches the template", _effort_reaches_the_template),
]
