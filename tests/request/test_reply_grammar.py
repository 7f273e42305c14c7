"""A form holds for what the user is told: the reasoning before it is free."""

from __future__ import annotations

import json
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import torch
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedTokenizerFast

from bench.support.byte_tokenizer import byte_tokenizer
from edgemoe.checkpoint.chat_template import ChatPrompt, ChatTemplate
from edgemoe.request.reply_parts import HARMONY
from edgemoe.request.reply_text import ReplyTexts
from edgemoe.request.request import Request
from edgemoe.results import Completion
from edgemoe.sampling import Sampling, resolve

CHAT = (
    "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENED = CHAT + "{% if add_generation_prompt %}<think>\n{% endif %}"
CLOSED = CHAT + "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
LEFT_OPEN = CHAT + "{# <think> and </think> are the model's #}"
GPT = (
    "{% for m in messages %}<|start|>{{m.role}}<|message|>{{m.content}}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"enum": ["<think>", "</think>", "plain"]},
        "n": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["a", "n"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
CHATTED = ChatPrompt([{"role": "user", "content": "Hi"}])


def tokenizer(template: str, marks: tuple[str, ...], special: bool) -> Any:
    made = byte_tokenizer()
    made.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, pad_token="<pad>", eos_token="<eos>")


class Model:
    """Random logits over bytes and marks, in which the marks come often."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts = ReplyTexts(tokenizer, ChatTemplate(tokenizer, "made"))
        self._template = ChatTemplate(tokenizer, "made")

    def reply(self, seed: int, prompt: ChatPrompt | str, **settings: Any) -> Completion:
        chat = prompt if isinstance(prompt, ChatPrompt) else None
        tokens = self._template.render(chat) if chat else self._tokenizer.encode(prompt)
        sampling = Sampling(response_format=FORM, seed=seed, max_tokens=400, **settings)
        resolved = resolve(sampling, GenerationConfig(eos_token_id=2), 100, 4000, len(tokens))
        text = self._texts.new(tokens, resolved, chat)
        request = Request(0, tokens, resolved, text, len(self._tokenizer))
        while not request.finished:
            draw = torch.Generator().manual_seed(seed + 1000 * request.tokens[-1] + request.generated)
            logits = 3 * torch.randn(len(self._tokenizer), generator=draw)
            logits[259:] += 5
            said = bytes(token - 3 for token in request.tokens[-8:] if 3 <= token < 259)
            spelt = next((count for count in range(7, 0, -1) if said.endswith(b"</think>"[:count])), 0)
            logits[3 + b"</think>"[spelt]] += 4 + 4 * (spelt > 0)
            request.advance(logits)
        assert request.error is None
        return Completion.from_chunks(list(request.chunks), tokens)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("marks", ["special", "added", "text"])
@pytest.mark.parametrize("template", [OPENED, CLOSED, LEFT_OPEN], ids=["opened", "closed", "left open"])
def test_the_form_begins_after_the_reasoning(template: str, marks: str, temperature: float) -> None:
    tokens = () if marks == "text" else ("<think>", "</think>")
    model, reasoned = Model(tokenizer(template, tokens, marks == "special")), 0
    for seed in range(5):
        reply = model.reply(seed, CHATTED, temperature=temperature)
        if reply.finish_reason == "length":
            # It has not stopped to reason.
            assert not reply.text
            continue
        jsonschema.validate(json.loads(reply.text), SCHEMA)
        reasoned += bool(reply.reasoning)
    assert bool(reasoned) == (template == OPENED or (template == LEFT_OPEN and bool(tokens)))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_harmony_has_the_form_in_its_final_message(temperature: float) -> None:
    model, reasoned = Model(tokenizer(GPT, (*HARMONY, "<|constrain|>", "<|return|>"), True)), 0
    for seed in range(5):
        reply = model.reply(seed, CHATTED, temperature=temperature)
        if reply.finish_reason == "stop":
            jsonschema.validate(json.loads(reply.text), SCHEMA)
            reasoned += bool(reply.reasoning)
        else:
            assert not reply.text
    assert reasoned


def test_a_plain_prompt_has_no_reasoning() -> None:
    for template in (OPENED, GPT):
        marks = HARMONY if template == GPT else ("<think>", "</think>")
        reply = Model(tokenizer(template, marks, True)).reply(1, "Hi <think>")
        jsonschema.validate(json.loads(reply.text), SCHEMA)
        assert not reply.reasoning


def test_the_marks_are_shown_where_special_tokens_are() -> None:
    model = Model(tokenizer(OPENED, ("<think>", "</think>"), True))
    replies = [model.reply(seed, CHATTED, skip_special_tokens=False) for seed in range(4)]
    for reply in replies:
        assert "</think>" in reply.text
        jsonschema.validate(json.loads(reply.text.partition("</think>")[2]), SCHEMA)
    assert any(not reply.text.startswith("</think>") for reply in replies)
