"""The library's face: load a model, generate, stream, chat, close."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any, TypeVar, cast

from edgemoe.checkpoint.blueprint import Blueprint, blueprint_for
from edgemoe.checkpoint.chat_template import ChatPrompt, Messages
from edgemoe.checkpoint.prompts.prompt_limits import check_room
from edgemoe.checkpoint.prompts.token_ids import check_token_ids
from edgemoe.checkpoint.tokenizer import Prompt, as_chat, check_prompt, prompt_tokens
from edgemoe.config import EngineConfig, checked_setting, chosen_config
from edgemoe.errors import RequestError, reading
from edgemoe.experts.budget_routing import BudgetTotals
from edgemoe.plan.plan import Plan
from edgemoe.planner import make_plan
from edgemoe.request.request import Request
from edgemoe.results import ChatChunks, Completion, Progress, Stats, chat_completion
from edgemoe.runtime import Runtime, Transports
from edgemoe.sampling import ResolvedSampling, Sampling, given_sampling, read_pair, resolve
from edgemoe.scheduler.step_loop import StepLoop
from edgemoe.stream import Stream
from edgemoe.values import check_callable
from edgemoe.worker.loaded import Loaded, draft_model_for
from edgemoe.worker.worker import Worker

Result = TypeVar("Result")
READ_AHEAD_BATCHES = 16
"""How many batches of requests to read ahead, so that requests with a common prefix can run together."""
MAX_READ_AHEAD = 1024
"""Most requests to read ahead; two batches are always read."""
EXIT_SECONDS = 6.0
"""How long the end of the process waits for an engine that is still open: a little longer than for a dead disk."""

COUNTED_TOKENS = 1 << 17
"""Tokens of a prompt that are counted though the context be smaller."""


class Engine:
    """One loaded model. All open streams, of one thread or of many, run as one batch and share its experts.

    A thread of the engine runs the steps, while somebody waits for what they give; callers only wait, so that they can
    be interrupted at any time. Use it as a context manager, or call `close`; an engine that nobody has any more closes
    itself with a ResourceWarning. All methods may be called from any thread, and `cancel` and `close` from handlers of
    signals.
    """

    def __init__(
        self,
        blueprint: Blueprint | Callable[[], Blueprint],
        config: EngineConfig,
        on_progress: Callable[[Progress], None],
        stop: threading.Event | None = None,
        transports: Transports | None = None,
    ) -> None:
        """Loads the model of `blueprint`, or of what it returns; see `load`. `transports` are for trying faults."""
        open_blueprint = blueprint if callable(blueprint) else lambda: blueprint
        self._config = config
        self._worker = Worker(partial(_load, open_blueprint, config, on_progress, transports), self)
        self._finalizer = weakref.finalize(self, _close_forgotten, self._worker)
        try:
            self._worker.start()
            loaded = self._worker.wait_loaded(stop)
        except BaseException:
            self._worker.abandon()
            raise
        self._texts = loaded.texts
        self._text_lock = threading.RLock()
        self._numbers = count()

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        config: EngineConfig | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        stop: threading.Event | None = None,
        **settings: Any,
    ) -> Engine:
        """Loads `model`, a checkpoint's folder, GGUF file or Hugging Face id; None is the shipped model.

        `settings` are fields of `EngineConfig`, in place of those of `config`. `on_progress` is called from other
        threads. Once `stop` is set, raises EdgeMoEError at once; what was read is given back soon after. Raises
        CheckpointError or PlanError before any weight is read, TypeError for an unknown setting.
        """
        chosen = chosen_config(config, settings)
        check_callable(on_progress, "on_progress")
        return cls(partial(blueprint_for, model, chosen), chosen, on_progress or _ignore, stop)

    @staticmethod
    def plan_for(
        model: str | os.PathLike[str] | None = None, config: EngineConfig | None = None, **settings: Any
    ) -> Plan:
        """The plan that `load` would use now, without loading anything. Raises as `load` does."""
        chosen = chosen_config(config, settings)
        blueprint = blueprint_for(model, chosen)
        return make_plan(blueprint, chosen, draft_model_for(blueprint, chosen))

    @property
    def plan(self) -> Plan:
        """The memory plan, with the expert cache as it is now. Readable after `close` too."""
        return self._worker.plan

    @property
    def model_name(self) -> str:
        """The name of the checkpoint, as replies in OpenAI's shape have it."""
        return self._texts.checkpoint.name

    @property
    def has_tokenizer(self) -> bool:
        """Whether prompts may be text; without a tokenizer they are token ids and replies have no text."""
        return self._texts.tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has a template for conversations."""
        return bool(self._texts.template.source)

    @property
    def stats(self) -> Stats:
        """Totals since loading, requests in flight included. Readable from any thread, until `close`."""
        loaded = self._worker.check()
        try:
            return self._stats(loaded)
        except AttributeError:
            # What is asked was taken apart meanwhile.
            self._worker.check()
            raise

    def _stats(self, loaded: Loaded) -> Stats:
        runtime, loop = loaded.runtime, loaded.loop
        totals, size, budget = loop.scheduler.totals, loop.scheduler.size, loop.runner.budget
        return Stats(
            slots=self.plan.slots,
            experts=self.plan.experts,
            **vars(runtime.cache.counters),
            requests=totals.requests,
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
        return self.tokenize(ChatPrompt(messages, template_kwargs or {}))

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt as a request has them.

        RequestError for one that is empty, has unknown ids or is far longer than the context.
        """
        return self._tokenized(prompt, self.plan.context)

    def count_tokens(self, prompt: Prompt) -> int:
        """The number of tokens of a prompt; see `tokenize`. It may be longer than the context, up to 131,072 tokens."""
        return len(self._tokenized(prompt, max(self.plan.context, COUNTED_TOKENS)))

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Stream:
        """The reply to `prompt` (text, token ids, a chat's messages or a `ChatPrompt`) as it is generated.

        There is a chunk for every token. A reply to messages has its reasoning apart where the model marks it.

        The last chunk has `finish_reason`. Closing the stream ends the request. Several streams may be open,
        in one thread or in many: each step serves all. Raises RequestError for a prompt that is empty, has unknown
        token ids or does not fit the context.
        """
        self._worker.check()
        asked = given_sampling(sampling)
        chat = as_chat(prompt)
        tokens = self.tokenize(prompt)
        settings = self._settings(asked, len(tokens))
        with self._text_lock:
            text = self._texts.replies.new(tokens, settings, chat)
        request = Request(next(self._numbers), tokens, settings, text, self._texts.vocabulary)
        stream = Stream(self._worker, request, self.model_name, self)
        self._worker.post(lambda loop: loop.add(request))
        return stream

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Completion:
        """The whole reply to `prompt`; see `stream`."""
        with self.stream(prompt, sampling) as stream:
            return stream.completion(self.plan.lossy)

    def generate_batch(
        self, requests: Iterable[tuple[Prompt, Sampling]]
    ) -> Generator[tuple[int, Completion | RequestError], None, None]:
        """The replies to many requests as they finish: each one's index in `requests`, and its reply or its error.

        Several run at a time (`batch`), those with a common prefix one after the other. `requests` is read as replies
        are taken, a few batches ahead. Closing the generator ends what is in flight.
        """
        numbered = enumerate(requests)
        in_flight: dict[Stream, int] = {}
        more = True
        try:
            while more or in_flight:
                limit = self._max_in_flight()
                while more and len(in_flight) < limit:
                    number, asked = next(numbered, (-1, None))
                    if number < 0:
                        more = False
                        break
                    try:
                        in_flight[self.stream(*read_pair(asked))] = number
                    except RequestError as error:
                        yield number, error
                if not in_flight:
                    continue
                self._worker.wait(lambda: any(stream.ended for stream in in_flight))
                for stream in [each for each in in_flight if each.ended]:
                    yield in_flight.pop(stream), _outcome(stream, self.plan.lossy)
        finally:
            for stream in in_flight:
                stream.close()

    def chat(
        self,
        messages: Messages | ChatPrompt,
        sampling: Sampling | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The assistant's next message, in the shape of OpenAI's chat.completion object.

        `template_kwargs` are variables of the chat template, such as `enable_thinking` or `reasoning_effort`. A
        `ChatPrompt` has both already.
        """
        prompt = ChatPrompt.of(messages, template_kwargs)
        return chat_completion(self.generate(prompt, sampling), self.model_name)

    def chat_stream(
        self,
        messages: Messages | ChatPrompt,
        sampling: Sampling | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generator[dict[str, Any], None, None]:
        """As `chat`, in the shape of OpenAI's chat.completion.chunk objects; the last one has `usage`.

        Raises RequestError as `stream` does. Closing the generator ends the request.
        """
        stream = self.stream(ChatPrompt.of(messages, template_kwargs), sampling)
        return _chat_chunks(stream, ChatChunks(self.model_name))

    def cancel(self, *, running: bool = True) -> None:
        """Ends all requests in flight at the next layer, with `finish_reason` "cancelled". Returns at once.

        With `running` False only requests that have not begun end.
        """
        self._worker.post(lambda loop: loop.cancel(lambda request: running or not request.begun))

    def resize(self, expert_cache: str | int) -> Plan:
        """Gives the expert cache another size between two steps, as `expert_cache=` of `load`; returns the new plan.

        Replies go on and stay the same. A smaller cache gives its memory back at once, a larger one takes it as it is
        filled. Raises PlanError for a size that does not fit, and on a CUDA device, where the cache keeps its size.
        """
        size = checked_setting("expert_cache", expert_cache)
        return self._worker.call(lambda loaded: loaded.resize(size))

    def close(self) -> None:
        """Leaves the pass in flight at its next layer, ends the threads and frees the memory. Idempotent.

        A stream that is still open ends with EdgeMoEError at its next chunk.
        """
        self._worker.close()
        self._finalizer.detach()

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or an error has ended the engine: calls raise EdgeMoEError, which names it."""
        return self._worker.has_ended

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _loop(self) -> StepLoop:
        return self._worker.check().loop

    def _loaded(self) -> Runtime:
        return self._worker.check().runtime

    @property
    def _runtime(self) -> Runtime | None:
        loaded = self._worker.loaded
        return None if loaded is None else loaded.runtime

    def _between_steps(self, function: Callable[[StepLoop], Result]) -> Result:
        """What `function` returns, which has the device to itself: for passes that are no request's (`measure`).

        Raises EdgeMoEError after `close`, and CheckpointError in place of an OSError.
        """
        with reading(self.model_name):
            return self._worker.call(lambda loaded: function(loaded.loop))

    def _max_in_flight(self) -> int:
        limit = self._loop.scheduler.size.limit
        return max(2 * limit, min(READ_AHEAD_BATCHES * limit, MAX_READ_AHEAD))

    def _tokenized(self, prompt: Prompt, most: int) -> list[int]:
        """`tokenize`, for prompts of `most` tokens."""
        chat = as_chat(prompt)
        with self._text_lock:
            if chat is not None:
                prompt = self._texts.template.render(chat, most)
            given = cast("str | Sequence[int]", prompt)
            tokens = prompt_tokens(self._texts.tokenizer, given, self.model_name, most)
        check_prompt(tokens, self._texts.vocabulary)
        return tokens

    def _settings(self, sampling: Sampling, length: int) -> ResolvedSampling:
        check_token_ids(sampling.logit_bias or (), self._texts.vocabulary, "logit_bias has the")
        check_room(length, self.plan.context)
        left = self.plan.context - length
        return resolve(sampling, self._texts.defaults, self._config.default_max_tokens, left, length)


def _load(
    open_blueprint: Callable[[], Blueprint],
    config: EngineConfig,
    on_progress: Callable[[Progress], None],
    transports: Transports | None,
    poll: Callable[[], None],
) -> Loaded:
    """Loads a model, and calls `poll` on the way."""

    def progressed(progress: Progress) -> None:
        poll()
        on_progress(progress)

    blueprint = open_blueprint()
    poll()
    loaded = Loaded(blueprint, config, progressed, transports)
    try:
        poll()
    except BaseException:
        loaded.close()
        raise
    return loaded


def _outcome(stream: Stream, lossy: str) -> Completion | RequestError:
    """The reply of one of many requests, or the error that is its alone."""
    try:
        return stream.completion(lossy)
    except RequestError as error:
        return error


def _chat_chunks(stream: Stream, chunks: ChatChunks) -> Generator[dict[str, Any], None, None]:
    with stream:
        for chunk in stream:
            yield chunks.of(chunk)


def _close_forgotten(worker: Worker) -> None:
    """What an engine that nobody has any more leaves to be done; at the end of the process as well."""
    closing, loaded = worker.closing, worker.loaded
    worker.abandon()
    if not threading.main_thread().is_alive():
        # The process ends: a thread that is still in a model's code then may abort it.
        worker.join(EXIT_SECONDS)
    elif loaded is not None and not closing:
        warnings.warn(
            f"an engine with {loaded.plan.model} was not closed: call close, or use it in a with block",
            ResourceWarning,
            2,
        )


def _ignore(progress: Progress) -> None:
    """The progress callback of callers that give none."""
