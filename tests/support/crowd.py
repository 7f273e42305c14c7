"""A batch over a tiny model, driven step by step, and the plain loop that its replies are compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import GenerationConfig

from bench.support.byte_tokenizer import byte_tokenizer
from edgemoe.config import EngineConfig
from edgemoe.draft.expert_budget import ExpertBudget
from edgemoe.draft.pass_drafter import SelfDrafter
from edgemoe.draft.settings import budget_settings, draft_settings
from edgemoe.draft.speculation import Speculation
from edgemoe.experts.expert_predictor import ExpertPredictor
from edgemoe.experts.lookahead import Lookahead
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.pass_logits import LogitsRows
from edgemoe.model.sequential_runner import PassInput
from edgemoe.plan.kv_size import KvSize, measure_kv
from edgemoe.prefetch.link_gauge import LinkGauge
from edgemoe.prefetch.prefetcher import Prefetcher
from edgemoe.request.constraint import Constraints
from edgemoe.request.reply_grammar import reply_grammar
from edgemoe.request.reply_parts import OnePart, ReplyFormat
from edgemoe.request.reply_text import ReplyText
from edgemoe.request.request import Request
from edgemoe.request.token_texts import TokenTexts
from edgemoe.response_format import schema_of
from edgemoe.results import Completion
from edgemoe.sampling import Sampling, resolve
from edgemoe.scheduler.batch_size import BatchSize
from edgemoe.scheduler.kv_budget import KvBudget
from edgemoe.scheduler.scheduler import Scheduler
from edgemoe.scheduler.step_loop import StepLoop
from edgemoe.scheduler.step_runner import StepRunner
from tests.support.checkpoints import Running, random_ids

PromptAndSettings = tuple[list[int], dict[str, Any]]
"""A prompt and what it asks for beyond the crowd's own settings."""


def tokenizer() -> Any:
    """The byte tokenizer as transformers wraps it, so that replies have text."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), pad_token="<pad>", eos_token="<eos>")


TEXTS = TokenTexts(tokenizer())
CONSTRAINTS = Constraints(tokenizer(), TEXTS)
VOCABULARY = 256
"""Of the tiny models."""


def new_request(number: int, prompt: Sequence[int], **settings: Any) -> Request:
    """A request for 8 tokens, unless `settings` say otherwise."""
    asked = Sampling(**{"ignore_eos": True, "max_tokens": 8, **settings})
    constraint = None
    if asked.response_format is not None:
        schema = schema_of(asked.response_format)
        constraint = CONSTRAINTS.new(reply_grammar(schema, [], ReplyFormat(), TEXTS, []))
    text = ReplyText(TEXTS, OnePart(TEXTS, prompt), asked.stop, constraint=constraint)
    return Request(number, prompt, resolve(asked, GenerationConfig(), 1024, 10_000), text, VOCABULARY)


def completion(done: Request) -> Completion:
    """The reply of a request that has finished."""
    assert done.error is None
    assert done.finished
    return Completion.from_chunks(list(done.chunks), done.tokens[: done.prompt_length])


def alone(own: Running, prompt: Sequence[int], **settings: Any) -> Completion:
    """The reply without a batch: one sequence, its prompt in one pass, then token by token."""
    runner = own.runner(prefill_chunk=10_000)
    single = new_request(0, prompt, **settings)
    cache = runner.start(len(prompt))
    single.begin(cache)
    while not single.finished:
        single.advance(runner.step(cache, single.tokens[cache.tokens :]))
    return completion(single)


def assert_same_reply(found: Completion, expected: Completion) -> None:
    """Token for token, and in all that follows from the tokens."""
    assert found.token_ids == expected.token_ids
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
    assert found.prompt_token_ids == expected.prompt_token_ids
    assert (found.logprobs is None) == (expected.logprobs is None)
    for one, other in zip(found.logprobs or (), expected.logprobs or (), strict=True):
        assert (one.token_id, one.token) == (other.token_id, other.token)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [value for _, _, value in one.top] == pytest.approx([value for _, _, value in other.top], abs=1e-3)


def speculating(own: Running, joint: ModelRunner, **options: Any) -> Speculation:
    """What drafts for `own` under `options` of an engine's configuration."""
    settings = draft_settings(EngineConfig(**options))
    experts = own.store.experts
    prefetcher = Prefetcher(own.cache, len(experts), LinkGauge(own.cache._link))
    predictor = ExpertPredictor(
        own.cache, prefetcher, Lookahead(own.model, own.blueprint.experts_modules), experts, 2, enabled=False
    )
    rules = ["reselect", "fewer"] if settings.rule == "auto" else [settings.rule]
    drafts = "self" in settings.drafters
    passes = SelfDrafter(joint, own.cache, experts, rules, None) if drafts else None
    return Speculation(settings, joint, passes, predictor)


