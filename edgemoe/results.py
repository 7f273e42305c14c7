"""The results of generations, with their measurements, and an engine's totals."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LOWEST_LOGPROB = -9999.0
"""What JSON, which knows no infinity, has for the log-probability of what cannot occur, as OpenAI's API has."""


def hit_rate(hits: int, misses: int) -> float:
    """Hits over hits and misses, from 0 to 1; 0 without either."""
    return hits / max(1, hits + misses)


@dataclass(frozen=True)
class Timings:
    """Tokens, seconds and bytes of one request."""

    prompt_tokens: int
    shared_tokens: int
    """Prompt tokens whose keys and values were reused from another request."""
    generated_tokens: int
    wait_seconds: float
    """From the submission to the admission to the batch."""
    prompt_seconds: float
    """From the admission to the first token."""
    generate_seconds: float
    """From the first token to the last."""
    time_to_first_token: float
    """Seconds from the submission to the first token."""
    bytes_loaded: int
    """Its share of the expert bytes that crossed the link. A step's bytes are shared by its requests' tokens."""
    hits: int
    """Its share of the requested experts that were resident."""
    misses: int
    """Its share of those that were not."""
    cycles: int
    """Verifications of at least one drafted token."""
    drafted: int
    """Drafted tokens."""
    accepted: int
    """Drafted tokens that became part of the reply."""

    @property
    def tokens_per_cycle(self) -> float:
        """Mean tokens per verification of a draft: the accepted ones and one more; 0 without verifications."""
        return (self.accepted + self.cycles) / max(1, self.cycles)

    @property
    def prompt_per_second(self) -> float:
        """Computed prompt tokens per second, without the shared ones."""
        return (self.prompt_tokens - self.shared_tokens) / max(self.prompt_seconds, 1e-9)

    @property
    def generated_per_second(self) -> float:
        """Generated tokens per second after the first one, which the prompt's pass gives."""
        return max(0, self.generated_tokens - 1) / max(self.generate_seconds, 1e-9)

    @property
    def hit_rate(self) -> float:
        """Share of the requested experts that were resident, from 0 to 1."""
        return hit_rate(self.hits, self.misses)

    @property
    def bytes_per_token(self) -> float:
        """Expert bytes moved per token of prompt and reply."""
        return self.bytes_loaded / max(1, self.prompt_tokens + self.generated_tokens)


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token, its log-probability, and the most likely tokens in its place as (id, text, log-probability).

    Log-probabilities are natural logarithms, before temperature and other sampling settings; minus infinity for a token
    that cannot occur.
    """

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the model asks for."""

    id: str
    """The model's own, or a new one; the answer to the call names it as `tool_call_id`."""
    name: str
    arguments: str
    """A JSON object as text."""


@dataclass(frozen=True)
class Completion:
    """A finished reply."""

    text: str
    token_ids: tuple[int, ...]
    """All generated tokens, with the one that ended the reply."""
    finish_reason: str
    """"stop" (an end token or a stop text), "length" or "cancelled"."""
    logprobs: tuple[TokenLogprob, ...] | None
    timings: Timings
    prompt_token_ids: tuple[int, ...]
    reasoning: str = ""
    """The reasoning before the text, of a reply to messages by a model that marks it; no part of `text`."""
    lossy: str = ""
    """The settings that make replies differ from the model's own (see `Plan.lossy`); empty for none."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The calls in the reply, of tools that the prompt offers; no part of `text`."""
    stop_text: str = ""
    """The stop text that the reply ended before; empty where it ended otherwise."""
    reasoning_tokens: int = 0
    """How many of `token_ids` are the reasoning's."""

    @classmethod
    def from_chunks(cls, chunks: Sequence[Chunk], prompt_token_ids: Sequence[int], lossy: str = "") -> Completion:
        """The reply that consists of `chunks`, at least one."""
        reported = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
        return cls(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=chunks[-1].finish_reason or "cancelled",
            logprobs=tuple(item for items in reported for item in items) if reported else None,
            timings=chunks[-1].timings,
            prompt_token_ids=tuple(prompt_token_ids),
            reasoning="".join(chunk.reasoning for chunk in chunks),
            lossy=lossy,
            tool_calls=tuple(call for chunk in chunks for call in chunk.tool_calls),
            stop_text=chunks[-1].stop_text,
            reasoning_tokens=sum(len(chunk.token_ids) for chunk in chunks if chunk.reasons),
        )


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed reply. Only the last one has a `finish_reason`; `timings` are those so far."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[TokenLogprob, ...] | None
    timings: Timings
    reasoning: str = ""
    """A piece of the reasoning; `text` is what the user is told."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The calls in the reply, all of them in the last chunk."""
    stop_text: str = ""
    """Of the last chunk: the stop text that the reply ended before; empty where it ended otherwise."""
    reasons: bool = False
    """Whether `token_ids` are the reasoning's, as those of its markers are."""


