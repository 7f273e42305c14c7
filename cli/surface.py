"""The part of the library which the terminal uses, as protocols: `edgemoe.Engine` is one, a test's fake another."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from edgemoe import Chunk, Completion, RequestError, Sampling
    from edgemoe.checkpoint.tokenizer import Prompt


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

    @property
    def lossy(self) -> str:
        """What makes replies differ from the model's own; empty where nothing does."""

    def lines(self) -> list[tuple[str, str, str]]:
        """Rows of what, how much, and where or why."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""


class StatsView(Protocol):
    """The engine's counters: totals since it was loaded, what is in flight included."""

    @property
    def slots(self) -> int:
        """Experts that the cache has room for."""

    @property
    def experts(self) -> int:
        """Experts of the model."""

    @property
    def hits(self) -> int:
        """Experts asked for that were resident."""

    @property
    def misses(self) -> int:
        """Experts asked for that were not."""

    @property
    def bytes_loaded(self) -> int:
        """Expert bytes that crossed the link."""

    @property
    def bytes_demanded(self) -> int:
        """Those of them that were brought because they were asked for."""

    @property
    def bytes_prefetched_used(self) -> int:
        """Those that were there before they were asked for."""

    @property
    def bytes_prefetched_late(self) -> int:
        """Those that were asked for while on their way."""

    @property
    def bytes_prefetched_wasted(self) -> int:
        """Those that went again before they were asked for."""

    @property
    def bytes_filled(self) -> int:
        """Those that filled the cache at the start, once asked for or evicted."""

    @property
    def link_wait_seconds(self) -> float:
        """Time in which computing stood still for the link."""

    @property
    def requests(self) -> int:
        """Requests so far."""

    @property
    def tokens_prompt(self) -> int:
        """Tokens of prompts."""

    @property
    def tokens_generated(self) -> int:
        """Tokens of replies."""

    @property
    def prefix_tokens(self) -> int:
        """Tokens of prompts that need not be computed, since another request begins alike."""

    @property
    def steps(self) -> int:
        """Passes over the model."""

    @property
    def seconds(self) -> float:
        """Time in them."""

    @property
    def batch(self) -> int:
        """How many sequences are decoded together."""

    @property
    def batch_reason(self) -> str:
        """Why that many."""

    @property
    def preemptions(self) -> int:
        """Requests that had to be computed again for lack of room."""

    @property
    def speculation(self) -> str:
        """What drafts, or why nothing does."""

    @property
    def speculation_setting(self) -> str:
        """How far it drafts now."""

    @property
    def speculation_changes(self) -> int:
        """How often that has changed."""

    @property
    def utility(self) -> float:
        """What cycles give over what they cost, against plain steps."""

    @property
    def budget_choices(self) -> int:
        """Experts chosen in verifications under a budget."""

    @property
    def budget_dropped(self) -> int:
        """Those of them that the budget left out."""

    @property
    def cycles(self) -> int:
        """Verifications of a draft, each of one sequence."""

    @property
    def drafted(self) -> int:
        """Tokens that were drafted for them."""

    @property
    def accepted(self) -> int:
        """Drafted tokens that are in a reply."""

    @property
    def draft_seconds(self) -> float:
        """Time in drafting."""

    @property
    def verify_seconds(self) -> float:
        """Time in passes that verified a draft."""

    @property
    def forecast_recall(self) -> float:
        """Share of the missing experts that drafts foretold."""

    @property
    def forecast_precision(self) -> float:
        """Share of what they foretold that was asked for."""

    @property
    def forecast_bytes_useful(self) -> int:
        """Bytes brought for it in time."""

    @property
    def forecast_bytes_late(self) -> int:
        """Those that were still on their way when they were asked for."""

    @property
    def forecast_bytes_wasted(self) -> int:
        """Those that were not asked for."""

    @property
    def lookahead_recall(self) -> float:
        """Share of the missing experts that the layer before foretold."""

    @property
    def lookahead_precision(self) -> float:
        """Share of what it foretold that was asked for."""

    @property
    def lookahead_bytes_useful(self) -> int:
        """Bytes brought for it in time."""

    @property
    def lookahead_bytes_late(self) -> int:
        """Those that were still on their way when they were asked for."""

    @property
    def lookahead_bytes_wasted(self) -> int:
        """Those that were not asked for."""


class BatchEngineView(Protocol):
    """A loaded model that replies to many requests: one engine, or several that act as one."""

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

    def generate_batch(
        self, requests: Iterable[tuple[Prompt, Sampling]]
    ) -> Generator[tuple[int, Completion | RequestError], None, None]:
        """Reply to many requests at once: each request's index and its reply, or why there is none, as they finish.

        `requests` is read by the thread that takes the replies, and only a little ahead of what runs. What it raises
        passes through. Closing the generator ends what is in flight.
        """

    def cancel(self, *, running: bool = True) -> None:
        """End the generations in flight, or only those that have not begun; may be called from any thread."""

    def close(self) -> None:
        """Give the memory back."""


class EngineView(BatchEngineView, Protocol):
    """A loaded model that can also hold a conversation."""

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk, None, None]:
        """Generate, a chunk at a time. Raises RequestError."""


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
        batch: str | int = ...,
        state_folder: str | os.PathLike[str] | None = ...,
        speculate: str = ...,
        draft_model: str | os.PathLike[str] | None = ...,
        draft_nodes: int = ...,
        draft_depth: int = ...,
        draft_shape: str = ...,
        draft_rule: str = ...,
        prefetch: str = ...,
        budget: str | int = ...,
        budget_rule: str = ...,
        budget_dropped: str = ...,
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
        batch: str | int = ...,
        state_folder: str | os.PathLike[str] | None = ...,
        speculate: str = ...,
        draft_model: str | os.PathLike[str] | None = ...,
        draft_nodes: int = ...,
        draft_depth: int = ...,
        draft_shape: str = ...,
        draft_rule: str = ...,
        prefetch: str = ...,
        budget: str | int = ...,
        budget_rule: str = ...,
        budget_dropped: str = ...,
    ) -> PlanView:
        """Plan without loading. Raises CheckpointError and PlanError."""
