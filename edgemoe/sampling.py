"""The sampling settings of a request, with the checkpoint's defaults for those that it leaves open."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from edgemoe.errors import RequestError
from edgemoe.response_format import checked_format
from edgemoe.values import check_text, number, shown, whole_number

MIN_TEMPERATURE = 1e-6
"""Lower temperatures are greedy: logits divided by them exceed float32's range."""
MAX_FACTOR = 1e20
"""Largest number that logits are divided or multiplied by: the results stay within float32's range."""
FACTORS = "from 1e-20 to 1e20"
MAX_STOPS = 1024
"""Most stop texts of a request: each is looked for after every token, and other requests wait meanwhile."""
GENERATES_TOP_K = 50
"""What `generate` takes where neither the checkpoint nor the caller says anything."""


@dataclass(frozen=True)
class Sampling:
    """The settings of one request. None is what the checkpoint's `generation_config` says, else what `generate` does.

    Raises RequestError, with the name of the setting and its range, for a value out of its range.
    """

    temperature: float | None = None
    """Divides the logits; from 0, which is greedy, to 1e20."""
    top_k: int | None = None
    """Keep the k most likely tokens; 0 keeps all. Below 2^63."""
    top_p: float | None = None
    """Keep the most likely tokens that together reach this probability, in (0, 1]."""
    min_p: float | None = None
    """Keep tokens with at least this share of the highest probability, in [0, 1]."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that have occurred less likely; from 1e-20 to 1e20."""
    presence_penalty: float | None = None
    """Lowers the score of every token that the reply has already, from -2 to 2 (OpenAI)."""
    frequency_penalty: float | None = None
    """Lowers the score of a token for each time that the reply has it already, from -2 to 2 (OpenAI)."""
    logit_bias: Mapping[int, float] | None = None
    """What is added to the scores of tokens by their ids, from -100 to 100 (OpenAI)."""
    seed: int | None = None
    """The same seed gives the same reply; None draws a random one."""
    stop: tuple[str, ...] = ()
    """Texts that end the reply and are not part of it; a string, or a sequence of strings."""
    max_tokens: int | None = None
    """Maximum number of tokens of the reply, from 1 to 2^63 - 1; the context limits it too."""
    logprobs: int | None = None
    """Number of alternatives to report with each token's log-probability, 0 to 20; None reports neither."""
    ignore_eos: bool = False
    """Continue after the end-of-sequence token."""
    skip_special_tokens: bool = True
    """Leave the texts of special tokens out; else the whole reply is one text, with the marks of its parts."""
    response_format: Mapping[str, Any] | None = None
    """The form of the text: JSON, or JSON of a schema, as OpenAI's `response_format`; None is any text."""

    def __post_init__(self) -> None:
        self._check("temperature", "from 0 to 1e20", lambda value: 0 <= value <= MAX_FACTOR)
        self._check("top_k", "an integer from 0 to 2^63 - 1", _is_counted, whole=True)
        self._check("top_p", "above 0 and at most 1", lambda value: 0 < value <= 1)
        self._check("min_p", "from 0 to 1", lambda value: 0 <= value <= 1)
        self._check("repetition_penalty", FACTORS, lambda value: 1 / MAX_FACTOR <= value <= MAX_FACTOR)
        self._check("presence_penalty", "from -2 to 2", lambda value: -2 <= value <= 2)
        self._check("frequency_penalty", "from -2 to 2", lambda value: -2 <= value <= 2)
        self._check("seed", "an integer from 0 to 2^63 - 1", _is_counted, whole=True)
        self._check("max_tokens", "an integer from 1 to 2^63 - 1", lambda value: 1 <= value < 1 << 63, whole=True)
        self._check("logprobs", "an integer from 0 to 20", lambda value: 0 <= value <= 20, whole=True)
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        object.__setattr__(self, "response_format", checked_format(self.response_format))
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, not {shown(getattr(self, name))}")

    def _check(self, name: str, range_: str, holds: Callable[[float], bool], *, whole: bool = False) -> None:
        given = getattr(self, name)
        if given is None:
            return
        value = whole_number(given) if whole else number(given)
        if value is None or not holds(value):
            raise RequestError(f"{name} must be {range_}, not {shown(given)}")
        object.__setattr__(self, name, value)


def given_sampling(sampling: Any) -> Sampling:
    """`sampling`, or the defaults for None. Raises RequestError for anything that is no `Sampling`."""
    if sampling is not None and not isinstance(sampling, Sampling):
        raise RequestError(f"the settings of a request must be an edgemoe.Sampling or None, not {shown(sampling)}")
    return sampling or Sampling()


def read_pair(asked: Any) -> tuple[Any, Sampling]:
    """The prompt and the settings of one of many requests. Raises RequestError for what is no pair of these."""
    if not isinstance(asked, tuple | list) or len(asked) != 2:
        raise RequestError(f"a request must be a pair of a prompt and an edgemoe.Sampling, not {shown(asked)}")
    return asked[0], given_sampling(asked[1])


def _is_counted(value: float) -> bool:
    return 0 <= value < 1 << 63


