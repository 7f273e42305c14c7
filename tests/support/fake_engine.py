"""An engine without a model: it implements what the terminal uses, and answers by rule.

A prompt's tokens are its characters and a reply's are its words, so that every number can be worked out by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe import ChatPrompt, Chunk, Completion, Sampling, Timings
from edgemoe.errors import RequestError
from edgemoe.plan.plan import Plan
from edgemoe.results import Progress, Stats, TokenLogprob

if TYPE_CHECKING:
    from edgemoe.checkpoint.chat_template import Messages
    from edgemoe.checkpoint.tokenizer import Prompt


class FakePlan(Plan):
    """A plan with a short report; of its numbers only `context` is one."""

    _simulation: str | None

    def __init__(self, *, simulation: str | None = None, lossy: str = "", context: int = 512) -> None:
        numbers: dict[str, Any] = {field.name: 0 for field in fields(Plan)}
        words = {"model": "fake", "device": "cpu", "dtype": "float32", "lossy": lossy}
        super().__init__(**numbers | words | {"context": context})
        object.__setattr__(self, "_simulation", simulation)

    @property
    def simulation(self) -> str | None:
        return self._simulation

    def lines(self) -> list[tuple[str, str, str]]:
        return [("experts", "1.0 GiB", "memory"), ("dense weights", "96 MiB", "memory, always resident")]

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "context": self.context}


@dataclass(frozen=True)
class FakeStats(Stats):
    """`Stats` with figures that a test can tell apart; `bytes_loaded` is counted by itself."""

    slots: int = 4
    experts: int = 16
    bytes_loaded: int = 0
    link_wait_seconds: float = 0.25
    batch: int = 2
    batch_reason: str = "as asked for"
    speculation: str = "off: asked for"
    speculation_setting: str = "off: asked for"
    utility: float = 1.0


def echo(text: str) -> str:
    """The reply to a prompt that has no other."""
    return f"You said {text}"


@dataclass
class FakeEngine:
    """Replies with `replies`, an error where that is one, else with an echo. `before_word` sees each word's number.

    Of a batch, `stats.batch` replies grow by a word a step, and as many requests again wait; so the short ones
    overtake the long ones. With `drafts`, every word is a cycle: 3 tokens are drafted and 1 is accepted, in 2 ms,
    and verified in 10 ms.
    """

    replies: Mapping[str, str | Exception] = field(default_factory=dict)
    has_chat_template: bool = True
    has_tokenizer: bool = True
    drafts: bool = False
    plan: FakePlan = field(default_factory=FakePlan)
    stats: FakeStats = field(default_factory=FakeStats)
    before_word: Callable[[int], None] = lambda number: None
    prompts: list[str] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)
    closed: bool = False
    cancelled: bool = False
    cancelled_waiting: bool = False

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk, None, None]:
        assert sampling is not None
        self.cancelled = False
        yield from self._reply(self._text(prompt), sampling)

    def chat_prompt(self, messages: Messages, template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        return [ord(character) for character in self._text(messages)]

    def generate_batch(
        self, requests: Iterable[tuple[Prompt, Sampling]]
    ) -> Generator[tuple[int, Completion | RequestError], None, None]:
        numbered = enumerate(requests)
        running: dict[int, tuple[Iterator[Chunk], list[Chunk]]] = {}
        waiting: dict[int, tuple[str, Sampling]] = {}
        while True:
            read = itertools.islice(numbered, 2 * self.stats.batch - len(running) - len(waiting))
            for index, (prompt, sampling) in read:
                try:
                    waiting[index] = (self._text(prompt), sampling)
                except RequestError as error:
                    yield index, error
            if self.cancelled or self.cancelled_waiting:
                for index in waiting:
                    yield index, Completion("", (), "cancelled", None, timings(0, 0), ())
                waiting.clear()
            while waiting and len(running) < self.stats.batch:
                index = next(iter(waiting))
                running[index] = (self._reply(*waiting.pop(index)), [])
            if not running:
                return
            yield from self._step(running)

    def _step(
        self, running: dict[int, tuple[Iterator[Chunk], list[Chunk]]]
    ) -> Iterator[tuple[int, Completion | RequestError]]:
        for index, (words, chunks) in list(running.items()):
            try:
                chunks.append(next(words))
            except RequestError as error:
                del running[index]
                yield index, error
                continue
            if chunks[-1].finish_reason is not None:
                del running[index]
                yield index, Completion.from_chunks(chunks, ())

    def _text(self, prompt: Prompt) -> str:
        if isinstance(prompt, ChatPrompt):
            prompt = prompt.messages
        """The prompt as text; the roles stand for the chat template."""
        text = ""
        for part in [prompt] if isinstance(prompt, str) else prompt:
            if isinstance(part, Mapping):
                if not self.has_chat_template:
                    raise RequestError("fake has no chat template; give a raw prompt")
                text += f"<{part['role']}>{part['content']}"
            else:
                text += part if isinstance(part, str) else chr(part)
        if not text:
            raise RequestError("the prompt is empty; give at least one token")
        return text

    def _reply(self, text: str, sampling: Sampling) -> Iterator[Chunk]:
        self.prompts.append(text)
        self.samplings.append(sampling)
        asked = text.rpartition("<user>")[2]
        reply = self.replies.get(asked, echo(asked))
        if isinstance(reply, Exception):
            raise reply
        self._count(requests=1, tokens_prompt=len(text), bytes_loaded=len(text) * 1024)
        yield from self._words(reply, len(text), sampling)

    def _words(self, reply: str, prompt_tokens: int, sampling: Sampling) -> Iterator[Chunk]:
        words = reply.split(" ")
        limit = min(sampling.max_tokens or len(words), max(1, self.plan.context - prompt_tokens))
        for number, word in enumerate(words[:limit]):
            self.before_word(number)
            piece = word if number == 0 else f" {word}"
            reason = None
            if number + 1 == min(limit, len(words)):
                reason = "stop" if limit >= len(words) else "length"
            if self.cancelled:
                yield Chunk("", (), "cancelled", None, self._timings(prompt_tokens, number))
                return
            logprobs = None
            if sampling.logprobs is not None:
                top = tuple((rank, f"{piece}{rank}", -float(rank)) for rank in range(sampling.logprobs))
                logprobs = (TokenLogprob(number, piece, -0.5, top),)
            self._count(
                tokens_generated=1, bytes_loaded=1024, bytes_demanded=512, bytes_prefetched_used=256,
                bytes_prefetched_late=192, bytes_prefetched_wasted=64, hits=3, misses=1, steps=1, seconds=0.02,
                link_wait_seconds=0.001,
            )  # fmt: skip
            if self.drafts:
                self._count(cycles=1, drafted=3, accepted=1, draft_seconds=0.002, verify_seconds=0.01)
            yield Chunk(piece, (number,), reason, logprobs, self._timings(prompt_tokens, number + 1))

    def _timings(self, prompt_tokens: int, generated: int) -> Timings:
        return timings(prompt_tokens, generated, cycles=generated if self.drafts else 0)

    def _count(self, **more: float) -> None:
        self.stats = replace(self.stats, **{name: getattr(self.stats, name) + each for name, each in more.items()})

    def cancel(self, *, running: bool = True) -> None:
        self.cancelled_waiting = True
        if running:
            self.cancelled = True

    def close(self) -> None:
        self.closed = True


def timings(prompt_tokens: int, generated: int, cycles: int = 0) -> Timings:
    """Ten prompt tokens a second, then after the first four generated ones; three hits a miss; 1 KiB for a token.

    Of three tokens drafted in each of the `cycles`, one is accepted.
    """
    return Timings(
        prompt_tokens=prompt_tokens,
        shared_tokens=0,
        generated_tokens=generated,
        wait_seconds=0.0,
        prompt_seconds=prompt_tokens / 10,
        generate_seconds=max(0, generated - 1) / 4,
        time_to_first_token=0.5,
        bytes_loaded=(prompt_tokens + generated) * 1024,
        hits=generated * 3,
        misses=generated,
        cycles=cycles,
        drafted=3 * cycles,
        accepted=cycles,
    )


@dataclass
class FakeFactory:
    """Stands in for the class `Engine`: gives out one engine or raises `error`, and remembers what it was asked for."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    error: Exception | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def load(
        self,
        model: str | Path | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **settings: Any,
    ) -> FakeEngine:
        self.asked.append({"model": model, **settings})
        if self.error is not None:
            raise self.error
        if on_progress is not None:
            on_progress(Progress("weights", 50, 100))
        return self.engine

    def plan_for(self, model: str | Path | None = None, **settings: Any) -> FakePlan:
        self.asked.append({"model": model, **settings})
        if self.error is not None:
            raise self.error
        return self.engine.plan
