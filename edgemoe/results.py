"""What a generation gives back. Measurements are part of it; nothing is printed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def hit_rate(hits: int, misses: int) -> float:
    """Hits over hits and misses, from 0 to 1; 0 without any."""
    return hits / max(1, hits + misses)


@dataclass(frozen=True)
class Timings:
    """Tokens, seconds and bytes of one generation."""

    prompt_tokens: int
    shared_tokens: int
    """Prompt tokens that were not computed, since another request had computed them."""
    generated_tokens: int
    wait_seconds: float
    """From the request to its place in the batch."""
    prompt_seconds: float
    """From there to the first token."""
    generate_seconds: float
    """From the first token to the last."""
    time_to_first_token: float
    """Seconds from the request to its first token."""
    bytes_loaded: int
    """Expert bytes that crossed the link. What a step moves for several requests is divided by their tokens in it."""
    hits: int
    misses: int
    cycles: int
    """Verifications of at least one drafted token."""
    drafted: int
    """Tokens that were drafted for it."""
    accepted: int
    """Drafted tokens that are in the reply."""

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens that a verification of a draft gave, the one beside the draft included; 0 where there was none."""
        return (self.accepted + self.cycles) / max(1, self.cycles)

    @property
    def prompt_per_second(self) -> float:
        """Prompt tokens computed a second."""
        return (self.prompt_tokens - self.shared_tokens) / max(self.prompt_seconds, 1e-9)

    @property
    def generated_per_second(self) -> float:
        """Generated tokens a second after the first one, which belongs to the prompt's pass."""
        return max(0, self.generated_tokens - 1) / max(self.generate_seconds, 1e-9)

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were resident, from 0 to 1."""
        return hit_rate(self.hits, self.misses)

    @property
    def bytes_per_token(self) -> float:
        """Expert bytes moved for each token of prompt and reply."""
        return self.bytes_loaded / max(1, self.prompt_tokens + self.generated_tokens)


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token, its natural-log probability before sampling settings, and the likeliest alternatives."""

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class Completion:
    """A finished generation."""

    text: str
    token_ids: tuple[int, ...]
    """Every generated token, the one that ended the reply included."""
    finish_reason: str
    """"stop" (an end token or a stop text), "length" or "cancelled"."""
    logprobs: tuple[TokenLogprob, ...] | None
    timings: Timings
    prompt_token_ids: tuple[int, ...]

    @classmethod
    def from_chunks(cls, chunks: Sequence[Chunk], prompt_token_ids: Sequence[int]) -> Completion:
        """The whole of a reply's chunks, of which there is at least one."""
        reported = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
        return cls(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=chunks[-1].finish_reason or "cancelled",
            logprobs=tuple(item for items in reported for item in items) if reported else None,
            timings=chunks[-1].timings,
            prompt_token_ids=tuple(prompt_token_ids),
        )


