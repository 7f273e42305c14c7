"""The fields of a request's body: which there are, what each may hold, and what it means for the sampling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class FieldError(ValueError):
    """A field is unknown or holds something it may not; the message is one sentence."""


_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_WHOLE_NUMBERS = ("top_k", "seed", "max_tokens", "max_completion_tokens")
_SHARED = ("model", "n", "stream", "stop", "ignore_eos", "logprobs", *_NUMBERS, *_WHOLE_NUMBERS)
CHAT_FIELDS = ("messages", "top_logprobs", *_SHARED)
COMPLETION_FIELDS = ("prompt", *_SHARED)
_MESSAGE_FIELDS = ("role", "content")


def refuse_unknown(entry: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise FieldError naming every field that is not known."""
    unknown = sorted(set(entry) - set(known))
    if unknown:
        noun = "field" if len(unknown) == 1 else "fields"
        raise FieldError(f"unknown {noun} {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def sampling_changes(body: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """The fields of `Sampling` that the body sets; null sets nothing. Limits on the numbers are Sampling's own."""
    given = {name: value for name, value in body.items() if value is not None}
    if given.get("n", 1) != 1 or isinstance(given.get("n"), bool):
        raise FieldError(f"n is {given['n']!r}, but only 1 is served; repeat the line for more answers")
    if given.get("stream", False) is not False:
        raise FieldError("stream must be false in a file of requests")
    changes: dict[str, Any] = {name: number(name, given[name]) for name in _NUMBERS if name in given}
    changes |= {name: whole(name, given[name]) for name in _WHOLE_NUMBERS if name in given}
    if "max_completion_tokens" in changes:
        if "max_tokens" in changes:
            raise FieldError("max_tokens and max_completion_tokens are the same thing; give one")
        changes["max_tokens"] = changes.pop("max_completion_tokens")
    if "stop" in given:
        changes["stop"] = _stop(given["stop"])
    if "ignore_eos" in given:
        changes["ignore_eos"] = switch("ignore_eos", given["ignore_eos"])
    return changes | (_chat_logprobs(given) if chat else _completion_logprobs(given))


def _chat_logprobs(given: Mapping[str, Any]) -> dict[str, int | None]:
    wanted = switch("logprobs", given["logprobs"]) if "logprobs" in given else None
    if "top_logprobs" in given:
        if not wanted:
            raise FieldError("top_logprobs needs logprobs to be true")
        return {"logprobs": whole("top_logprobs", given["top_logprobs"])}
    return {} if wanted is None else {"logprobs": 0 if wanted else None}


def _completion_logprobs(given: Mapping[str, Any]) -> dict[str, int | None]:
    return {"logprobs": whole("logprobs", given["logprobs"])} if "logprobs" in given else {}


def _stop(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (words("stop", value),)
    if not isinstance(value, list):
        raise FieldError("stop must be a text or a list of texts")
    return tuple(words("stop", entry) for entry in value)


# --- what to generate from -----------------------------------------------------------------------


def prompt(value: Any) -> str | tuple[int, ...]:
    """A raw prompt: a text, or token ids."""
    if isinstance(value, str):
        return words("prompt", value)
    if isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value):
        return tuple(value)
    raise FieldError("prompt must be one text or one list of token ids; give a line to each prompt")


def messages(value: Any) -> tuple[dict[str, str], ...]:
    """The messages of a chat."""
    if not isinstance(value, list) or not value:
        raise FieldError("messages must be a list of at least one message")
    return tuple(_message(entry) for entry in value)


def _message(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise FieldError("each of messages must be an object with role and content")
    refuse_unknown(value, _MESSAGE_FIELDS)
    return {"role": words("role", value.get("role")), "content": _content(value.get("content"))}


def _content(value: Any) -> str:
    """A message's text, also where it is given as a list of text parts."""
    if not isinstance(value, list):
        return words("content", value)
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise FieldError("content may hold text parts only")
        parts.append(words("text", part.get("text")))
    return "".join(parts)


# --- values --------------------------------------------------------------------------------------


def words(name: str, value: Any) -> str:
    """A text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise FieldError(f"{name} must be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FieldError(f"{name} holds half of a character (a lone surrogate)") from None
    return value


def number(name: str, value: Any) -> float:
    """A number, which true and false are not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FieldError(f"{name} must be a number")
    try:
        return float(value)
    except OverflowError:
        raise FieldError(f"{name} is too large") from None


def whole(name: str, value: Any) -> int:
    """A whole number, which true and false are not."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldError(f"{name} must be a whole number")
    return value


def switch(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise FieldError(f"{name} must be true or false")
    return value
