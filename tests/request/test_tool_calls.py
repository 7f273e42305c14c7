"""Calls of tools in the formats of many families: read whole or in pieces, and never lost where they are malformed."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerFast

from bench.support.byte_tokenizer import byte_tokenizer
from edgemoe.checkpoint.chat_template import ChatPrompt, ChatTemplate
from edgemoe.request.call_formats import FORMATS, CallFormat, call_format
from edgemoe.request.reply_parts import HARMONY
from edgemoe.request.reply_text import ReplyTexts
from edgemoe.request.request import Request
from edgemoe.request.token_texts import TokenTexts
from edgemoe.results import Chunk, Completion, ToolCall, chat_completion
from edgemoe.sampling import Sampling, resolve
from tests.support.logits import one_hot

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
ASKED = {"city": 'Köln "</tool_call>" 12', "days": 3}
J = json.dumps(ASKED, ensure_ascii=False)
PLAIN = {"city": "Rome", "days": 3}
MADE = {
    "hermes": (
        ["<tool_call>"],
        f'<tool_call>\n{{"name": "get_weather", "arguments": {J}}}\n</tool_call>',
        ASKED,
    ),
    "function tags": (
        ["<tool_call>", "<function="],
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        PLAIN,
    ),
    "argument keys": (
        ["<tool_call>", "<arg_key>"],
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>",
        PLAIN,
    ),
    "mistral": (
        ["[TOOL_CALLS]"],
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {J}, "id": "abcdefghi"}}]',
        ASKED,
    ),
    "mistral with names": (["[TOOL_CALLS]", "[ARGS]"], f"[TOOL_CALLS]get_weather[ARGS]{J}", ASKED),
    "mistral with ids": (
        ["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"],
        f"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{J}",
        ASKED,
    ),
    "json": (['{"name": function name, "parameters":'], f'{{"name": "get_weather", "parameters": {J}}}', ASKED),
    "python tag": (
        ["<|python_tag|>"],
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {J}}}',
        ASKED,
    ),
    "deepseek": (
        [
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "function<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ],
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{J}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        ASKED,
    ),
    "deepseek without fences": (
        ["<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"],
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{J}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ASKED,
    ),
    "dsml": (
        ["<｜DSML｜function_calls>"],
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">'
        'Rome</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        "</｜DSML｜function_calls>",
        PLAIN,
    ),
    "kimi": (
        ["<|tool_calls_section_begin|>"],
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{J}<|tool_call_end|><|tool_calls_section_end|>",
        ASKED,
    ),
    "minimax": (
        ["<minimax:tool_call>"],
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Rome</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>',
        PLAIN,
    ),
    "seed": (
        ["<seed:tool_call>"],
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Rome</parameter>\n<parameter=days>3</parameter>\n"
        "</function>\n</seed:tool_call>",
        PLAIN,
    ),
    "action": (
        ["<|START_ACTION|>"],
        f'<|START_ACTION|>[\n{{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {J}}}\n]<|END_ACTION|>',
        ASKED,
    ),
    "python": (
        ["<|tool_call_start|>"],
        '<|tool_call_start|>[get_weather(city="Rome", days=3)]<|tool_call_end|>',
        PLAIN,
    ),
    "python without marks": (["<|python_start|>"], '[get_weather(city="Rome", days=3)]', PLAIN),
    "fenced": (
        ["<tool_calls>", "<tool_call>"],
        f"<tool_calls>\n<tool_call>get_weather\n```json\n{J}\n```\n</tool_call>\n</tool_calls>",
        ASKED,
    ),
    "list": (["<tool_calls>"], f'<tool_calls>[{{"name": "get_weather", "arguments": {J}}}]</tool_calls>', ASKED),
    "bar": (["<|tool_call|>"], f'<|tool_call|>[{{"name": "get_weather", "arguments": {J}}}]', ASKED),
}
"""Marks that a template has, a reply with one call, and its arguments."""
CHAT = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GPT = (
    "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|start|>{{m.role}}<|message|>{{m.content}}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def tokenizer(marks: list[str], template: str = CHAT, *, as_tokens: bool = False) -> Any:
    made = byte_tokenizer()
    if as_tokens:
        made.add_special_tokens([mark for mark in marks if mark[-1] in "]>"])
    template += "{# " + " ".join(marks) + " #}"
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, pad_token="<pad>", eos_token="<eos>")


class Model:
    """Says what it is told to."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, "made")
        self._texts = ReplyTexts(tokenizer, self._template)

    def begin(self, tools: Any = TOOLS, choice: Any = "auto", **settings: Any) -> Request:
        chat = ChatPrompt([{"role": "user", "content": "Hi"}], tools=tools, tool_choice=choice)
        prompt = self._template.render(chat)
        resolved = resolve(
            Sampling(max_tokens=2000, **settings), GenerationConfig(eos_token_id=2), 9, 4000, len(prompt)
        )
        text = self._texts.new(prompt, resolved, chat)
        return Request(0, prompt, resolved, text, len(self.tokenizer))

    def chunks(self, said: str, tools: Any = TOOLS, *, ends: bool = True, **settings: Any) -> list[Chunk]:
        request = self.begin(tools, **settings)
        for token in [*self.tokenizer.encode(said), *([2] if ends else [])]:
            if request.finished:
                break
            request.advance(one_hot(token, len(self.tokenizer)))
        if not request.finished:
            request.cancel()
        assert request.error is None
        return list(request.chunks)

    def __call__(self, said: str, tools: Any = TOOLS, **how: Any) -> Completion:
        return Completion.from_chunks(self.chunks(said, tools, **how), [])


