"""A request for replies, and how its protocol tells them: what every protocol has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgemoe.results import Chunk, Completion
from edgemoe.sampling import Sampling
from edgemoe.server.protocols import fields
from edgemoe.server.protocols.errors import ApiError
from edgemoe.server.protocols.sse import COMMENT

if TYPE_CHECKING:
    from edgemoe.checkpoint.tokenizer import Prompt


@dataclass(frozen=True)
class ServedModel:
    """The model that a server has, as it tells of it."""

    name: str
    """Its id."""
    created: int
    """Seconds since 1970 at which the server began to serve it."""
    aliases: frozenset[str] = field(default_factory=frozenset)
    """Other names that requests may give; "*" is any."""

    @property
    def names(self) -> list[str]:
        """The names that clients may choose from, its id first."""
        return [self.name, *sorted(self.aliases - {"*", self.name})]

    def asked(self, asked: object) -> ServedModel:
        """The model by the name that a request gives it; none is its id. Raises ApiError, 404, for another's."""
        if asked is None:
            return self
        if not isinstance(asked, str):
            raise ApiError(400, str(fields.mistyped("model", "a text", asked)), param="model")
        if asked in ("", self.name):
            return self
        if "*" in self.aliases or asked in self.aliases:
            return replace(self, name=fields.words("model", asked))
        names = " or ".join(sorted({self.name, *self.aliases}))
        raise ApiError(404, f"the model {asked[:100]!r} is not served: ask for {names}", param="model")


@dataclass
class Usage:
    """The tokens of a reply, or of several."""

    prompt: int = 0
    shared: int = 0
    """Prompt tokens that another request's KV cache had."""
    generated: int = 0
    reasoning: int = 0
    """Those of `generated` that came while the model reasoned."""

    @classmethod
    def of(cls, completion: Completion) -> Usage:
        """The tokens of a finished reply."""
        timings = completion.timings
        return cls(timings.prompt_tokens, timings.shared_tokens, timings.generated_tokens, completion.reasoning_tokens)

    def add(self, chunk: Chunk) -> None:
        """Counts the next chunk of one reply."""
        self.prompt, self.shared = chunk.timings.prompt_tokens, chunk.timings.shared_tokens
        self.generated = chunk.timings.generated_tokens
        self.reasoning += chunk.reasons * len(chunk.token_ids)


class Reply(ABC):
    """A request for one reply or several, each from a prompt and a sampling, and the events or the object to answer.

    `chunk` and `closing` are called where `stream` is true, `whole` otherwise; `failure` in both cases.
    """

    stream: bool
    asked: Sequence[tuple[Prompt, Sampling]]
    """What the engine is asked, a pair for each reply."""
    one_call: bool = False
    """Whether a reply may call one tool at most; the first is kept."""
    has_tokenizer: bool = True
    """Whether replies have text. Set, as `lossy` is, before the first chunk."""
    lossy: str = ""
    """The settings that make replies differ from the model's own; empty for none."""

    def limited(self, chunk: Chunk) -> Chunk:
        """What is told of `chunk`: of several calls of tools one, where it is to be one."""
        return replace(chunk, tool_calls=chunk.tool_calls[:1]) if self.one_call and chunk.tool_calls else chunk

    def opening(self) -> list[bytes]:
        """The events before the first chunk."""
        return []

    @abstractmethod
    def chunk(self, index: int, chunk: Chunk) -> list[bytes]:
        """The events of the next chunk of the reply number `index`."""

    @abstractmethod
    def closing(self) -> list[bytes]:
        """The events after the last chunk of all replies."""

    @abstractmethod
    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The JSON object of all finished replies."""

    @abstractmethod
    def failure(self, error: ApiError) -> list[bytes]:
        """The events of an error after the stream has begun; they end it."""

    @abstractmethod
    def error(self, error: ApiError) -> dict[str, Any]:
        """The JSON object of an error instead of a stream or a reply."""

    def heartbeat(self) -> bytes:
        """An event that says only that the server is at work."""
        return COMMENT