def mixed_requests(count: int, longest: int, seed: int = 0) -> list[PromptAndSettings]:
    """Requests that differ in everything that a request may say; the shortest has 1 token, the longest `longest`."""
    draw = random.Random(seed)
    lengths = [1, longest, *(round(longest ** draw.random()) for _ in range(count - 2))]
    draw.shuffle(lengths)
    requests = []
    for number, length in enumerate(lengths):
        settings: dict[str, Any] = {
            "max_tokens": draw.choice([1, 2, 7, 15, 30]),
            "temperature": draw.choice([0.0, 0.0, 0.7, 1.5]),
            "seed": number,
            "top_k": draw.choice([None, 5]),
            "top_p": draw.choice([None, 0.8]),
            "repetition_penalty": draw.choice([None, None, 1.3]),
            "logprobs": draw.choice([None, None, 0, 3]),
            "stop": draw.choice([(), tuple("aeinorst"), ("Z", "\n", "0", "7", "K", "x")]),
        }
        requests.append((random_ids(length, seed=1000 * seed + number), settings))
    return requests


class Crowd:
    """A batch and a look at it after every step: the pasts within the room, the tokens within the budget."""

    def __init__(
        self,
        own: Running,
        *,
        capacity: Callable[[KvSize], int] = lambda size: 64 * size.nbytes(512),
        step_tokens: int = 64,
        limit: int = 8,
        patience: int = 64,
        in_chunks: bool = True,
        speculate: str = "off",
        **drafts: Any,
    ) -> None:
        self._kv = measure_kv(own.blueprint)
        self.room_nbytes = capacity(self._kv)
        self.runner = own.runner(prefill_chunk=step_tokens)
        self.joint = ModelRunner(self.runner)
        size = BatchSize(limit, automatic=False)
        self.speculation = speculating(own, self.joint, speculate=speculate, **drafts)
        self.scheduler = Scheduler(
            self.joint,
            KvBudget(self._kv, self.room_nbytes),
            step_tokens,
            size,
            patience,
            max_draft_nodes=self.speculation.max_nodes if self.speculation.active else 0,
        )
        self.loop = StepLoop(self.scheduler, self.speculation, StepRunner(self.joint, own.cache.counters))
        self.requests: list[Request] = []
        self.steps: list[list[int]] = []
        """Tokens of each sequence, for each pass."""
        self._limit = limit
        self._step_tokens = step_tokens
        self._in_chunks = in_chunks
        self._drafts = 0 if speculate == "off" else step_tokens // 4
        self._run = self.joint.run_sampled
        self.joint.run_sampled = self._watched_run  # type: ignore[method-assign]

    @property
    def computed(self) -> int:
        """Tokens that have been through the model."""
        return sum(map(sum, self.steps))

    def ask(self, prompt: Sequence[int], **settings: Any) -> Request:
        """Puts a request in the line."""
        asked = new_request(len(self.requests), prompt, **settings)
        self.requests.append(asked)
        self.loop.add(asked)
        return asked

    def cancel(self, *requests: Request) -> None:
        """Ends `requests`."""
        self.loop.cancel(requests.__contains__)

    def step(self) -> None:
        """One step, after which everything that is promised must hold."""
        done = len(self.steps)
        try:
            self.loop.step()
        finally:
            assert self.scheduler.kv.nbytes == self._held_nbytes() <= self.room_nbytes
            assert self.scheduler.running <= self._limit
            for tokens in self.steps[done:]:
                bound = max(self._step_tokens, len(tokens) + self._step_tokens // 4) + self._drafts
                assert sum(tokens) <= bound or not self._in_chunks

    def finish(self) -> None:
        """Steps until nobody is left."""
        steps = 0
        while self.scheduler.running or self.scheduler.waiting:
            self.step()
            steps += 1
            assert steps < 3000, "somebody waits for ever"

    def reply(self, prompt: Sequence[int], **settings: Any) -> Completion:
        """Asks and finishes."""
        asked = self.ask(prompt, **settings)
        self.finish()
        return completion(asked)

    def _held_nbytes(self) -> int:
        """What the pasts there are take by their room, whatever they are charged with."""
        caches = [request.cache for request in self.requests if request.cache is not None]
        caches += [kept.cache for kept in self.scheduler._prefixes.kept]
        return sum(self._kv.nbytes(cache.capacity) for cache in caches)

    def _watched_run(self, inputs: Sequence[PassInput]) -> list[LogitsRows]:
        self.steps.append([len(item.tokens) for item in inputs])
        return self._run(inputs)


def budgeted(own: Running, size: str | int, rule: str = "path", dropped: str = "substitute") -> ExpertBudget:
    """The budget on the experts of verifications that an engine with such settings has."""
    asked = budget_settings(EngineConfig(budget=size, budget_rule=rule, budget_dropped=dropped))
    assert asked is not None
    return ExpertBudget(asked, own.layers, own.cache, own.store.experts)