@pytest.mark.parametrize("as_tokens", [False, True], ids=["texts", "tokens"])
@pytest.mark.parametrize("made", MADE)
def test_a_call_is_read(made: str, as_tokens: bool) -> None:
    marks, said, arguments = MADE[made]
    model = Model(tokenizer(marks, as_tokens=as_tokens))
    before = "" if made in ("json", "python without marks") else "I look.\n\n"
    chunks = model.chunks(before + said)
    reply = Completion.from_chunks(chunks, [])
    assert [(call.name, json.loads(call.arguments)) for call in reply.tool_calls] == [("get_weather", arguments)]
    assert (reply.text, reply.finish_reason) == (before.strip(), "stop")
    assert chunks[-1].tool_calls == reply.tool_calls
    assert not any(chunk.tool_calls for chunk in chunks[:-1])
    choice = chat_completion(reply, "made")["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], json.loads(call["function"]["arguments"])) == ("function", arguments)
    assert choice["message"]["content"] == (before.strip() or None)


@pytest.mark.parametrize("made", MADE)
def test_without_the_tool_a_call_is_text(made: str) -> None:
    marks, said, _ = MADE[made]
    model = Model(tokenizer(marks))
    for tools in ([], [CLOCK]):
        reply = model("I look.\n" + said, tools)
        assert reply.tool_calls == ()
        assert reply.text == "I look.\n" + said


@pytest.mark.parametrize("made", MADE)
def test_what_is_malformed_stays_text(made: str) -> None:
    """Whatever is cut out of a call: what is no call is text, and nothing is lost or told twice."""
    marks, said, _ = MADE[made]
    model, draw = Model(tokenizer(marks)), random.Random(3)
    for _ in range(40):
        start = draw.randrange(len(said))
        spoiled = said[:start] + said[start + draw.randrange(1, 12) :]
        reply = model(spoiled)
        if not reply.tool_calls:
            assert reply.text == spoiled
    for cut in range(len(said)):
        reply = model(said[:cut], ends=False)
        assert reply.finish_reason == "cancelled"
        assert reply.tool_calls or reply.text == said[:cut]


def test_several_calls_and_text_between() -> None:
    said = MADE["hermes"][1]
    clock = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    model = Model(tokenizer(["<tool_call>"]))
    reply = model(f"First.\n{said}\n{clock}")
    assert [call.name for call in reply.tool_calls] == ["get_weather", "clock"]
    assert reply.text == "First."
    assert len({call.id for call in reply.tool_calls}) == 2
    reply = model(f"{said}\nThen <tool_call>nothing</tool_call>.{clock}")
    assert [call.name for call in reply.tool_calls] == ["get_weather", "clock"]
    assert reply.text == "\nThen <tool_call>nothing</tool_call>."
    lists = f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {J}}}, {{"name": "clock", "arguments": {{}}}}]'
    reply = Model(tokenizer(["[TOOL_CALLS]"], as_tokens=True))(lists)
    assert [call.name for call in reply.tool_calls] == ["get_weather", "clock"]
    assert all(len(call.id) == 9 and call.id.isalnum() for call in reply.tool_calls), "as its template wants them"


def test_the_text_before_a_call_is_streamed() -> None:
    chunks = Model(tokenizer(["<tool_call>"])).chunks("I < look. " + MADE["hermes"][1])
    assert "".join(chunk.text for chunk in chunks[:11]) == "I < look."
    assert not any(chunk.text for chunk in chunks[11:])


def test_the_models_own_ids_are_kept() -> None:
    for made, own in (("mistral", "abcdefghi"), ("mistral with ids", "abcdefghi"), ("kimi", "functions.get_weather:0")):
        marks, said, _ = MADE[made]
        assert Model(tokenizer(marks))(said).tool_calls[0].id == own


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (r'"\ud83d\ude00"', "\N{GRINNING FACE}"),
        (r'"\ud83d!"', "\N{REPLACEMENT CHARACTER}!"),
        ("1e308", 1e308),
        ("1e309", None),
    ],
)
def test_arguments_are_what_json_and_utf_8_can_hold(value: str, read: Any) -> None:
    said = f'<tool_call>{{"id": "\\ud83d", "name": "clock", "arguments": {{"at": {value}}}}}</tool_call>'
    reply = Model(tokenizer(["<tool_call>"]))(said)
    assert [json.loads(call.arguments) for call in reply.tool_calls] == ([] if read is None else [{"at": read}])
    assert json.dumps(chat_completion(reply, "m"), ensure_ascii=False, allow_nan=False).encode()
    assert reply.tool_calls or reply.text == said