@dataclass(frozen=True)
class Progress:
    """The progress of loading or of comparing experts: a stage ("weights", "experts" or "affinity"), and its bytes."""

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
    computed_by_cpu: int = 0
    """Those of the misses that the CPU computed beside a device, so that they were not loaded."""
    bytes_hit: int = 0
    bytes_demanded: int = 0
    bytes_prefetched_used: int = 0
    bytes_prefetched_late: int = 0
    bytes_prefetched_wasted: int = 0
    bytes_filled: int = 0
    """Bytes that filled the cache at the start, counted once they are requested or evicted."""
    link_wait_seconds: float = 0.0
    requests: int = 0
    tokens_prompt: int = 0
    tokens_generated: int = 0
    seconds: float = 0.0
    """Time in steps."""
    steps: int = 0
    """Steps, each a pass over the model for all running requests."""
    batch: int = 0
    """Maximum number of sequences decoded together: the setting, or the best value found so far."""
    batch_reason: str = ""
    """Why `batch` has its value."""
    preemptions: int = 0
    """Requests whose keys and values were dropped for lack of memory, and computed again."""
    prefix_tokens: int = 0
    """Prompt tokens whose keys and values were reused from another request."""
    device_passes: str = ""
    """How passes of few tokens run on a device: "graphs" that are replayed, or why not. Empty on a CPU."""
    speculation: str = ""
    """The drafter, or why there is none."""
    speculation_setting: str = ""
    """The draft length of the sequence drafted for last, on trial or found best, or why it gets no drafts."""
    speculation_changes: int = 0
    """Changes of that setting, of all sequences."""
    utility: float = 0.0
    """Recent tokens per cycle over the cycle's time in plain steps, at that setting: above 1, drafting pays.

    0 without a controller: the drafter was given by name, or there is none.
    """
    cycles: int = 0
    """Verifications of at least one drafted token, each of one sequence."""
    drafted: int = 0
    """Tokens drafted for them."""
    accepted: int = 0
    """Drafted tokens that became part of a reply."""
    drafted_by: Mapping[str, int] = field(default_factory=dict)
    """`drafted` by the drafter that proposed the token: "ngram", "mtp", "self" or "model"."""
    accepted_by: Mapping[str, int] = field(default_factory=dict)
    """`accepted` likewise."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    """Time of the steps with at least one verification."""
    budget_choices: int = 0
    """Experts chosen by the tokens of verifications under a budget, counted per token and layer."""
    budget_dropped: int = 0
    """Those that the budget dropped."""
    forecast_recall: float = 0.0
    """Share of the experts missing at the start of a draft that were predicted before their request, from 0 to 1."""
    forecast_precision: float = 0.0
    """Share of the predicted missing experts that were requested, from 0 to 1."""
    forecast_bytes_useful: int = 0
    """Bytes prefetched by the forecast that had arrived when the verification requested them."""
    forecast_bytes_late: int = 0
    """Bytes that were still on the link then."""
    forecast_bytes_wasted: int = 0
    """Bytes that the verification did not request, even if a later pass did."""
    lookahead_recall: float = 0.0
    """As the five figures of the forecast, for the lookahead from each layer to the next."""
    lookahead_precision: float = 0.0
    lookahead_bytes_useful: int = 0
    lookahead_bytes_late: int = 0
    lookahead_bytes_wasted: int = 0

    @property
    def tokens_per_cycle(self) -> float:
        """Mean tokens per verification of a draft: the accepted ones and one more; 0 without verifications."""
        return (self.accepted + self.cycles) / max(1, self.cycles)

    @property
    def hit_rate(self) -> float:
        """Share of the requested experts that were resident, from 0 to 1."""
        return hit_rate(self.hits, self.misses)

    @property
    def bytes_loaded(self) -> int:
        """Expert bytes that crossed the link, except those whose use is still open."""
        prefetched = self.bytes_prefetched_used + self.bytes_prefetched_late + self.bytes_prefetched_wasted
        return self.bytes_demanded + prefetched + self.bytes_filled

    def to_dict(self) -> dict[str, Any]:
        """The totals and the rates as a JSON object."""
        rates = {"hit_rate": self.hit_rate, "tokens_per_cycle": self.tokens_per_cycle}
        return dict(vars(self)) | rates | {"bytes_loaded": self.bytes_loaded}


def chat_completion(completion: Completion, model: str) -> dict[str, Any]:
    """A finished reply as an OpenAI `chat.completion` object."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": _message(completion),
                "finish_reason": chat_finish_reason(completion.finish_reason, completion.tool_calls),
                "logprobs": chat_logprobs(completion.logprobs),
            }
        ],
        "usage": usage(completion.timings),
    } | named_lossy(completion)


