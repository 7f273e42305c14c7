"""Conversations in OpenAI's shapes, and how templates of many families read calls of tools."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from bench.support.byte_tokenizer import byte_tokenizer
from edgemoe.checkpoint.chat_template import ChatPrompt, ChatTemplate
from edgemoe.checkpoint.prompts.chat_messages import checked_messages
from edgemoe.errors import RequestError

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c00000001", "type": "function", "function": {"name": "add", "arguments": '{"a": "ü", "b": [1]}'}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": "them."}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c00000001", "content": "3"},
]
TOOLS = "{% if tools %}[{{ tools | tojson }}]{% endif %}"
END = "{% if add_generation_prompt %}<assistant>{% endif %}"
AS_OBJECT = (
    TOOLS + "{% for m in messages %}<{{ m.role }}>{{ '' + m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{% endfor %}" + END
)
AS_TEXT = (
    TOOLS
    + "{% for m in messages %}{% if m.role == 'assistant' and m.content is not defined %}{% for c in m.tool_calls %}"
    "<call>{{ c['function']['name'] + ' ' + c['function']['arguments'] }}{% endfor %}{% else %}"
    "<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}" + END
)
NO_NONE = (
    TOOLS + "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>"
    "{{ c.function.name }} {% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}"
    "{% endfor %}" + END
)
EITHER = (
    TOOLS + "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>"
    "{{ c.function.name }} {% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
    "{{ c.function.arguments | tojson }}{% endif %}{% endfor %}{% endfor %}" + END
)
SAID = 'add {"a": "ü", "b": [1]}'


def template(source: str) -> ChatTemplate:
    return ChatTemplate(PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), chat_template=source), "made")


def text(source: str, chat: ChatPrompt) -> str:
    return bytes(token - 3 for token in template(source).render(chat)).decode()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (AS_OBJECT, f"<user>Add them.<assistant><call>{SAID}<tool>3<assistant>"),
        (AS_TEXT, f"<user>Add them.<call>{SAID}<tool>3<assistant>"),
        (NO_NONE, "<user>\nAdd them.<assistant>\n<call>add a=ü;b=[1];<tool>\n3<assistant>"),
        (EITHER, f"<user>Add them.<assistant><call>{SAID}<tool>3<assistant>"),
    ],
    ids=["objects", "texts", "no none", "either"],
)
def test_a_template_gets_calls_in_the_form_that_it_reads(source: str, said: str) -> None:
    assert text(source, ChatPrompt(TALK)) == said
    offered = text(source, ChatPrompt(TALK, tools=[TOOL]))
    assert offered.endswith(said)
    assert json.loads(offered[1 : -len(said) - 1]) == [TOOL]
    assert text(source, ChatPrompt(TALK, tools=[TOOL], tool_choice="none")) == said


def test_arguments_may_be_objects_and_empty() -> None:
    for given, said in (('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), ("{}", {})):
        call = {"type": "function", "function": {"name": "add", "arguments": given}}
        (found,) = checked_messages([{"role": "assistant", "content": "x", "tool_calls": [call]}])
        assert found["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": said}}]
        assert found["content"] == "x"


def test_messages_are_not_changed() -> None:
    before = json.dumps(TALK)
    text(AS_TEXT, ChatPrompt(TALK, tools=[TOOL]))
    assert json.dumps(TALK) == before


def test_a_template_that_reads_no_tools_refuses_them() -> None:
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + END
    with pytest.raises(RequestError, match="the chat template of made does not read tools"):
        template(plain).render(ChatPrompt([{"role": "user", "content": "Hi"}], tools=[TOOL]))
    chat = ChatPrompt([{"role": "user", "content": "Hi"}], tools=[TOOL], tool_choice="none")
    assert text(plain, chat) == "<user>Hi<assistant>"


@pytest.mark.parametrize("shows", ["", "{{ '' ~ m.tool_calls[0].function.arguments }}"])
def test_a_template_that_shows_no_calls_refuses_them(shows: str) -> None:
    """Python's text of an object is no JSON."""
    source = "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}" + shows + "{% endif %}{% endfor %}" + END
    with pytest.raises(RequestError, match="made does not show calls of tools"):
        template(source).render(ChatPrompt(TALK))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Hi", "must be a mapping with a role"),
        ({"role": "user"}, "text role and a text content"),
        ({"role": "user", "content": None}, "text role and a text content"),
        ({"role": 3, "content": "x"}, "text role and a text content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "'image_url' is not served"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "'input_audio' is not served"),
        ({"role": "user", "content": ["x"]}, "'x' is not served"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "must be a text, not 3"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "only an assistant's message"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "must be functions with a name"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "must be functions with a name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "are not JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "must be an object"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 10**5}}]}, "are not JSON"),
        ({"role": "assistant", "tool_calls": [{**CALL, "id": 3}]}, "must be a text, not 3"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "tool_call_id of a message must be a text"),
        ({"role": "tool", "content": "x", "name": 3}, "name of a message must be a text"),
    ],
)
def test_what_is_no_message_is_refused(message: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        template(EITHER).render(ChatPrompt([message]))
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "choice", "said"),
    [
        ("add", "auto", "tools must be a list"),
        ([3], "auto", 'a tool must have the type "function"'),
        ([{"type": "web_search"}], "auto", "not 'web_search'"),
        ([{"type": "function", "function": {}}], "auto", "the name of a tool"),
        ([{"type": "function", "function": {"name": "a b"}}], "auto", "not 'a b'"),
        ([{"type": "function", "function": {"name": "f", "args": {}}}], "auto", "unknown field 'args'"),
        ([{"type": "function", "function": {"name": "f", "parameters": "x"}}], "auto", "parameters of the tool f"),
        ([{"type": "function", "function": {"name": "f", "description": {1, 2}}}], "auto", "tools is not JSON"),
        ([TOOL, TOOL], "auto", "two functions of the name add"),
        ([], "required", "tool_choice needs tools"),
        ([TOOL], "add", "not 'add'"),
        ([TOOL], {"type": "function", "function": {"name": "sub"}}, "not 'sub'"),
    ],
)
def test_what_is_no_tool_is_refused(tools: Any, choice: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        template(EITHER).render(ChatPrompt([{"role": "user", "content": "x"}], tools=tools, tool_choice=choice))
