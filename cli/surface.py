"""The part of the library which the terminal uses, as protocols: `edgemoe.Engine` is one, a test's fake another."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from edgemoe import Chunk, Sampling


class LoadProgress(Protocol):
    """How far loading is: `done` of `total` bytes of a stage."""

    @property
    def stage(self) -> str:
        """What is being loaded."""

    @property
    def done(self) -> int:
        """Bytes of the stage that are done."""

    @property
    def total(self) -> int:
        """Bytes of the stage."""


class PlanView(Protocol):
    """A plan, as shown to people and as JSON."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def device(self) -> str:
        """Where it computes."""

    @property
    def dtype(self) -> str:
        """What numbers it computes in."""

    @property
    def context(self) -> int:
        """Tokens it has room for."""

    @property
    def simulation(self) -> str | None:
        """What is simulated, when something is."""

    def lines(self) -> list[tuple[str, str, str]]:
        """Rows of what, how much, and where or why."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""


class StatsView(Protocol):
    """The engine's counters."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""


class EngineView(Protocol):
    """A loaded model."""

    @property
    def plan(self) -> PlanView:
        """Where everything went."""

    @property
    def stats(self) -> StatsView:
        """What was counted."""

    @property
    def has_chat_template(self) -> bool:
        """Whether it can hold a conversation."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether it can read and write text."""

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for a reply. Raises RequestError."""

    def stream(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Generator[Chunk, None, None]:
        """Generate, a chunk at a time. Raises RequestError."""

    def cancel(self) -> None:
        """End the generation in flight; may be called from any thread."""

    def close(self) -> None:
        """Give the memory back."""


class EngineFactory(Protocol):
    """Where engines come from: the class `edgemoe.Engine` itself."""

    def load(
        self,
        model: str | Path | None = None,
        *,
        device: str = ...,
        dtype: str = ...,
        expert_cache: str | int = ...,
        context: int | None = ...,
        threads: int | None = ...,
        offline: bool = ...,
        link_gbps: float | None = ...,
        on_progress: Callable[[LoadProgress], None] | None = ...,
    ) -> EngineView:
        """Load a model. Raises CheckpointError and PlanError."""

    def plan_for(
        self,
        model: str | Path | None = None,
        *,
        device: str = ...,
        dtype: str = ...,
        expert_cache: str | int = ...,
        context: int | None = ...,
        threads: int | None = ...,
        offline: bool = ...,
        link_gbps: float | None = ...,
    ) -> PlanView:
        """Plan without loading. Raises CheckpointError and PlanError."""