class ChatChunks:
    """Makes the chunks of one reply OpenAI `chat.completion.chunk` objects."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._begun = False

    def of(self, chunk: Chunk) -> dict[str, Any]:
        """The object of `chunk`: the first one has the role, the last one `finish_reason` and `usage`."""
        delta: dict[str, Any] = {} if self._begun else {"role": "assistant"}
        delta |= {"content": chunk.text} if chunk.text or not self._begun else {}
        delta |= {"reasoning_content": chunk.reasoning} if chunk.reasoning else {}
        calls = [{"index": index, **call} for index, call in enumerate(chat_tool_calls(chunk.tool_calls))]
        delta |= {"tool_calls": calls} if calls else {}
        self._begun = True
        choice = {
            "index": 0,
            "delta": delta,
            "finish_reason": chat_finish_reason(chunk.finish_reason, chunk.tool_calls),
            "logprobs": chat_logprobs(chunk.logprobs),
        }
        last = {} if chunk.finish_reason is None else {"usage": usage(chunk.timings)}
        return self._head | {"choices": [choice]} | last


def usage(timings: Timings) -> dict[str, int]:
    """Tokens of one request as OpenAI's `usage`."""
    prompt, generated = timings.prompt_tokens, timings.generated_tokens
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def named_lossy(completion: Completion) -> dict[str, Any]:
    """What a result says of the settings that make it differ from the model's own reply: nothing where none do."""
    return {"lossy": completion.lossy} if completion.lossy else {}


def _message(completion: Completion) -> dict[str, Any]:
    calls = chat_tool_calls(completion.tool_calls)
    message: dict[str, Any] = {"role": "assistant", "content": completion.text or (None if calls else "")}
    message |= {"reasoning_content": completion.reasoning} if completion.reasoning else {}
    return message | ({"tool_calls": calls} if calls else {})


def chat_finish_reason(finish_reason: str | None, tool_calls: Sequence[ToolCall]) -> str | None:
    """A reply's finish reason as that of an OpenAI chat choice: "tool_calls" where it ended with calls."""
    return "tool_calls" if tool_calls and finish_reason == "stop" else finish_reason


def chat_tool_calls(tool_calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls as the `tool_calls` of an OpenAI message. Those of a streamed chunk have an `index` as well."""
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in tool_calls
    ]


def chat_logprobs(logprobs: tuple[TokenLogprob, ...] | None) -> dict[str, Any] | None:
    """Log-probabilities as the `logprobs` of an OpenAI chat choice; None without any."""
    if logprobs is None:
        return None

    def entry(token: str, logprob: float) -> dict[str, Any]:
        # The text of a token that is part of a character is a replacement character, which has other bytes.
        whole = "\N{REPLACEMENT CHARACTER}" not in token
        logprob = max(logprob, LOWEST_LOGPROB)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode()) if whole else None}

    return {
        "content": [
            entry(item.token, item.logprob) | {"top_logprobs": [entry(token, value) for _, token, value in item.top]}
            for item in logprobs
        ]
    }
