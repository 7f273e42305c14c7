"""The library's face: load a model, generate, stream, chat, close."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

from edgemoe.cache.accelerator import is_accelerator
from edgemoe.checkpoint.blueprint import Blueprint, blueprint_for
from edgemoe.checkpoint.chat_template import ChatPrompt, ChatTemplate, Messages
from edgemoe.checkpoint.generation_defaults import generation_source, load_generation_defaults
from edgemoe.checkpoint.tokenizer import Prompt, as_chat, check_prompt, check_token_ids, load_tokenizer, prompt_tokens
from edgemoe.config import EngineConfig
from edgemoe.draft.draft_model import DraftModel
from edgemoe.draft.expert_budget import expert_budget_for
from edgemoe.drafters import speculation_for
from edgemoe.errors import EdgeMoEError, RequestError, reading, unreadable
from edgemoe.experts.budget_routing import BudgetTotals
from edgemoe.model.model_runner import ModelRunner
from edgemoe.plan.plan import Plan
from edgemoe.planner import drafts_of, make_plan
from edgemoe.request.reply_text import ReplyTexts
from edgemoe.request.request import Cancels, Request
from edgemoe.request.sampler import check_defaults
from edgemoe.results import Chunk, Completion, Progress, Stats, chat_completion
from edgemoe.runtime import Runtime
from edgemoe.sampling import ResolvedSampling, Sampling, resolve
from edgemoe.scheduler.batch_size import BatchSize
from edgemoe.scheduler.kv_budget import KvBudget
from edgemoe.scheduler.scheduler import Scheduler
from edgemoe.scheduler.step_loop import StepLoop
from edgemoe.scheduler.step_runner import StepRunner

READ_AHEAD_BATCHES = 16
"""How many batches of requests to read ahead, so that requests with a common prefix can run together."""
MAX_READ_AHEAD = 1024
"""Most requests to read ahead; two batches are always read."""


class Engine:
    """One loaded model. All open streams, of one thread or of many, run as one batch and share its experts.

    A thread that waits for a token runs the next step for all requests; the engine has no thread of its own for it.
    Use it as a context manager, or call `close`. `cancel` may be called from any thread.
    """

    def __init__(self, blueprint: Blueprint, config: EngineConfig, on_progress: Callable[[Progress], None]) -> None:
        self._drafts = drafts_of(blueprint, config)
        draft_model = _draft_model(blueprint, config)
        self.plan: Plan = make_plan(blueprint, config, draft_model)
        self._config = config
        self._checkpoint = blueprint.checkpoint
        self._tokenizer = load_tokenizer(blueprint.checkpoint)
        self._template = ChatTemplate(self._tokenizer, blueprint.checkpoint.name)
        self._replies = ReplyTexts(self._tokenizer, self._template)
        self._defaults = load_generation_defaults(blueprint)
        self._vocabulary = blueprint.config.get_text_config().vocab_size
        check_defaults(self._defaults, generation_source(blueprint), self._vocabulary)
        self._runtime: Runtime | None = Runtime(blueprint, self.plan, config, on_progress)
        try:
            self._loop = self._new_loop(self._runtime, draft_model)
        except BaseException:
            self._runtime.close()
            raise
        self._device = threading.Lock()
        self._process = os.getpid()
        self._cancels = Cancels()
        self._requests = 0

    def _new_loop(self, runtime: Runtime, draft_model: DraftModel | None) -> StepLoop:
        """The scheduler, the drafter and the runner of this engine's steps."""
        plan, config = self.plan, self._config
        runner = ModelRunner(runtime.runner())
        speculation = speculation_for(self._drafts, runner, runtime, plan, draft_model)
        scheduler = Scheduler(
            runner,
            KvBudget(plan.kv, plan.kv_nbytes, at_once=is_accelerator(plan.device)),
            plan.prefill_chunk,
            BatchSize(plan.batch, automatic=str(config.batch).strip().lower() == "auto"),
            config.patience,
            max_draft_nodes=speculation.max_nodes if speculation.active else 0,
            max_drafted=runner.rows_within(plan.workspace_nbytes),
            max_states=plan.kept_states,
        )
        budget = expert_budget_for(config, runtime.layers, runtime.cache)
        return StepLoop(scheduler, speculation, StepRunner(runner, runtime.cache.counters, budget))

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        config: EngineConfig | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **settings: Any,
    ) -> Engine:
        """Loads `model`, a checkpoint's folder, GGUF file or Hugging Face id; None is the shipped model.

        `settings` are fields of `EngineConfig`, in place of those of `config`. `on_progress` may be called from other
        threads. Raises CheckpointError or PlanError before any weight is read, TypeError for an unknown setting.
        """
        chosen = (config or EngineConfig()).changed(**settings)
        blueprint = blueprint_for(model, chosen)
        return cls(blueprint, chosen, on_progress or _ignore)

    @staticmethod
    def plan_for(
        model: str | os.PathLike[str] | None = None, config: EngineConfig | None = None, **settings: Any
    ) -> Plan:
        """The plan that `load` would use now, without loading anything. Raises as `load` does."""
        chosen = (config or EngineConfig()).changed(**settings)
        blueprint = blueprint_for(model, chosen)
        return make_plan(blueprint, chosen, _draft_model(blueprint, chosen))

    @property
    def has_tokenizer(self) -> bool:
        """Whether prompts may be text; without a tokenizer they are token ids and replies have no text."""
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has a template for conversations."""
        return bool(self._template.source)

    @property
    def stats(self) -> Stats:
        """Totals since loading, requests in flight included. Readable from any thread, until `close`."""
        runtime, loop = self._loaded(), self._loop
        totals, size, budget = loop.scheduler.totals, loop.scheduler.size, loop.runner.budget
        return Stats(
            slots=self.plan.slots,
            experts=self.plan.experts,
            **vars(runtime.cache.counters),
            requests=self._requests,
            tokens_prompt=totals.tokens_prompt,
            tokens_generated=totals.tokens_generated,
            seconds=totals.seconds,
            steps=totals.steps,
            batch=size.limit,
            batch_reason=size.reason,
            preemptions=totals.preemptions,
            prefix_tokens=totals.tokens_shared,
            device_passes=runtime.device_passes(loop.runner.model),
            **loop.speculation.telemetry(),
            **vars(budget.totals if budget else BudgetTotals()),
            **runtime.predictor.forecast_totals.telemetry("forecast"),
            **runtime.predictor.lookahead_totals.telemetry("lookahead"),
        )

    def chat_prompt(self, messages: Messages, template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        """The token ids of a conversation up to the assistant's turn; RequestError without a chat template."""
        return self._template.render(ChatPrompt(messages, template_kwargs or {}))

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk, None, None]:
        """The reply to `prompt` (text, token ids, a chat's messages or a `ChatPrompt`) as it is generated.

        There is a chunk for every token. A reply to messages has its reasoning apart where the model marks it.

        The last chunk has `finish_reason`. Closing the generator ends the request. Several streams may be open,
        in one thread or in many: each step serves all. Raises RequestError, at the first step, for a prompt
        that is empty, has unknown token ids or does not fit the context.
        """
        with self._held():
            request = self._submit(prompt, sampling or Sampling())
        yield from self._stream(request)

    def _stream(self, request: Request) -> Generator[Chunk, None, None]:
        try:
            while True:
                for chunk in self._next_chunks(request):
                    yield chunk
                    if chunk.finish_reason is not None:
                        return
        finally:
            self._abandon([request])

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Completion:
        """The whole reply to `prompt`; see `stream`."""
        with self._held():
            request = self._submit(prompt, sampling or Sampling())
        return Completion.from_chunks(
            list(self._stream(request)), request.tokens[: request.prompt_length], self.plan.lossy
        )

    def generate_batch(
        self, requests: Iterable[tuple[Prompt, Sampling]]
    ) -> Generator[tuple[int, Completion | RequestError], None, None]:
        """The replies to many requests as they finish: each one's index in `requests`, and its reply or its error.

        Several run at a time (`batch`), those with a common prefix one after the other. `requests` is read as replies
        are taken, a few batches ahead. Closing the generator ends what is in flight.
        """
        numbered = enumerate(requests)
        in_flight: dict[Request, int] = {}
        more = True
        try:
            while more or in_flight:
                limit = self._max_in_flight()
                while more and len(in_flight) < limit:
                    number, asked = next(numbered, (-1, None))
                    if asked is None:
                        more = False
                        break
                    try:
                        with self._held():
                            in_flight[self._submit(*asked)] = number
                    except RequestError as error:
                        yield number, error
                if not in_flight:
                    continue
                self._step(unless=lambda: any(request.finished for request in in_flight))
                for request in [each for each in in_flight if each.finished]:
                    yield in_flight.pop(request), self._completion(request)
        finally:
            self._abandon(in_flight)

    def chat(
        self, messages: Messages, sampling: Sampling | None = None, template_kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The assistant's next message, in the shape of OpenAI's chat.completion object.

        `template_kwargs` are variables of the chat template, such as `enable_thinking` or `reasoning_effort`.
        """
        prompt = ChatPrompt(messages, template_kwargs or {})
        return chat_completion(self.generate(prompt, sampling), self._checkpoint.name)

    def cancel(self, *, running: bool = True) -> None:
        """Ends all requests in flight after their current token, with `finish_reason` "cancelled". Thread-safe.

        With `running` False only requests that have not begun end.
        """
        self._cancels.waiting += 1
        if running:
            self._cancels.all += 1

    def close(self) -> None:
        """Waits for the step in flight, ends the threads and frees the memory. Idempotent.

        A stream that is still open ends with EdgeMoEError at its next step.
        """
        if os.getpid() != self._process:
            # The threads and the memory are the other process's.
            self._runtime = None
            return
        self.cancel()
        with self._device:
            runtime, self._runtime = self._runtime, None
            if runtime is not None:
                self._loop.close()
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

    @contextmanager
    def _exclusive(self) -> Iterator[StepLoop]:
        """The loop, with the device held: for one step, or for passes that are no request's (`measure`).

        Raises EdgeMoEError after `close`, and CheckpointError in place of an OSError of the block.
        """
        with self._held():
            self._loaded()
            with reading(self._checkpoint.name):
                yield self._loop

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Holds the device. Raises EdgeMoEError in a process forked from the one that loaded the engine.

        A fork has none of its threads, and may have a lock that nobody gives back.
        """
        if os.getpid() != self._process:
            raise EdgeMoEError("the engine was loaded by another process: load it in this one, after the fork")
        with self._device:
            yield

    def _submit(self, prompt: Prompt, sampling: Sampling) -> Request:
        """Puts a new request in the waiting queue. The device is held."""
        self._loaded()
        chat = as_chat(prompt)
        tokens = self._tokens(self._template.render(chat) if chat else cast("str | Sequence[int]", prompt))
        settings = self._settings(sampling, len(tokens))
        text = self._replies.new(tokens, settings, chat)
        request = Request(self._requests, tokens, settings, text, self._cancels, self._vocabulary)
        self._requests += 1
        self._loop.add(request)
        return request

    def _max_in_flight(self) -> int:
        with self._held():
            self._loaded()
            limit = self._loop.scheduler.size.limit
            return max(2 * limit, min(READ_AHEAD_BATCHES * limit, MAX_READ_AHEAD))

    def _step(self, unless: Callable[[], bool]) -> None:
        """Runs one step, except where another thread's step has already given what the caller waits for."""
        with self._exclusive() as loop:
            if not unless():
                loop.step()

    def _next_chunks(self, request: Request) -> list[Chunk]:
        """The chunks of `request` that are ready, after a step where there are none."""
        self._step(unless=lambda: bool(request.chunks) or request.finished)
        if request.error is not None:
            raise self._failure(request.error) from request.error
        chunks = list(request.chunks)
        request.chunks.clear()
        return chunks

    def _failure(self, error: BaseException) -> EdgeMoEError:
        """The error of a request whose step failed, in whichever thread that step ran."""
        if isinstance(error, OSError):
            return unreadable(self._checkpoint.name, error)
        return EdgeMoEError(f"a step that this request was part of failed ({error!r}): ask again")

    def _abandon(self, requests: Iterable[Request]) -> None:
        """Marks requests whose reply nobody takes any more; they end at the next step."""
        for request in requests:
            request.abandoned = True

    def _completion(self, request: Request) -> Completion:
        if request.error is not None:
            raise self._failure(request.error) from request.error
        return Completion.from_chunks(list(request.chunks), request.tokens[: request.prompt_length], self.plan.lossy)

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        tokens = prompt_tokens(self._tokenizer, prompt, self._checkpoint.name)
        check_prompt(tokens, self._vocabulary)
        return tokens

    def _settings(self, sampling: Sampling, length: int) -> ResolvedSampling:
        check_token_ids(sampling.logit_bias or (), self._vocabulary, "logit_bias has the")
        left = self.plan.context - length
        if left < 1:
            raise RequestError(
                f"the prompt has {length} tokens and the context {self.plan.context}, reply included: "
                "shorten the prompt, or raise context="
            )
        return resolve(sampling, self._defaults, self._config.default_max_tokens, left, length)


def _draft_model(blueprint: Blueprint, config: EngineConfig) -> DraftModel | None:
    """The checkpoint that drafts for `blueprint`, where the settings ask for one."""
    if "model" not in drafts_of(blueprint, config).drafters or config.draft_model is None:
        return None
    return DraftModel(config.draft_model, blueprint, offline=config.offline)


def _ignore(progress: Progress) -> None:
    """The progress callback of callers that give none."""
