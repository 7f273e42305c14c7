"""`/v1/responses`: OpenAI's Responses. Nothing is stored: a conversation goes on with its items."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from edgemoe.results import Chunk, Completion, TokenLogprob, chat_logprobs
from edgemoe.sampling import Sampling
from edgemoe.server.protocols import fields
from edgemoe.server.protocols.chat_prompt import chat_prompt
from edgemoe.server.protocols.errors import ApiError
from edgemoe.server.protocols.openai_chat import streaming
from edgemoe.server.protocols.reply import Reply, ServedModel, Usage
from edgemoe.server.protocols.responses_input import chat_body
from edgemoe.server.protocols.sse import event

ECHOED = ("instructions", "metadata", "temperature", "top_p", "max_output_tokens", "tools", "tool_choice", "reasoning",
          "text", "parallel_tool_calls", "top_logprobs", "user")  # fmt: skip
"""Fields of the request that the response has too."""
_DEFAULTS = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "metadata": {}}


class ResponseReply(Reply):
    """A request for a response: items of reasoning, a message, and calls of tools."""

    def __init__(self, body: Mapping[str, Any], served: ServedModel) -> None:
        served = served.asked(body.get("model"))
        self.stream, _ = streaming(body)
        chat = chat_body(body)
        sampling = Sampling(**fields.sampling_changes(chat, chat=True))
        self.asked = [(chat_prompt(chat), sampling)]
        self.one_call = fields.has_one_call(chat)
        self.id = f"resp_{uuid.uuid4().hex}"
        self._served = served
        self._created = int(time.time())
        self._echoed = {name: _DEFAULTS.get(name) if body.get(name) is None else body[name] for name in ECHOED}
        self._usage = Usage()
        self._items: list[dict[str, Any]] = []
        self._number = 0
        """Of the next event."""
        self._reason: str | None = None
        self._early: tuple[TokenLogprob, ...] = ()
        """Log-probabilities that came before the message they are told with."""

    def opening(self) -> list[bytes]:
        """See the base class."""
        return [self._event(f"response.{name}", response=self._response("in_progress")) for name in _BEGIN]

    def chunk(self, index: int, chunk: Chunk) -> list[bytes]:
        """See the base class."""
        self._usage.add(chunk)
        self._reason = chunk.finish_reason
        events = self._add("reasoning", chunk.reasoning, None) if chunk.reasoning else []
        logprobs, self._early = (*self._early, *(chunk.logprobs or ())), ()
        if chunk.text or (logprobs and (self._is_open("message") or chunk.finish_reason is not None)):
            events += self._add("message", chunk.text, logprobs)
        else:
            # A message of its own for each token would cut the reasoning in pieces.
            self._early = logprobs
        for call in chunk.tool_calls:
            events += self._end_item() + self._call(call)
        return events

    def closing(self) -> list[bytes]:
        """See the base class."""
        events = self._end_item()
        status = "incomplete" if self._reason == "length" else "completed"
        return [*events, self._event(f"response.{status}", response=self._response(status))]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """See the base class."""
        (completion,) = completions
        self._usage = Usage.of(completion)
        if completion.reasoning:
            self._add("reasoning", completion.reasoning, None)
        if completion.text or completion.logprobs:
            self._add("message", completion.text, completion.logprobs)
        for call in completion.tool_calls:
            self._end_item()
            self._call(call)
        self._reason = completion.finish_reason
        self._end_item()
        return self._response("incomplete" if self._reason == "length" else "completed")

    def failure(self, error: ApiError) -> list[bytes]:
        """See the base class."""
        # The protocol has its own few words for the code, and this is the one of a server's errors.
        told = {"code": "server_error", "message": str(error)}
        return [self._event("response.failed", response=self._response("failed", **told))]

    def error(self, error: ApiError) -> dict[str, Any]:
        """See the base class."""
        return error.openai()

    def _add(self, kind: str, text: str, logprobs: tuple[TokenLogprob, ...] | None) -> list[bytes]:
        """Text of an item of `kind`, which begins with it where the current item is another."""
        events = []
        if not self._is_open(kind):
            events = self._end_item() + self._begin_item(kind)
        part = self._items[-1]["content"][0]
        part["text"] += text
        entries = _logprobs(logprobs)
        more: dict[str, Any] = {}
        if kind == "message":
            part["logprobs"] += entries
            more = {"logprobs": entries}
        return [*events, self._of_part(f"response.{part['type']}.delta", delta=text, **more)]

    def _is_open(self, kind: str) -> bool:
        """Whether the current item is of `kind`, and not ended."""
        return bool(self._items) and self._items[-1]["type"] == kind and self._items[-1]["status"] == "in_progress"

    def _begin_item(self, kind: str) -> list[bytes]:
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        item: dict[str, Any] = {"id": f"{_PREFIXES[kind]}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
        item |= more
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._items.append(item | {"content": []})
        events = [self._of_item("response.output_item.added")]
        self._items[-1]["content"].append(part)
        return [*events, self._of_part("response.content_part.added", part=part)]

    def _end_item(self) -> list[bytes]:
        """The end of the current item, where one is open."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return []
        item = self._items[-1]
        part = item["content"][0]
        item["status"] = "incomplete" if self._reason == "length" else "completed"
        more: dict[str, Any] = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
        return [
            self._of_part(f"response.{part['type']}.done", text=part["text"], **more),
            self._of_part("response.content_part.done", part=part),
            self._of_item("response.output_item.done"),
        ]

    def _call(self, call: Any) -> list[bytes]:
        """The item of a call of a tool, whose arguments come at once."""
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"}
        self._items.append(item | {"call_id": call.id, "name": call.name, "arguments": ""})
        added = self._of_item("response.output_item.added")
        self._items[-1] |= {"status": "completed", "arguments": call.arguments}
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        arguments = "response.function_call_arguments"
        return [
            added,
            self._event(f"{arguments}.delta", **place, delta=call.arguments),
            self._event(f"{arguments}.done", **place, name=call.name, arguments=call.arguments),
            self._of_item("response.output_item.done"),
        ]

    def _of_item(self, kind: str) -> bytes:
        return self._event(kind, output_index=len(self._items) - 1, item=self._items[-1])

    def _of_part(self, kind: str, **more: Any) -> bytes:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}
        return self._event(kind, **place, **more)

    def _event(self, kind: str, **more: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **more}, kind)

    def _response(self, status: str, **error: str) -> dict[str, Any]:
        usage = self._usage
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "model": self._served.name,
            "status": status,
            "error": error or None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items,
            "usage": None if status == "in_progress" else _usage_object(usage),
            "store": False,
            "background": False,
            "previous_response_id": None,
            "truncation": "disabled",
            **self._echoed,
        }


_BEGIN = ("created", "in_progress")
_PREFIXES = {"message": "msg", "reasoning": "rs"}


def _logprobs(logprobs: tuple[TokenLogprob, ...] | None) -> list[dict[str, Any]]:
    """Log-probabilities of an output text: those of a chat, all with bytes."""
    made = (chat_logprobs(logprobs) or {"content": []})["content"]
    for entry in (each for item in made for each in (item, *item["top_logprobs"])):
        if entry["bytes"] is None:
            entry["bytes"] = []
    return list(made)


def _usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.shared, "cache_write_tokens": 0},
        "output_tokens": usage.generated,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.generated,
    }
