"""The library's face: load a model, generate, stream, chat, close."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from edgemoe.blueprint import Blueprint, read_blueprint
from edgemoe.checkpoint import open_checkpoint
from edgemoe.config import EngineConfig
from edgemoe.decoder import Decoder
from edgemoe.demo import DEMO_NAME, demo_folder
from edgemoe.errors import CheckpointError, EdgeMoEError, RequestError
from edgemoe.generation import Generation
from edgemoe.plan import Plan
from edgemoe.planner import make_plan
from edgemoe.quiet import quiet_transformers
from edgemoe.results import Chunk, Completion, Progress, Stats, chat_completion
from edgemoe.runtime import Runtime
from edgemoe.sampling import ResolvedSampling, Sampling, resolve
from edgemoe.tokenizing import load_generation_config, load_tokenizer, render_chat

DEFAULTS = EngineConfig()


class Engine:
    """One loaded model. Generations run one at a time; a second caller waits for the first.

    Use it as a context manager, or call `close`. `cancel` may be called from any thread.
    """

    def __init__(self, blueprint: Blueprint, config: EngineConfig, on_progress: Callable[[Progress], None]) -> None:
        self.plan: Plan = make_plan(blueprint, config)
        self._config = config
        self._checkpoint = blueprint.checkpoint
        self._tokenizer = load_tokenizer(blueprint.checkpoint)
        self._defaults = load_generation_config(blueprint)
        self._vocabulary = blueprint.config.get_text_config().vocab_size
        self._runtime: Runtime | None = Runtime(blueprint, self.plan, config, on_progress)
        plan, model = self.plan, self._runtime.model
        device = torch.device(plan.device)
        self._decoder = Decoder(model, device, plan.prefill_chunk, plan.threads, plan.nbytes_per_token)
        self._turn = threading.Lock()
        self._device = threading.Lock()
        self._owner: int | None = None
        self._cancel = threading.Event()
        self._requests = 0
        self._tokens_prompt = 0
        self._tokens_generated = 0
        self._seconds = 0.0

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
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Engine:
        """Loads `model`, a checkpoint's folder or Hugging Face id; None is the model that ships with edgemoe.

        `expert_cache` is "auto", bytes ("6GiB"), a share ("40%") or slots in all (an int). `on_progress` may
        be called from other threads. Raises CheckpointError or PlanError before any weight is read.
        """
        config = EngineConfig(
            device=device,
            dtype=dtype,
            expert_cache=expert_cache,
            context=context,
            threads=threads,
            offline=offline,
            link_gbps=link_gbps,
        )
        return cls(_blueprint(model, config), config, on_progress or _ignore)

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
        )
        return make_plan(_blueprint(model, config), config)

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
        """Totals since loading; readable from any thread, and after `close` no more."""
        counters = self._loaded().cache.counters
        return Stats(
            slots=self.plan.slots,
            experts=self.plan.experts,
            **vars(counters),
            requests=self._requests,
            tokens_prompt=self._tokens_prompt,
            tokens_generated=self._tokens_generated,
            seconds=self._seconds,
        )

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation, ready for the assistant's turn; RequestError without a chat template."""
        return render_chat(self._tokenizer, messages, self._checkpoint.name)

    def stream(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Generator[Chunk, None, None]:
        """The reply to `prompt` (text or token ids) as it comes, a chunk a token.

        The last chunk has `finish_reason`. Closing the generator stops the work. A stream of another thread
        waits for this one to end; a second one of the same thread would wait for ever and raises RequestError,
        as do, at the first step, a prompt that is empty, has unknown token ids or does not fit the context.
        """
        if self._owner == threading.get_ident():
            raise RequestError("this thread has a stream open on this engine: exhaust it or close() it first")
        with self._turn:
            self._owner = threading.get_ident()
            self._cancel.clear()
            self._requests += 1
            started, last = time.perf_counter(), None
            try:
                for last in self._steps(prompt, sampling or Sampling()):
                    yield last
            finally:
                self._owner = None
                self._seconds += time.perf_counter() - started
                if last is not None:
                    self._tokens_prompt += last.timings.prompt_tokens
                    self._tokens_generated += last.timings.generated_tokens

    def _steps(self, prompt: str | Sequence[int], sampling: Sampling) -> Iterator[Chunk]:
        """The chunks of one generation. The device is held for one step at a time, so that `close` can come between."""
        with self._device:
            runtime = self._loaded()
            tokens = self._tokens(prompt)
            settings = self._settings(sampling, len(tokens))
            counters = runtime.cache.counters
            chunks = iter(Generation(self._decoder, self._tokenizer, tokens, settings, counters, self._cancel.is_set))
        while True:
            with self._device:
                self._loaded()
                try:
                    chunk = next(chunks, None)
                except OSError as error:
                    name = self._checkpoint.name
                    raise CheckpointError(f"{name} cannot be read any more ({error}): fetch it again") from error
            if chunk is None:
                return
            yield chunk

    def generate(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Completion:
        """The whole reply to `prompt`; see `stream`."""
        ids = self._tokens(prompt)
        chunks = list(self.stream(ids, sampling))
        last = chunks[-1]
        logprobs = None
        if sampling is not None and sampling.logprobs is not None:
            logprobs = tuple(item for chunk in chunks for item in chunk.logprobs or ())
        return Completion(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=last.finish_reason or "length",
            logprobs=logprobs,
            timings=last.timings,
            prompt_token_ids=tuple(ids),
        )

    def chat(self, messages: Sequence[Mapping[str, str]], sampling: Sampling | None = None) -> dict[str, Any]:
        """The assistant's next message, in the shape of OpenAI's chat.completion object."""
        return chat_completion(self.generate(self.chat_prompt(messages), sampling), self._checkpoint.name)

    def cancel(self) -> None:
        """Ends the generation in flight after its current token, with `finish_reason` "cancelled". Thread-safe."""
        self._cancel.set()

    def close(self) -> None:
        """Waits for the step in flight, ends the threads and gives the memory back. Idempotent.

        A stream that is still open ends with EdgeMoEError at its next step.
        """
        self._cancel.set()
        with self._device:
            runtime, self._runtime = self._runtime, None
            if runtime is not None:
                del self._decoder
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

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError(f"{self._checkpoint.name} has no tokenizer files: give the prompt as token ids")
            with quiet_transformers():
                tokens = [int(token) for token in self._tokenizer.encode(prompt)] if prompt else []
        else:
            tokens = [int(token) for token in prompt]
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token")
        outside = [token for token in tokens if not 0 <= token < self._vocabulary]
        if outside:
            raise RequestError(f"token id {outside[0]} is outside the vocabulary of {self._vocabulary}: check the ids")
        return tokens

    def _settings(self, sampling: Sampling, length: int) -> ResolvedSampling:
        room = self.plan.context - length
        if room < 1:
            raise RequestError(
                f"the prompt has {length} tokens and the context {self.plan.context}, reply included: "
                f"shorten it, or raise the context with --ctx-size (context= in the library)"
            )
        return resolve(sampling, self._defaults, self._config.default_max_tokens, room)


def _blueprint(model: str | os.PathLike[str] | None, config: EngineConfig) -> Blueprint:
    if model is None:
        return read_blueprint(open_checkpoint(demo_folder(), name=DEMO_NAME), config.dtype)
    return read_blueprint(open_checkpoint(model, offline=config.offline), config.dtype)


def _ignore(progress: Progress) -> None:
    """The progress callback of those who gave none."""
