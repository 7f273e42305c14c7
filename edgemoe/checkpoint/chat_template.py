"""A checkpoint's chat template: the prompt of a conversation, and what begins and ends the assistant's turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgemoe.checkpoint.foreign.template_budget import TemplateLimit
from edgemoe.checkpoint.foreign.template_limits import LimitedTemplates
from edgemoe.checkpoint.foreign.text_length import check_text_length
from edgemoe.checkpoint.prompts.conversation import check_messages, check_variables
from edgemoe.errors import CheckpointError, RequestError, is_device_or_memory_error, told_as
from edgemoe.quiet import quiet_transformers
from edgemoe.values import shown

Messages = Sequence[Mapping[str, str]]
"""A conversation: each message has a role and a content, an assistant's may have a reasoning_content."""
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


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation to reply to, with variables of the checkpoint's chat template, such as `enable_thinking`."""

    messages: Messages
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


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

    def render(self, chat: ChatPrompt) -> list[int]:
        """The token ids of the prompt, up to the reply.

        Raises RequestError without a template, and for what is malformed or refused by the template.
        """
        self._check(chat)
        refused = f"the chat template of {self._name} refuses this conversation"
        with quiet_transformers(), told_as(lambda why: RequestError(f"{refused}: {why}")):
            text = self._apply(chat, tokenize=False)
            check_text_length(text, self._context, self._tokenizer)
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
        messages = [self._as_wanted(message) for message in chat.messages]
        how = {"add_generation_prompt": True, **how, **chat.template_kwargs}
        assert self._templates is not None
        return self._templates(messages, **how)

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)] if text else []

    def _as_wanted(self, message: Mapping[str, str]) -> dict[str, str]:
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
        for message in chat.messages:
            parts = [message.get("role"), message.get("content"), message.get("reasoning_content", "")]
            if not all(isinstance(part, str) for part in parts):
                raise RequestError(f"a message must have a text role and a text content, not {shown(dict(message))}")
        reserved = sorted(RESERVED & set(chat.template_kwargs))
        if reserved:
            raise RequestError(f"{reserved[0]} is no variable of a chat template: leave it out of template_kwargs")