@dataclass(frozen=True)
class Chunk:
    """A piece of a reply as it streams. `finish_reason` is set on the last one only."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[TokenLogprob, ...] | None
    timings: Timings


@dataclass(frozen=True)
class Progress:
    """How far loading, or comparing experts, is: a stage ("weights", "experts" or "affinity") and its bytes."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Stats:
    """An engine's totals since it was loaded."""

    slots: int = 0
    experts: int = 0
    hits: int = 0
    misses: int = 0
    bytes_hit: int = 0
    bytes_demanded: int = 0
    bytes_prefetched_used: int = 0
    bytes_prefetched_late: int = 0
    bytes_prefetched_wasted: int = 0
    bytes_filled: int = 0
    """Bytes that were brought to fill the cache at the start, once they were asked for or evicted."""
    link_wait_seconds: float = 0.0
    requests: int = 0
    tokens_prompt: int = 0
    tokens_generated: int = 0
    seconds: float = 0.0
    """Time spent in steps."""
    steps: int = 0
    """Passes over the model, each for every request that was running."""
    batch: int = 0
    """Sequences that are decoded together at most, as asked for or as found best so far."""
    batch_reason: str = ""
    """Why that many."""
    preemptions: int = 0
    """Requests that lost their keys and values for lack of room, and were computed again."""
    prefix_tokens: int = 0
    """Prompt tokens that were not computed, since another request had computed them."""
    speculation: str = ""
    """What drafts, or why nothing does."""
    speculation_setting: str = ""
    """How far the sequence that was drafted for last is drafted for, on trial or as found best, or why it is not."""
    speculation_changes: int = 0
    """How often a setting has changed, of all sequences."""
    utility: float = 0.0
    """Tokens per cycle over the cycle's time in plain steps, of that setting and lately; above 1 drafting wins. 0 where
    nothing is controlled: what drafts was named, or nothing drafts."""
    cycles: int = 0
    """Verifications of at least one drafted token, each of one sequence."""
    drafted: int = 0
    """Tokens that were drafted for them."""
    accepted: int = 0
    """Drafted tokens that are in a reply."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    """Steps that verified something, whatever else they computed."""
    budget_choices: int = 0
    """Experts that nodes of verifications under a budget chose, each for each node and layer."""
    budget_dropped: int = 0
    """Those of them that the budget left out."""
    forecast_recall: float = 0.0
    """Share of the experts missing at a draft's beginning that its routing named before they were asked for."""
    forecast_precision: float = 0.0
    """Share of the missing experts that it named that were asked for."""
    forecast_bytes_useful: int = 0
    """Bytes brought for it that were there when the verification asked for them."""
    forecast_bytes_late: int = 0
    """Those that were still on their way then."""
    forecast_bytes_wasted: int = 0
    """Those that the verification did not ask for, whatever asked for them later."""
    lookahead_recall: float = 0.0
    """The same five of the lookahead from each layer to the next."""
    lookahead_precision: float = 0.0
    lookahead_bytes_useful: int = 0
    lookahead_bytes_late: int = 0
    lookahead_bytes_wasted: int = 0

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens that a verification of a draft gave, the one beside the draft included; 0 before there was one."""
        return (self.accepted + self.cycles) / max(1, self.cycles)

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were resident, from 0 to 1."""
        return hit_rate(self.hits, self.misses)

    @property
    def bytes_loaded(self) -> int:
        """All expert bytes that crossed the link."""
        prefetched = self.bytes_prefetched_used + self.bytes_prefetched_late + self.bytes_prefetched_wasted
        return self.bytes_demanded + prefetched + self.bytes_filled

    def to_dict(self) -> dict[str, Any]:
        """The totals and the rates as JSON can hold them."""
        rates = {"hit_rate": self.hit_rate, "tokens_per_cycle": self.tokens_per_cycle}
        return dict(vars(self)) | rates | {"bytes_loaded": self.bytes_loaded}


def chat_completion(completion: Completion, model: str) -> dict[str, Any]:
    """A finished reply in the shape of OpenAI's chat.completion object."""
    prompt, generated = completion.timings.prompt_tokens, completion.timings.generated_tokens
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": completion.text},
                "finish_reason": completion.finish_reason,
                "logprobs": chat_logprobs(completion.logprobs),
            }
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated},
    }


def chat_logprobs(logprobs: tuple[TokenLogprob, ...] | None) -> dict[str, Any] | None:
    """Log probabilities in the shape of OpenAI's chat choices."""
    if logprobs is None:
        return None

    def entry(token: str, logprob: float) -> dict[str, Any]:
        # A token that is part of a character has no text of its own, and so no bytes that could be told.
        whole = "\N{REPLACEMENT CHARACTER}" not in token
        return {"token": token, "logprob": logprob, "bytes": list(token.encode()) if whole else None}

    return {
        "content": [
            entry(item.token, item.logprob) | {"top_logprobs": [entry(token, value) for _, token, value in item.top]}
            for item in logprobs
        ]
    }