def _checked_stop(stop: Any) -> tuple[str, ...]:
    """`stop` as a tuple; RequestError for anything but texts that can occur in a reply."""
    texts = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(texts, Sequence | Set) or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"stop must be non-empty strings, not {shown(stop)}")
    if len(texts) > MAX_STOPS:
        raise RequestError(f"stop must be at most {MAX_STOPS} texts, not {len(texts)}")
    for text in texts:
        check_text(text, "stop")
    return tuple(texts)


def _checked_bias(bias: Any) -> dict[int, float]:
    """`bias` with whole numbers for keys, which JSON has as texts."""
    found = {_token_id(token): number(value) for token, value in bias.items()} if isinstance(bias, Mapping) else {}
    checked = {
        token: value
        for token, value in found.items()
        if token is not None and _is_counted(token) and value is not None and -100 <= value <= 100
    }
    if not isinstance(bias, Mapping) or len(checked) < len(found):
        raise RequestError(f"logit_bias must be numbers from -100 to 100 by token id, not {shown(bias)}")
    return checked


def _token_id(token: Any) -> int | None:
    """A key of `logit_bias`, which may be a text of digits, as a number."""
    if not isinstance(token, str):
        return whole_number(token)
    return int(token) if token.isdecimal() and len(token) < 20 else None


@dataclass(frozen=True)
class ResolvedSampling:
    """A request's settings, all with values."""

    temperature: float
    generation: Any
    """transformers' GenerationConfig for this request: all that bears on the logits."""
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: tuple[str, ...]
    max_tokens: int
    logprobs: int | None
    eos: frozenset[int]
    """Ids of the tokens that end the reply; empty if they are ignored."""
    ignore_eos: bool
    skip_special_tokens: bool
    response_format: Mapping[str, Any] | None = None


def resolve(
    sampling: Sampling, defaults: Any, default_max_tokens: int, room: int, prompt_length: int = 1
) -> ResolvedSampling:
    """`sampling` with its open settings taken from `defaults`, a transformers GenerationConfig.

    `room` is the maximum number of tokens of the reply by the context. As in transformers' `generate`, the defaults'
    temperature counts only if they set `do_sample`.
    """
    generation = copy.deepcopy(defaults)
    temperature = sampling.temperature
    if temperature is None:
        temperature = (1.0 if defaults.temperature is None else defaults.temperature) if defaults.do_sample else 0.0
    max_tokens = min(_max_tokens(sampling, defaults, default_max_tokens, prompt_length), room)
    for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
        own = getattr(sampling, name)
        if own is not None:
            setattr(generation, name, own)
    if generation.top_k is None:
        generation.top_k = GENERATES_TOP_K
    generation.do_sample = temperature >= MIN_TEMPERATURE
    generation.temperature = float(temperature)
    generation.max_length = prompt_length + max_tokens
    if generation.min_new_tokens is not None:
        # As in `generate`, where the two of them disagree.
        generation.min_length = prompt_length + generation.min_new_tokens
    ends = _end_tokens(defaults)
    if sampling.ignore_eos or not ends:
        generation.eos_token_id = generation.exponential_decay_length_penalty = None
    if sampling.logit_bias:
        bias = {(token,): value for token, value in sampling.logit_bias.items()}
        generation.sequence_bias = {**_by_sequence(generation.sequence_bias), **bias}
    return ResolvedSampling(
        temperature=float(temperature),
        generation=generation,
        presence_penalty=sampling.presence_penalty or 0.0,
        frequency_penalty=sampling.frequency_penalty or 0.0,
        seed=sampling.seed if sampling.seed is not None else int.from_bytes(os.urandom(6), "little"),
        stop=(*sampling.stop, *_stop_strings(defaults)),
        max_tokens=max_tokens,
        logprobs=sampling.logprobs,
        eos=frozenset() if sampling.ignore_eos else ends,
        ignore_eos=sampling.ignore_eos,
        skip_special_tokens=sampling.skip_special_tokens,
        response_format=sampling.response_format,
    )


def _max_tokens(sampling: Sampling, defaults: Any, otherwise: int, prompt_length: int) -> int:
    """The longest reply, where a checkpoint may limit the reply, or prompt and reply together."""
    if sampling.max_tokens or defaults.max_new_tokens:
        return int(sampling.max_tokens or defaults.max_new_tokens)
    return max(1, defaults.max_length - prompt_length) if defaults.max_length else otherwise


def _end_tokens(defaults: Any) -> frozenset[int]:
    ends = defaults.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def _stop_strings(defaults: Any) -> tuple[str, ...]:
    stops = defaults.stop_strings
    return (stops,) if isinstance(stops, str) else tuple(stops or ())


def _by_sequence(bias: Any) -> dict[tuple[int, ...], float]:
    """transformers' `sequence_bias`, which JSON has as a list of pairs, by the token ids of its sequences."""
    pairs = bias.items() if isinstance(bias, Mapping) else bias or ()
    return {tuple(sequence): float(value) for sequence, value in pairs}
