"""The sampling settings of a request, with the checkpoint's defaults for those that it leaves open."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from edgemoe.errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """The settings of one request. None is the value of the checkpoint's `generation_config`, else the neutral one.

    Raises RequestError, with the name of the setting and its range, for a value out of its range.
    """

    temperature: float | None = None
    """Divides the logits; at least 0, where 0 is greedy."""
    top_k: int | None = None
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float | None = None
    """Keep the most likely tokens that together reach this probability, in (0, 1]."""
    min_p: float | None = None
    """Keep tokens with at least this share of the highest probability, in [0, 1]."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that have occurred less likely; must be above 0."""
    seed: int | None = None
    """The same seed gives the same reply; None draws a random one."""
    stop: tuple[str, ...] = ()
    """Texts that end the reply and are not part of it; a string, or a sequence of strings."""
    max_tokens: int | None = None
    """Maximum number of tokens of the reply, at least 1."""
    logprobs: int | None = None
    """Number of alternatives to report with each token's log-probability, 0 to 20; None reports neither."""
    ignore_eos: bool = False
    """Continue after the end-of-sequence token."""

    def __post_init__(self) -> None:
        try:
            stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        except TypeError:
            raise RequestError(f"stop must be non-empty strings, not {self.stop!r}") from None
        object.__setattr__(self, "stop", stop)
        self._check("temperature", "at least 0", lambda value: value >= 0)
        self._check("top_k", "an integer of at least 0", lambda value: value >= 0, whole=True)
        self._check("top_p", "above 0 and at most 1", lambda value: 0 < value <= 1)
        self._check("min_p", "from 0 to 1", lambda value: 0 <= value <= 1)
        self._check("repetition_penalty", "above 0", lambda value: value > 0)
        self._check("seed", "an integer from 0 to 2^63 - 1", lambda value: 0 <= value < 1 << 63, whole=True)
        self._check("max_tokens", "an integer of at least 1", lambda value: value >= 1, whole=True)
        self._check("logprobs", "an integer from 0 to 20", lambda value: 0 <= value <= 20, whole=True)
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop must be non-empty strings, not {self.stop!r}")

    def _check(self, name: str, range_: str, holds: Any, *, whole: bool = False) -> None:
        value = getattr(self, name)
        if value is None:
            return
        number = not isinstance(value, bool) and isinstance(value, (int, float)) and holds(value)
        if not number or (whole and not float(value).is_integer()):
            raise RequestError(f"{name} must be {range_}, not {value!r}")
        if whole:
            object.__setattr__(self, name, int(value))


@dataclass(frozen=True)
class ResolvedSampling:
    """A request's settings, all with values."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...]
    max_tokens: int
    logprobs: int | None
    eos: frozenset[int]
    """Ids of the tokens that end the reply; empty if they are ignored."""


def resolve(sampling: Sampling, defaults: Any, default_max_tokens: int, room: int) -> ResolvedSampling:
    """`sampling` with its open settings taken from `defaults`, a transformers GenerationConfig.

    `room` is the maximum number of tokens of the reply by the context. As in transformers' `generate`, the defaults'
    temperature counts only if they set `do_sample`.
    """
    drawn = bool(getattr(defaults, "do_sample", False))

    def first(name: str, neutral: Any) -> Any:
        own = getattr(sampling, name)
        if own is not None:
            return own
        kept = getattr(defaults, name, None)
        return neutral if kept is None else kept

    temperature = sampling.temperature
    if temperature is None:
        temperature = (getattr(defaults, "temperature", None) or 1.0) if drawn else 0.0
    eos = getattr(defaults, "eos_token_id", None)
    ends = frozenset([eos] if isinstance(eos, int) else eos or ())
    limit = sampling.max_tokens or getattr(defaults, "max_new_tokens", None) or default_max_tokens
    return ResolvedSampling(
        temperature=float(temperature),
        top_k=int(first("top_k", 0)),
        top_p=float(first("top_p", 1.0)),
        min_p=float(first("min_p", 0.0)),
        repetition_penalty=float(first("repetition_penalty", 1.0)),
        seed=sampling.seed if sampling.seed is not None else int.from_bytes(os.urandom(6), "little"),
        stop=sampling.stop,
        max_tokens=min(int(limit), room),
        logprobs=sampling.logprobs,
        eos=frozenset() if sampling.ignore_eos else ends,
    )