def test_values_between_tags_have_the_types_of_their_schema() -> None:
    schema = {
        "properties": {name: {"type": kind} for name, kind in [("s", "string"), ("n", "number"), ("b", "boolean")]}
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in
                   [("s", "12"), ("n", "1.5"), ("b", "True"), ("o", '{"a": [1]}'), ("t", "two\nlines")])  # fmt: skip
    said = f"<tool_call>\n<function=f>\n{tags}</function>\n</tool_call>"
    (call,) = Model(tokenizer(["<tool_call>", "<function="]))(said, [tool]).tool_calls
    assert json.loads(call.arguments) == {"s": "12", "n": 1.5, "b": True, "o": {"a": [1]}, "t": "two\nlines"}


@pytest.mark.parametrize("where", ["role", "channel"])
def test_a_call_in_harmony(where: str) -> None:
    model = Model(tokenizer([*HARMONY, "<|constrain|>", "<|call|>"], GPT, as_tokens=True))
    to = " to=functions.get_weather"
    header = f"{to}<|channel|>commentary" if where == "role" else f"<|channel|>commentary{to}"
    thought = "<|channel|>analysis<|message|>hmm<|end|><|start|>assistant"
    reply = model(f"{thought}{header} <|constrain|>json<|message|>{J}<|call|>", ends=False)
    assert [(call.name, json.loads(call.arguments)) for call in reply.tool_calls] == [("get_weather", ASKED)]
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("", "hmm", "stop")
    reply = model(f"{thought}{header}<|message|>{J[:-3]}<|call|>", ends=False)
    assert (reply.tool_calls, reply.text) == ((), J[:-3])


def test_a_reply_without_calls_is_as_without_tools() -> None:
    for marks, _, _ in MADE.values():
        for said in ("Hello, [you] <there>.\n", "  {}", "<tool", '{"a": 1}', "[1, 2]"):
            reply = Model(tokenizer(marks))(said)
            assert (reply.text, reply.tool_calls) == (said, ())


def test_the_first_row_that_fits_is_the_format() -> None:
    texts = TokenTexts(tokenizer([]))
    for marks, _, _ in MADE.values():
        found = call_format(texts, " ".join(marks))
        assert found is not None
        assert set(found.marks) <= set(marks)
    assert call_format(texts, "none") is None


# --- calls that are asked for ------------------------------------------------------------------------


def written(form: CallFormat) -> list[str]:
    return [mark for mark in {*form.marks, form.begin, form.end} if mark]


@pytest.mark.parametrize("as_tokens", [False, True], ids=["texts", "tokens"])
@pytest.mark.parametrize("form", [each for each in FORMATS if each.written], ids=lambda form: form.marks[-1])
def test_a_call_that_is_asked_for_is_made(form: CallFormat, as_tokens: bool) -> None:
    """Also by a model that says nothing of use."""
    model = Model(tokenizer(list(form.marks), as_tokens=as_tokens))
    assert call_format(TokenTexts(model.tokenizer), str(model.tokenizer.chat_template)) == form
    check_forced(model)


def test_a_call_that_is_asked_for_is_made_in_harmony() -> None:
    check_forced(Model(tokenizer([*HARMONY, "<|constrain|>", "<|call|>"], GPT, as_tokens=True)))


def check_forced(model: Model) -> None:
    choices: list[tuple[Any, set[str]]] = [("required", {"get_weather", "clock"})]
    choices.append(({"type": "function", "function": {"name": "get_weather"}}, {"get_weather"}))
    for choice, names in choices:
        for seed in range(3):
            request = model.begin(choice=choice, seed=seed, temperature=1.0)
            draw = random.Random(seed)
            while not request.finished:
                likely = [3 + byte for byte in b'"}],x']
                request.advance(one_hot(draw.choice(likely), len(model.tokenizer), 4.0))
            assert request.error is None
            reply = Completion.from_chunks(list(request.chunks), [])
            if reply.finish_reason == "length":
                continue
            (call,) = reply.tool_calls
            assert (reply.text, call.name in names) == ("", True)
            arguments = json.loads(call.arguments)
            assert isinstance(arguments, dict)
            if call.name == "get_weather":
                assert isinstance(arguments["city"], str)
                assert set(arguments) <= {"city", "days"}


def test_results_have_no_calls_by_default() -> None:
    reply = Model(tokenizer(["<tool_call>"]))("Hi")
    assert reply.tool_calls == ()
    choice = chat_completion(reply, "made")["choices"][0]
    assert (choice["finish_reason"], choice["message"]) == ("stop", {"role": "assistant", "content": "Hi"})
    assert ToolCall("a", "b", "{}") == ToolCall(id="a", name="b", arguments="{}")
