"""`/v1/chat/completions`: OpenAI's chat."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgemoe.results import ChatChunks, Chunk, Completion, chat_completion
from edgemoe.sampling import Sampling
from edgemoe.server.protocols import fields
from edgemoe.server.protocols.chat_prompt import chat_prompt
from edgemoe.server.protocols.errors import ApiError
from edgemoe.server.protocols.reply import Reply, ServedModel, Usage
from edgemoe.server.protocols.sse import DONE, event

if TYPE_CHECKING:
    from edgemoe.checkpoint.tokenizer import Prompt


class OpenAIReply(Reply):
    """What chats and completions share."""

    def __init__(self, body: Mapping[str, Any], served: ServedModel, prefix: str) -> None:
        """`prefix` is that of ids. Raises FieldError and RequestError for the body's fields, ApiError for its model."""
        served = served.asked(body.get("model"))
        self.stream, self.include_usage = streaming(body)
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.served = served
        self.created = int(time.time())
        self.usages: dict[int, Usage] = {}
        self.asked: Sequence[tuple[Prompt, Sampling]] = ()
        self.choices = 1
        """Replies to each prompt, which are one after the other in `asked`."""

    def usage(self) -> dict[str, Any]:
        """The tokens of all replies; those to one prompt share it."""
        replies = [self.usages[index] for index in range(len(self.asked))]
        prompts = [replies[first : first + self.choices] for first in range(0, len(replies), self.choices)]
        # The others have the prompt from the one that computed it.
        return usage_object([min(each, key=lambda usage: usage.shared) for each in prompts], replies)

    def head(self, kind: str) -> dict[str, Any]:
        """What every event begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}

    def closing(self) -> list[bytes]:
        """See the base class."""
        if not self.include_usage:
            return [DONE]
        return [event(self.head(self.event_kind) | {"choices": [], "usage": self.usage()}), DONE]

    event_kind: str

    def failure(self, error: ApiError) -> list[bytes]:
        """See the base class."""
        return [event(error.openai()), DONE]

    def error(self, error: ApiError) -> dict[str, Any]:
        """See the base class."""
        return error.openai()

    def choice_event(self, choice: dict[str, Any]) -> bytes:
        """An event with one choice."""
        usage = {"usage": None} if self.include_usage else {}
        return event(self.head(self.event_kind) | {"choices": [choice]} | usage)


class ChatReply(OpenAIReply):
    """A request for the next messages of a conversation."""

    event_kind = "chat.completion.chunk"

    def __init__(self, body: Mapping[str, Any], served: ServedModel) -> None:
        super().__init__(body, served, "chatcmpl")
        body = without_stream(body)
        fields.check(body, chat=True)
        if "messages" not in body:
            raise fields.FieldError("messages is missing: give a list of messages")
        prompt = chat_prompt(body)
        self.one_call = fields.has_one_call(body)
        sampling = Sampling(**fields.sampling_changes(body, chat=True))
        self.choices = fields.choices(body)
        self.asked = [(prompt, each) for each in fields.samplings(sampling, self.choices)]
        self._made: dict[int, ChatChunks] = {}

    def chunk(self, index: int, chunk: Chunk) -> list[bytes]:
        """See the base class. The first event of a choice has the role."""
        self.usages.setdefault(index, Usage()).add(chunk)
        made = self._made.setdefault(index, ChatChunks(self.served.name))
        choice = made.of(chunk)["choices"][0] | {"index": index}
        return [self.choice_event(choice)] if choice["delta"] or _tells(choice) else []

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """See the base class."""
        bodies = [chat_completion(completion, self.served.name) for completion in completions]
        self.usages = {index: Usage.of(completion) for index, completion in enumerate(completions)}
        choices = [body["choices"][0] | {"index": index} for index, body in enumerate(bodies)]
        return bodies[0] | {"id": self.id, "choices": choices, "usage": self.usage()}


def _tells(choice: Mapping[str, Any]) -> bool:
    """Whether a choice without new text tells something all the same."""
    return choice["finish_reason"] is not None or choice["logprobs"] is not None


def streaming(body: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the reply is streamed, and whether the stream ends with the usage. Raises FieldError."""
    stream = body.get("stream")
    streams = stream is not None and fields.switch("stream", stream)
    options = body.get("stream_options")
    if options is None:
        return streams, False
    if not streams:
        raise fields.FieldError("stream_options needs stream to be true")
    if not isinstance(options, dict):
        raise fields.mistyped("stream_options", "an object", options)
    fields.refuse_unknown(options, ("include_usage", "include_obfuscation"))
    wanted = options.get("include_usage")
    return streams, wanted is not None and fields.switch("include_usage", wanted)


def without_stream(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `body` that bear on the reply itself."""
    return {name: value for name, value in body.items() if name not in ("stream", "stream_options")}


def usage_object(prompts: Sequence[Usage], replies: Sequence[Usage]) -> dict[str, Any]:
    """OpenAI's usage: the tokens of each of `prompts` once, and of all `replies`."""
    prompt, generated = sum(each.prompt for each in prompts), sum(each.generated for each in replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(each.shared for each in prompts)},
        "completion_tokens_details": {"reasoning_tokens": sum(each.reasoning for each in replies)},
    }
