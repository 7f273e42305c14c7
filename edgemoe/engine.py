"""The library's face: load a model, generate, stream, chat, close."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from edgemoe.checkpoint.blueprint import Blueprint, open_blueprint
from edgemoe.checkpoint.tokenizer import Prompt, load_generation_config, load_tokenizer, prompt_tokens, render_chat
from edgemoe.config import EngineConfig
from edgemoe.draft.draft_model import DraftModel
from edgemoe.draft.expert_budget import expert_budget_for
from edgemoe.draft.settings import draft_settings
from edgemoe.drafters import speculation_for
from edgemoe.errors import CheckpointError, EdgeMoEError, RequestError
from edgemoe.experts.budget_routing import BudgetTotals
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.sequential_runner import SequentialRunner
from edgemoe.plan.plan import Plan
from edgemoe.planner import make_plan
from edgemoe.request.request import Cancels, Request
from edgemoe.results import Chunk, Completion, Progress, Stats, chat_completion
from edgemoe.runtime import Runtime
from edgemoe.sampling import ResolvedSampling, Sampling, resolve
from edgemoe.scheduler.batch_size import BatchSize
from edgemoe.scheduler.scheduler import Scheduler

DEFAULTS = EngineConfig()
READ_AHEAD_BATCHES = 16
"""Batches of requests that are in flight at most, so that those that begin alike can be found ..."""
MAX_READ_AHEAD = 1024
"""... and requests, where that is less; two batches are always."""


class Engine:
    """One loaded model. Streams of any number of threads, and of one, run together and share its experts.

    Whoever waits for a token computes the next step, for all: there is no thread of the engine's own for it.
    Use it as a context manager, or call `close`. `cancel` may be called from any thread.
    """

    def __init__(self, blueprint: Blueprint, config: EngineConfig, on_progress: Callable[[Progress], None]) -> None:
        draft_model = _draft_model(blueprint, config)
        self.plan: Plan = make_plan(blueprint, config, draft_model)
        self._config = config
        self._checkpoint = blueprint.checkpoint
        self._tokenizer = load_tokenizer(blueprint.checkpoint)
        self._defaults = load_generation_config(blueprint)
        self._vocabulary = blueprint.config.get_text_config().vocab_size
        self._runtime: Runtime | None = Runtime(blueprint, self.plan, config, on_progress)
        try:
            self._scheduler = self._new_scheduler(self._runtime, draft_model)
        except BaseException:
            self._runtime.close()
            raise
        self._device = threading.Lock()
        self._cancels = Cancels()
        self._requests = 0

    def _new_scheduler(self, runtime: Runtime, draft_model: DraftModel | None) -> Scheduler:
        plan = self.plan
        runner = SequentialRunner(
            runtime.model,
            runtime.layers,
            torch.device(plan.device),
            plan.prefill_chunk,
            plan.threads,
            plan.nbytes_per_token,
            plan.layers * plan.top_k / plan.experts,
        )
        size = BatchSize(plan.batch, automatic=str(self._config.batch).strip().lower() == "auto")
        joint = ModelRunner(runner)
        speculation = speculation_for(draft_settings(self._config), joint, runtime, plan, draft_model)
        budget = expert_budget_for(self._config, runtime.layers, runtime.cache)
        rows, patience = joint.rows_within(plan.workspace_nbytes), self._config.patience
        return Scheduler(
            joint, speculation, plan.kv, plan.kv_nbytes, plan.prefill_chunk, size, patience, budget, max_drafted=rows
        )

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = DEFAULTS.device,
        dtype: str = DEFAULTS.dtype,
        expert_cache: str | int = DEFAULTS.expert_cache,
        context: int | None = DEFAULTS.context,
        threads: int | None = DEFAULTS.threads,
        offline: bool = DEFAULTS.offline,
        link_gbps: float | None = DEFAULTS.link_gbps,
        batch: str | int = DEFAULTS.batch,
        state_folder: str | os.PathLike[str] | None = DEFAULTS.state_folder,
        speculate: str = DEFAULTS.speculate,
        draft_model: str | os.PathLike[str] | None = DEFAULTS.draft_model,
        draft_nodes: int = DEFAULTS.draft_nodes,
        draft_depth: int = DEFAULTS.draft_depth,
        draft_shape: str = DEFAULTS.draft_shape,
        draft_rule: str = DEFAULTS.draft_rule,
        prefetch: str = DEFAULTS.prefetch,
        budget: str | int = DEFAULTS.budget,
        budget_rule: str = DEFAULTS.budget_rule,
        budget_dropped: str = DEFAULTS.budget_dropped,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Engine:
        """Loads `model`, a checkpoint's folder or Hugging Face id; None is the model that ships with edgemoe.

        `expert_cache` is "auto", bytes ("6GiB"), a share ("40%") or slots in all (an int). `batch` is how many
        sequences are decoded together at most, or "auto". `state_folder` is where small files about the checkpoint are
        kept: None is the user's cache folder, "none" keeps nothing. `on_progress` may be called from other threads.
        Raises CheckpointError or PlanError before any weight is read.
        """
        config = EngineConfig(
            device=device,
            dtype=dtype,
            expert_cache=expert_cache,
            context=context,
            threads=threads,
            offline=offline,
            link_gbps=link_gbps,
            batch=batch,
            state_folder=state_folder,
            speculate=speculate,
            draft_model=draft_model,
            draft_nodes=draft_nodes,
            draft_depth=draft_depth,
            draft_shape=draft_shape,
            draft_rule=draft_rule,
            prefetch=prefetch,
            budget=budget,
            budget_rule=budget_rule,
            budget_dropped=budget_dropped,
        )
        return cls(open_blueprint(model, dtype, offline=offline), config, on_progress or _ignore)

    @staticmethod
    def plan_for(
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = DEFAULTS.device,
        dtype: str = DEFAULTS.dtype,
        expert_cache: str | int = DEFAULTS.expert_cache,
        context: int | None = DEFAULTS.context,
        threads: int | None = DEFAULTS.threads,
        offline: bool = DEFAULTS.offline,
        link_gbps: float | None = DEFAULTS.link_gbps,
        batch: str | int = DEFAULTS.batch,
        state_folder: str | os.PathLike[str] | None = DEFAULTS.state_folder,
        speculate: str = DEFAULTS.speculate,
        draft_model: str | os.PathLike[str] | None = DEFAULTS.draft_model,
        draft_nodes: int = DEFAULTS.draft_nodes,
        draft_depth: int = DEFAULTS.draft_depth,
        draft_shape: str = DEFAULTS.draft_shape,
        draft_rule: str = DEFAULTS.draft_rule,
        prefetch: str = DEFAULTS.prefetch,
        budget: str | int = DEFAULTS.budget,
        budget_rule: str = DEFAULTS.budget_rule,
        budget_dropped: str = DEFAULTS.budget_dropped,
    ) -> Plan:
        """The plan that `load` would use now, without loading anything. Raises as `load` does."""
        config = EngineConfig(
            device=device,
            dtype=dtype,
            expert_cache=expert_cache,
            context=context,
            threads=threads,
            offline=offline,
            link_gbps=link_gbps,
            batch=batch,
            state_folder=state_folder,
            speculate=speculate,
            draft_model=draft_model,
            draft_nodes=draft_nodes,
            draft_depth=draft_depth,
            draft_shape=draft_shape,
            draft_rule=draft_rule,
            prefetch=prefetch,
            budget=budget,
            budget_rule=budget_rule,
            budget_dropped=budget_dropped,
        )
        blueprint = open_blueprint(model, dtype, offline=offline)
        return make_plan(blueprint, config, _draft_model(blueprint, config))

    @property
    def has_tokenizer(self) -> bool:
        """Whether prompts may be text; without a tokenizer they are token ids and replies have no text."""
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint says how a conversation is written."""
        return self._tokenizer is not None and bool(self._tokenizer.chat_template)

    @property
    def stats(self) -> Stats:
        """Totals since loading, requests in flight included; readable from any thread, and after `close` no more."""
        runtime, batch = self._loaded(), self._scheduler
        counters, totals, speculation = runtime.cache.counters, batch.totals, batch.speculation
        forecast, lookahead = runtime.predictor.forecast, runtime.predictor.ahead
        return Stats(
            slots=self.plan.slots,
            experts=self.plan.experts,
            **vars(counters),
            requests=self._requests,
            tokens_prompt=totals.tokens_prompt,
            tokens_generated=totals.tokens_generated,
            seconds=totals.seconds,
            steps=totals.steps,
            batch=batch.size.limit,
            batch_reason=batch.size.reason,
            preemptions=totals.preemptions,
            prefix_tokens=totals.tokens_shared,
            **speculation.telemetry(),
            **vars(batch.budget.totals if batch.budget else BudgetTotals()),
            **forecast.telemetry("forecast"),
            **lookahead.telemetry("lookahead"),
        )

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation, ready for the assistant's turn; RequestError without a chat template."""
        return render_chat(self._tokenizer, messages, self._checkpoint.name)

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk, None, None]:
        """The reply to `prompt` (text, token ids or a chat's messages) as it comes, a chunk a token.

        The last chunk has `finish_reason`. Closing the generator ends the request. Several streams may be open,
        in one thread or in many: each step serves all. Raises RequestError, at the first step, for a prompt
        that is empty, has unknown token ids or does not fit the context.
        """
        with self._device:
            generation = self._submit(prompt, sampling or Sampling())
        try:
            while True:
                for chunk in self._next_chunks(generation):
                    yield chunk
                    if chunk.finish_reason is not None:
                        return
        finally:
            self._abandon([generation])

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Completion:
        """The whole reply to `prompt`; see `stream`."""
        ids = self._tokens(prompt)
        return Completion.from_chunks(list(self.stream(ids, sampling)), ids)

    def generate_batch(
        self, requests: Iterable[tuple[Prompt, Sampling]]
    ) -> Generator[tuple[int, Completion | RequestError], None, None]:
        """The replies to many requests as they finish: each one's place in `requests`, and its reply or what is wrong.

        Several run at a time (`batch`), those that begin alike next to one another. `requests` is read as
        replies are taken, a few batches ahead. Closing the generator ends what is in flight.
        """
        numbered = enumerate(requests)
        flying: dict[Request, int] = {}
        more = True
        try:
            while more or flying:
                most = self._max_in_flight()
                while more and len(flying) < most:
                    number, request = next(numbered, (-1, None))
                    if request is None:
                        more = False
                        break
                    try:
                        with self._device:
                            flying[self._submit(*request)] = number
                    except RequestError as error:
                        yield number, error
                if not flying:
                    continue
                self._step(unless=lambda: any(generation.finished for generation in flying))
                for generation in [each for each in flying if each.finished]:
                    yield flying.pop(generation), self._completion(generation)
        finally:
            self._abandon(flying)

    def chat(self, messages: Sequence[Mapping[str, str]], sampling: Sampling | None = None) -> dict[str, Any]:
        """The assistant's next message, in the shape of OpenAI's chat.completion object."""
        return chat_completion(self.generate(self.chat_prompt(messages), sampling), self._checkpoint.name)

    def cancel(self, *, running: bool = True) -> None:
        """Ends all requests in flight after their current token, with `finish_reason` "cancelled". Thread-safe.

        With `running` False only those end that have not begun.
        """
        self._cancels.waiting += 1
        if running:
            self._cancels.all += 1

    def close(self) -> None:
        """Waits for the step in flight, ends the threads and gives the memory back. Idempotent.

        A stream that is still open ends with EdgeMoEError at its next step.
        """
        self.cancel()
        with self._device:
            runtime, self._runtime = self._runtime, None
            if runtime is not None:
                self._scheduler.close()
                runtime.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _loaded(self) -> Runtime:
        if self._runtime is None:
            raise EdgeMoEError("the engine is closed: load it again with Engine.load")
        return self._runtime

    def _submit(self, prompt: Prompt, sampling: Sampling) -> Request:
        """A new request in the line. The device is held."""
        self._loaded()
        tokens = self._tokens(prompt)
        settings = self._settings(sampling, len(tokens))
        generation = Request(self._requests, tokens, settings, self._tokenizer, self._cancels)
        self._requests += 1
        self._scheduler.add(generation)
        return generation

    def _max_in_flight(self) -> int:
        with self._device:
            self._loaded()
            limit = self._scheduler.size.limit
            return max(2 * limit, min(READ_AHEAD_BATCHES * limit, MAX_READ_AHEAD))

    def _step(self, unless: Callable[[], bool]) -> None:
        """Computes one step of the batch, but not when another thread's step has brought what was waited for."""
        with self._device:
            runtime = self._loaded()
            if unless():
                return
            try:
                self._scheduler.step(runtime.cache.counters)
            except OSError as error:
                raise self._failure(error) from error

    def _next_chunks(self, generation: Request) -> list[Chunk]:
        """The chunks that there are, after a step when there are none."""
        self._step(unless=lambda: bool(generation.chunks) or generation.finished)
        if generation.error is not None:
            raise self._failure(generation.error) from generation.error
        chunks = list(generation.chunks)
        generation.chunks.clear()
        return chunks

    def _failure(self, error: BaseException) -> EdgeMoEError:
        """What those are told whose step has failed, in whichever thread it ran."""
        if isinstance(error, OSError):
            return CheckpointError(f"{self._checkpoint.name} cannot be read any more ({error}): fetch it again")
        return EdgeMoEError(f"a step that this request was part of failed ({error!r}): ask again")

    def _abandon(self, generations: Iterable[Request]) -> None:
        """Ends requests that nobody waits for any more."""
        for generation in generations:
            generation.abandoned = True

    def _completion(self, generation: Request) -> Completion:
        if generation.error is not None:
            raise self._failure(generation.error) from generation.error
        return Completion.from_chunks(list(generation.chunks), generation.tokens[: generation.prompt_length])

    def _tokens(self, prompt: Prompt) -> list[int]:
        return prompt_tokens(self._tokenizer, prompt, self._vocabulary, self._checkpoint.name)

    def _settings(self, sampling: Sampling, length: int) -> ResolvedSampling:
        room = self.plan.context - length
        if room < 1:
            raise RequestError(
                f"the prompt has {length} tokens and the context {self.plan.context}, reply included: "
                f"shorten it, or raise the context with --ctx-size (context= in the library)"
            )
        return resolve(sampling, self._defaults, self._config.default_max_tokens, room)


def _draft_model(blueprint: Blueprint, config: EngineConfig) -> DraftModel | None:
    """The checkpoint that drafts for `blueprint`, where the settings want one."""
    if "model" not in draft_settings(config).drafters or config.draft_model is None:
        return None
    return DraftModel(config.draft_model, blueprint, offline=config.offline)


def _ignore(progress: Progress) -> None:
    """The progress callback of those who gave none."""
