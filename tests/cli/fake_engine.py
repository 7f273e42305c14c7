"""An engine without a model: it implements what the terminal uses, and answers by rule.

A prompt's tokens are its characters and a reply's are its words, so that every number can be worked out by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgemoe import Chunk, Sampling, Timings
from edgemoe.cli.surface import LoadProgress
from edgemoe.errors import RequestError
from edgemoe.results import Progress, TokenLogprob


@dataclass(frozen=True)
class FakePlan:
    model: str = "fake"
    device: str = "cpu"
    dtype: str = "float32"
    context: int = 512
    simulation: str | None = None

    def lines(self) -> list[tuple[str, str, str]]:
        return [("experts", "1.0 GiB", "memory"), ("dense weights", "96 MiB", "memory, always resident")]

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "context": self.context}


@dataclass
class FakeStats:
    hits: int = 0
    link_wait_seconds: float = 0.25

    def to_dict(self) -> dict[str, Any]:
        return {"hits": self.hits, "link_wait_seconds": self.link_wait_seconds}


def echo(text: str) -> str:
    """The reply to a prompt that has no other."""
    return f"You said {text}"


@dataclass
class FakeEngine:
    """Replies with `replies`, an error where that is one, else with an echo. `before_word` sees each word's number."""

    replies: Mapping[str, str | Exception] = field(default_factory=dict)
    has_chat_template: bool = True
    has_tokenizer: bool = True
    plan: FakePlan = field(default_factory=FakePlan)
    stats: FakeStats = field(default_factory=FakeStats)
    before_word: Callable[[int], None] = lambda number: None
    prompts: list[str] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)
    closed: bool = False
    cancelled: bool = False

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if not self.has_chat_template:
            raise RequestError("fake has no chat template; give a raw prompt")
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return [ord(character) for character in text]

    def stream(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Generator[Chunk, None, None]:
        assert sampling is not None
        text = prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
        self.prompts.append(text)
        self.samplings.append(sampling)
        self.cancelled = False
        if not text:
            raise RequestError("the prompt is empty; give at least one token")
        asked = text.rpartition("<user>")[2]
        reply = self.replies.get(asked, echo(asked))
        if isinstance(reply, Exception):
            raise reply
        yield from self._words(reply, len(text), sampling)

    def _words(self, reply: str, prompt_tokens: int, sampling: Sampling) -> Iterator[Chunk]:
        words = reply.split(" ")
        limit = sampling.max_tokens or len(words)
        for number, word in enumerate(words[:limit]):
            self.before_word(number)
            piece = word if number == 0 else f" {word}"
            reason = None
            if number + 1 == min(limit, len(words)):
                reason = "stop" if limit >= len(words) else "length"
            if self.cancelled:
                yield Chunk("", (), "cancelled", None, timings(prompt_tokens, number))
                return
            logprobs = None
            if sampling.logprobs is not None:
                top = tuple((rank, f"{piece}{rank}", -float(rank)) for rank in range(sampling.logprobs))
                logprobs = (TokenLogprob(number, piece, -0.5, top),)
            self.stats.hits += 3
            yield Chunk(piece, (number,), reason, logprobs, timings(prompt_tokens, number + 1))

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.closed = True


def timings(prompt_tokens: int, generated: int) -> Timings:
    """Ten prompt tokens a second, then after the first four generated ones; three hits a miss; 1 KiB for a token."""
    return Timings(
        prompt_tokens=prompt_tokens,
        generated_tokens=generated,
        prompt_seconds=prompt_tokens / 10,
        generate_seconds=max(0, generated - 1) / 4,
        time_to_first_token=0.5,
        bytes_loaded=(prompt_tokens + generated) * 1024,
        hits=generated * 3,
        misses=generated,
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
        on_progress: Callable[[LoadProgress], None] | None = None,
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
