"""A checkpoint's chat template: the prompt of a conversation, and what begins and ends the assistant's turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from edgemoe.checkpoint.foreign.template_budget import TemplateLimit
from edgemoe.checkpoint.foreign.template_limits import LimitedTemplates
from edgemoe.checkpoint.foreign.text_length import check_text_length
from edgemoe.checkpoint.prompts.chat_messages import (
    CALL_FORMS,
    CallForm,
    checked_messages,
    chosen_tools,
    with_call_form,
)
from edgemoe.checkpoint.prompts.conversation import check_messages, check_variables
from edgemoe.errors import CheckpointError, RequestError, is_device_or_memory_error, told_as
from edgemoe.quiet import quiet_transformers

Messages = Sequence[Mapping[str, Any]]
"""A conversation in OpenAI's shape: each message has a role and a content, an assistant's may have a reasoning_content
and tool_calls, and one of the role "tool" answers a call."""
RESERVED = frozenset(
    (
        "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs",
    )
)  # fmt: skip
"""Arguments of transformers that are no variables of a template."""
PROBE = "zqxj"
"""A reply of which the end can be found in a rendered conversation."""
PROBE_CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "zqxj00001", "type": "function", "function": {"name": PROBE, "arguments": {"qzkw": "vzkq"}}}
        ],
    },
    {"role": "tool", "name": PROBE, "tool_call_id": "zqxj00001", "content": "b"},
]
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}},
    },
}


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation to reply to, with variables of the checkpoint's chat template, such as `enable_thinking`."""

    messages: Messages
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    """What the model may call, in OpenAI's shape: `{"type": "function", "function": {"name": ..., ...}}`."""
    tool_choice: str | Mapping[str, Any] = "auto"
    """OpenAI's: "none" offers no tools, "auto" leaves it to the model, "required" or a function has one called."""

    @classmethod
    def of(cls, messages: Messages | ChatPrompt, template_kwargs: Mapping[str, Any] | None = None) -> ChatPrompt:
        """`messages` with the variables `template_kwargs`, or the prompt that it is already."""
        return messages if isinstance(messages, ChatPrompt) else cls(messages, template_kwargs or {})


class ChatTemplate:
    """The template of one tokenizer."""

    def __init__(self, tokenizer: Any, name: str, context: int | None = None) -> None:
        """`tokenizer` is transformers', or None; `name` is the checkpoint's, for messages.

        With `context`, in tokens, a conversation that is far longer is refused before it is tokenized. Raises
        CheckpointError where the template takes more than it may for the shortest conversation.
        """
        self._tokenizer = tokenizer
        self._name = name
        self._context = context
        self._templates = LimitedTemplates(tokenizer) if self.source else None
        self._try()

    @property
    def source(self) -> str:
        """The template itself, or all of several; empty without one."""
        template = getattr(self._tokenizer, "chat_template", None) or ""
        return "\n".join(template.values()) if isinstance(template, dict) else str(template)

    def render(self, chat: ChatPrompt, most: int | None = None) -> list[int]:
        """The token ids of the prompt, up to the reply. `most` tokens, if more than the context, are not too long.

        Raises RequestError without a template, for what is malformed or refused by the template, and for tools where
        the template does not read them.
        """
        self._check(chat)
        offered, _ = chosen_tools(chat.tools, chat.tool_choice)
        refused = f"the chat template of {self._name} refuses this conversation"
        with quiet_transformers(), told_as(lambda why: RequestError(f"{refused}: {why}")):
            text = self._apply(chat, tokenize=False)
            if offered and text == self._apply(replace(chat, tools=(), tool_choice="auto"), tokenize=False):
                raise RequestError(f"the chat template of {self._name} does not read tools: leave them out")
            check_text_length(text, most or self._context, self._tokenizer)
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [int(token) for token in tokens]

    def opening(self, chat: ChatPrompt) -> list[int]:
        """The token ids that the template begins a reply with, at the end of the prompt of a conversation."""
        try:
            with quiet_transformers():
                text = self._apply(chat, tokenize=False)
                before = self._apply(chat, tokenize=False, add_generation_prompt=False)
        except Exception as error:
            if is_device_or_memory_error(error):
                raise
            return []
        return self._encode(text[len(before) :]) if text.startswith(before) else []

    def turn_end(self) -> int | None:
        """The first token that the template puts after a reply; None where there is none."""
        if not self.source:
            return None
        probe = ChatPrompt([{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}])
        try:
            with quiet_transformers():
                text = self._apply(probe, tokenize=False, add_generation_prompt=False)
        except Exception as error:
            if is_device_or_memory_error(error):
                raise
            # A template that wants other messages; the checkpoint's own end tokens are known anyway.
            return None
        after = self._encode(text.rpartition(PROBE)[2].lstrip())
        return after[0] if after else None

    def _try(self) -> None:
        """Renders the shortest conversation, since a template may take all time and memory for any."""
        if not self.source:
            return
        try:
            with quiet_transformers():
                self._apply(ChatPrompt([{"role": "user", "content": "a"}]), tokenize=False)
        except TemplateLimit as error:
            raise CheckpointError(
                f"the chat template of {self._name} cannot be used, since {error}: give another tokenizer"
            ) from error
        except Exception as error:
            # A template that wants other messages.
            if is_device_or_memory_error(error):
                raise

    def _apply(self, chat: ChatPrompt, **how: Any) -> Any:
        messages = checked_messages(chat.messages)
        if any("tool_calls" in message for message in messages):
            form = self._call_form
            if form is None:
                raise RequestError(f"the chat template of {self._name} does not show calls of tools: leave them out")
            messages = [with_call_form(message, form) for message in messages]
        return self._rendered(messages, chosen_tools(chat.tools, chat.tool_choice)[0], {**how, **chat.template_kwargs})

    def _rendered(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any], how: Mapping[str, Any]) -> Any:
        wanted = [self._as_wanted(message) for message in messages]
        how = {"add_generation_prompt": True, **({"tools": list(tools)} if tools else {}), **how}
        assert self._templates is not None
        return self._templates(wanted, **how)

    @cached_property
    def _call_form(self) -> CallForm | None:
        """The first form in which the template shows a call, and its arguments as they are; None where there is none.

        The arguments are shown as JSON, or one by one.
        """
        for form in CALL_FORMS:
            messages = [with_call_form(message, form) for message in PROBE_CALL]
            try:
                with quiet_transformers():
                    text = self._rendered(messages, [PROBE_TOOL], {"tokenize": False})
            except Exception as error:
                if is_device_or_memory_error(error):
                    raise
                continue
            marred = ("{'qzkw'", json.dumps('"qzkw"')[1:-1], ">None", "\nNone")
            if PROBE in text and "qzkw" in text and not any(mark in text for mark in marred):
                return form
        return None

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)] if text else []

    def _as_wanted(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its reasoning under the name that the template reads."""
        wanted = dict(message)
        if "reasoning_content" in wanted and ".thinking" in self.source:
            wanted["thinking"] = wanted["reasoning_content"]
        return wanted

    def _check(self, chat: ChatPrompt) -> None:
        if not self.source:
            raise RequestError(f"{self._name} has no chat template: give plain prompts, as with edgemoe run")
        check_messages(chat.messages)
        check_variables(chat.template_kwargs)
        checked_messages(chat.messages)
        reserved = sorted(RESERVED & set(chat.template_kwargs))
        if reserved:
            raise RequestError(f"{reserved[0]} is no variable of a chat template: leave it out of template_kwargs")
