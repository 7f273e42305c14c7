"""`/v1/messages`: Anthropic's Messages."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from edgemoe.results import Chunk, Completion
from edgemoe.sampling import Sampling
from edgemoe.server.protocols import fields
from edgemoe.server.protocols.anthropic_input import chat_body
from edgemoe.server.protocols.chat_prompt import chat_prompt
from edgemoe.server.protocols.errors import ApiError
from edgemoe.server.protocols.reply import Reply, ServedModel, Usage
from edgemoe.server.protocols.sse import event

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class MessageReply(Reply):
    """A request for the assistant's next message: blocks of thinking and text, and uses of tools."""

    def __init__(self, body: Mapping[str, Any], served: ServedModel) -> None:
        served = served.asked(body.get("model"))
        stream = body.get("stream")
        self.stream = stream is not None and fields.switch("stream", stream)
        chat = chat_body(body)
        sampling = Sampling(**fields.sampling_changes(chat, chat=True))
        self.asked = [(chat_prompt(chat), sampling)]
        self.one_call = fields.has_one_call(chat)
        self.id = f"msg_{uuid.uuid4().hex}"
        self._served = served
        self._stops = sampling.stop
        self._usage: Usage | None = None
        self._blocks = 0
        self._open: str | None = None
        """The kind of the block that is open."""
        self._last: Chunk | None = None

    def chunk(self, index: int, chunk: Chunk) -> list[bytes]:
        """See the base class. The message begins with the first chunk, which knows the tokens of the prompt."""
        events = []
        if self._usage is None:
            self._usage = Usage()
            self._usage.add(chunk)
            begun = _usage_object(self._usage) | {"output_tokens": 0}
            events.append(
                event({"type": "message_start", "message": self._message([], None, None, begun)}, "message_start")
            )
        else:
            self._usage.add(chunk)
        self._last = chunk
        if chunk.reasoning:
            events += self._add("thinking", "thinking_delta", chunk.reasoning)
        if chunk.text:
            events += self._add("text", "text_delta", chunk.text)
        for call in chunk.tool_calls:
            events += self._end_block()
            events += self._begin_block("tool_use", {"id": call.id, "name": call.name, "input": {}})
            events += self._add("tool_use", "input_json_delta", call.arguments)
        return events

    def closing(self) -> list[bytes]:
        """See the base class."""
        assert self._last is not None
        assert self._usage is not None
        reason, stop = self._stop_reason(self._last)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        end = {"type": "message_delta", "delta": delta, "usage": _usage_object(self._usage)}
        return [*self._end_block(), event(end, "message_delta"), event({"type": "message_stop"}, "message_stop")]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """See the base class."""
        (completion,) = completions
        content: list[dict[str, Any]] = []
        if completion.reasoning:
            content.append({"type": "thinking", "thinking": completion.reasoning, "signature": ""})
        if completion.text:
            content.append({"type": "text", "text": completion.text})
        for call in completion.tool_calls:
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)})
        return self._message(content, *self._stop_reason(completion), _usage_object(Usage.of(completion)))

    def failure(self, error: ApiError) -> list[bytes]:
        """See the base class."""
        return [event(error.anthropic(), "error")]

    def error(self, error: ApiError) -> dict[str, Any]:
        """See the base class."""
        return error.anthropic()

    def heartbeat(self) -> bytes:
        """See the base class."""
        return event({"type": "ping"}, "ping")

    def _stop_reason(self, end: Chunk | Completion) -> tuple[str, str | None]:
        """Why the message ended, and the stop sequence of the request that it ended before."""
        if end.tool_calls:
            return "tool_use", None
        if end.stop_text in self._stops:
            return "stop_sequence", end.stop_text
        return _STOP_REASONS.get(end.finish_reason or "", "end_turn"), None

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: dict[str, int]
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._served.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        }

    def _add(self, kind: str, delta: str, text: str) -> list[bytes]:
        """Text of a block of `kind`, which begins with it where another one is open."""
        events = []
        if self._open != kind:
            empty = {"thinking": "", "signature": ""} if kind == "thinking" else {"text": ""}
            events = self._end_block() + self._begin_block(kind, empty)
        return [*events, self._delta({"type": delta, _TEXT_OF[delta]: text})]

    def _begin_block(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        self._open = kind
        begun = {"type": "content_block_start", "index": self._blocks, "content_block": {"type": kind, **block}}
        return [event(begun, "content_block_start")]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return event({"type": "content_block_delta", "index": self._blocks, "delta": delta}, "content_block_delta")

    def _end_block(self) -> list[bytes]:
        if self._open is None:
            return []
        end = event({"type": "content_block_stop", "index": self._blocks}, "content_block_stop")
        # Clients keep the signature with the thinking; an empty one is none.
        signature = [self._delta({"type": "signature_delta", "signature": ""})] if self._open == "thinking" else []
        self._open = None
        self._blocks += 1
        return [*signature, end]


_TEXT_OF = {"thinking_delta": "thinking", "text_delta": "text", "input_json_delta": "partial_json"}


def _usage_object(usage: Usage) -> dict[str, int]:
    """Anthropic's usage, whose input tokens are those that no cache had."""
    return {
        "input_tokens": usage.prompt - usage.shared,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.shared,
        "output_tokens": usage.generated,
    }
