"""The part of the library that the terminal uses, as protocols: `edgemoe.Engine` is one, a test's fake another."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from edgemoe.checkpoint.chat_template import Messages
    from edgemoe.checkpoint.tokenizer import Prompt
    from edgemoe.errors import RequestError
    from edgemoe.plan.plan import Plan
    from edgemoe.results import Chunk, Completion, Progress, Stats
    from edgemoe.sampling import Sampling

CANCELLED = "cancelled"
"""The finish reason of a reply that was broken off on request."""


class ReplyStream(Protocol):
    """A reply as it is generated."""

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks; the last one has a finish reason."""

    def close(self) -> object:
        """End the reply, where it is not over."""


class BatchEngineView(Protocol):
    """A loaded model that replies to many requests: one engine, or several that act as one."""

    @property
    def plan(self) -> Plan:
        """Where everything went."""

    @property
    def stats(self) -> Stats:
        """The totals since loading, requests in flight included."""

    @property
    def has_chat_template(self) -> bool:
        """Whether it can hold a conversation."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether it can read and write text."""

    def generate_batch(
        self, requests: Iterable[tuple[Prompt, Sampling]]
    ) -> Generator[tuple[int, Completion | RequestError], None, None]:
        """Reply to many requests at once: each request's index and its reply, or its error, as they finish.

        `requests` is read by the thread that takes the replies, and only a little ahead of what runs. What it raises
        passes through. Closing the generator ends what is in flight.
        """

    def cancel(self, *, running: bool = True) -> None:
        """End the generations in flight, or only those that have not begun; may be called from any thread."""

    def close(self) -> None:
        """Give the memory back."""


class EngineView(BatchEngineView, Protocol):
    """A loaded model that can also hold a conversation."""

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> ReplyStream:
        """Generate, a chunk at a time. Raises RequestError."""

    def chat_prompt(self, messages: Messages, template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        """The tokens of a conversation up to the reply. Raises RequestError for one that the template refuses."""


class EngineFactory(Protocol):
    """Where engines come from: the class `edgemoe.Engine` itself."""

    def load(
        self,
        model: str | Path | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = ...,
        **settings: Any,
    ) -> EngineView:
        """Load a model under `settings`, fields of `EngineConfig`. Raises CheckpointError and PlanError."""

    def plan_for(self, model: str | Path | None = None, **settings: Any) -> Plan:
        """Plan without loading. Raises CheckpointError and PlanError."""
