"""From a line of a request file to a request, or to the reason why it is none. Knows nothing of models and files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

from edgemoe.checkpoint.chat_template import ChatPrompt
from edgemoe.checkpoint.prompts.chat_messages import check_chat
from edgemoe.cli.run.source import Line
from edgemoe.errors import RequestError
from edgemoe.sampling import Sampling
from edgemoe.server.protocols import fields
from edgemoe.server.protocols.fields import FieldError
from edgemoe.values import shown

if TYPE_CHECKING:
    from edgemoe.checkpoint.tokenizer import Prompt

CHAT_URL = "/v1/chat/completions"
COMPLETION_URL = "/v1/completions"
_ENVELOPE = ("custom_id", "method", "url", "body")

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RequestLine:
    """What to generate: a text or token ids to go on from, or messages to reply to, and how many times."""

    custom_id: str
    prompt: str | tuple[int, ...] | tuple[Message, ...]
    is_chat: bool = False
    sampling: Sampling
    choices: int = 1
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template."""
    tools: Mapping[str, Any] = field(default_factory=dict)
    """The fields `tools` and `tool_choice` of `ChatPrompt`, as far as the line has them."""
    one_call: bool = False
    """Whether a reply may call one tool at most; the first is kept."""

    @property
    def asked(self) -> Prompt:
        """What the engine is asked."""
        if not self.is_chat:
            return cast("Prompt", self.prompt)
        return ChatPrompt(cast("tuple[Message, ...]", self.prompt), self.template_kwargs, **self.tools)

    def samplings(self) -> list[Sampling]:
        """The sampling of each choice. Where a seed is given, each has one of its own, counted up from it."""
        return fields.samplings(self.sampling, self.choices)


@dataclass(frozen=True)
class BadLine:
    """A line that is no request. `code` is for programs, `message` one sentence for people."""

    custom_id: str
    code: str
    message: str


class Entry(NamedTuple):
    """A line, whether it was taken as JSON, and what came of it."""

    line: Line
    is_json: bool
    request: RequestLine | BadLine


@dataclass(frozen=True)
class RequestReader:
    """Reads requests. `defaults` hold where a line says nothing; `chat_lines` makes plain text a user's message."""

    defaults: Sampling
    system: str | None = None
    chat_lines: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def read(self, lines: Iterable[Line], *, jsonl: bool) -> Iterator[Entry]:
        """An entry for each line, in order. Without `jsonl`, the first line decides by its `{`."""
        for index, line in enumerate(lines):
            if index == 0:
                jsonl = jsonl or line.text.lstrip().startswith("{")
            yield Entry(line, jsonl, self._request(line, jsonl=jsonl))

    def _request(self, line: Line, *, jsonl: bool) -> RequestLine | BadLine:
        if line.trouble:
            return BadLine(default_id(line), "invalid_line", f"line {line.number} cannot be read: {line.trouble}")
        try:
            return self._from_json(line) if jsonl else self._from_text(line)
        except RecursionError:
            what = f"line {line.number} has too many brackets inside of one another"
            return BadLine(default_id(line), "invalid_json", what)

    def _from_text(self, line: Line) -> RequestLine:
        custom_id = default_id(line)
        if not self.chat_lines:
            return RequestLine(custom_id=custom_id, prompt=line.text, sampling=self.defaults)
        messages = self._with_system(({"role": "user", "content": line.text},))
        return RequestLine(
            custom_id=custom_id,
            prompt=messages,
            is_chat=True,
            sampling=self.defaults,
            template_kwargs=self.template_kwargs,
        )

    def _from_json(self, line: Line) -> RequestLine | BadLine:
        custom_id = default_id(line)
        try:
            entry = json.loads(line.text, parse_constant=_refuse_constant, object_pairs_hook=_object)
        except ValueError as error:
            why = "a number has too many digits" if "int_max_str_digits" in str(error) else error
            return BadLine(custom_id, "invalid_json", f"line {line.number} is not JSON: {why}")
        if not isinstance(entry, dict):
            return BadLine(custom_id, "invalid_json", f"line {line.number} is JSON but no object; begin it with {{")
        try:
            custom_id = _custom_id(entry) or custom_id
            return self._from_object(custom_id, entry)
        except (FieldError, RequestError) as error:
            return BadLine(custom_id, "invalid_request", f"line {line.number}: {error}")

    def _from_object(self, custom_id: str, entry: dict[str, Any]) -> RequestLine:
        if "body" in entry or "url" in entry:
            body, chat = _open_envelope(entry)
        else:
            body = {name: value for name, value in entry.items() if name not in ("custom_id", "id")}
            if ("prompt" in body) == ("messages" in body):
                raise FieldError("give either prompt or messages")
            chat = "messages" in body
        source = "messages" if chat else "prompt"
        if source not in body:
            raise FieldError(f"{source} is missing")
        fields.check(body, chat=chat)
        sampling = replace(self.defaults, **fields.sampling_changes(body, chat=chat))
        made = self._with_system(fields.messages(body[source])) if chat else fields.prompt(body[source])
        tools = fields.tools(body) if chat else {}
        if chat:
            check_chat(cast("tuple[Message, ...]", made), **tools)
        return RequestLine(
            custom_id=custom_id,
            prompt=made,
            is_chat=chat,
            sampling=sampling,
            choices=fields.choices(body),
            template_kwargs={**self.template_kwargs, **fields.template_kwargs(body)} if chat else {},
            tools=tools,
            one_call=chat and fields.has_one_call(body),
        )

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self.system is None or any(message["role"] == "system" for message in messages):
            return messages
        return ({"role": "system", "content": self.system}, *messages)


def default_id(line: Line) -> str:
    """The id of a line that gives none."""
    return f"line-{line.number}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose names must be different: of two values nobody knows which one is meant."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"the name {shown(name)} is there twice in an object")
        made[name] = value
    return made


def _custom_id(entry: dict[str, Any]) -> str | None:
    given = [name for name in ("custom_id", "id") if entry.get(name) is not None]
    if len(given) > 1:
        raise FieldError("custom_id and id are the same thing; give one")
    if not given:
        return None
    value = entry[given[0]]
    if type(value) is int:
        # OpenAI has texts; numbers are what people count lines with.
        return str(value)
    if not isinstance(value, str):
        raise FieldError(f"{given[0]} must be a text or a whole number")
    return fields.words(given[0], value)


def _open_envelope(entry: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The body of an OpenAI batch line, and whether it is a chat."""
    fields.refuse_unknown(entry, _ENVELOPE)
    method, url, body = entry.get("method", "POST"), entry.get("url"), entry.get("body")
    if method != "POST":
        raise FieldError(f"method {method!r} is not served; give POST")
    if url not in (CHAT_URL, COMPLETION_URL):
        raise FieldError(f"url {url!r} is not served; give {CHAT_URL} or {COMPLETION_URL}")
    if not isinstance(body, dict):
        raise FieldError("body must be an object")
    return body, url == CHAT_URL
