"""The fields of a request's body: which there are, what each may hold, and what it means for the sampling."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.sampling import Sampling
from edgemoe.values import shown


class FieldError(ValueError):
    """A field is unknown or holds something it may not; the message is one sentence."""


MAX_CHOICES = 128
_SEEDS = 1 << 63
_MAX_SHOWN = 60

_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_WHOLE_NUMBERS = ("top_k", "seed", "max_tokens", "max_completion_tokens")
_SHARED = (
    "n", "stop", "ignore_eos", "skip_special_tokens", "logprobs", "logit_bias", "response_format", *_NUMBERS,
    *_WHOLE_NUMBERS,
)  # fmt: skip
_LABELS = (
    "model", "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "prediction", "verbosity", "store", "service_tier",
)  # fmt: skip
"""Fields that do not bear on the reply, whatever they hold."""

_PLAIN_SHARED: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
}
_PLAIN_COMPLETION: dict[str, tuple[Any, ...]] = {**_PLAIN_SHARED, "echo": (False,), "suffix": ("",)}
_PLAIN_CHAT: dict[str, tuple[Any, ...]] = {
    **_PLAIN_SHARED,
    "modalities": (["text"],),
    "function_call": ("none", "auto"),
    "functions": ([],),
}
"""Fields of OpenAI's that are served only where their value asks for nothing; null always does."""

_CHAT = (
    "messages", "top_logprobs", "chat_template_kwargs", "reasoning_effort", "tools", "tool_choice",
    "parallel_tool_calls", *_SHARED,
)  # fmt: skip
_COMPLETION = ("prompt", "best_of", *_SHARED)
CHAT_FIELDS = (*_CHAT, *_LABELS, *_PLAIN_CHAT)
COMPLETION_FIELDS = (*_COMPLETION, *_LABELS, *_PLAIN_COMPLETION)
_MESSAGE_FIELDS = ("role", "content", "reasoning_content", "name", "refusal")
_FIELDS_OF = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
"""Fields of the messages of one role that templates read."""
_PLAIN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "audio": (), "function_call": (), "tool_calls": ([],), "annotations": ([],),
}  # fmt: skip
"""Fields of the messages that OpenAI's API returns, which come back as the messages of the next request."""


def check(body: Mapping[str, Any], *, chat: bool) -> None:
    """Raise FieldError naming every field that is not known, or one whose value asks for what is not served."""
    body = {name: value for name, value in body.items() if name not in _LABELS}
    if chat:
        check_fields(body, _CHAT, _PLAIN_CHAT)
    else:
        check_fields(body, _COMPLETION, _PLAIN_COMPLETION)


def check_fields(entry: Mapping[str, Any], known: Iterable[str], plain: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise FieldError for a field that is neither in `known` nor in `plain`, or whose value `plain` does not have."""
    refuse_unknown({name: value for name, value in entry.items() if name not in plain}, known)
    for name, values in plain.items():
        value = entry.get(name)
        if value is not None and not any(_equal(value, served) for served in values):
            served = " or ".join(map(json.dumps, (*values, None)))
            raise FieldError(f"{name} is {_shown(value)}, but only {served} is served; leave it out")


def refuse_unknown(entry: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise FieldError naming every field that is not known."""
    unknown = sorted(set(entry) - set(known))
    if unknown:
        noun = "field" if len(unknown) == 1 else "fields"
        raise FieldError(f"unknown {noun} {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def mistyped(name: str, wanted: str, value: Any) -> FieldError:
    """The error of a field whose value is not `wanted`."""
    return FieldError(f"{name} must be {wanted}, not {_shown(value)}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def choices(body: Mapping[str, Any]) -> int:
    """How many replies the body asks for."""
    count = whole("n", body["n"]) if body.get("n") is not None else 1
    if not 1 <= count <= MAX_CHOICES:
        raise FieldError(f"n is {shown(count)}; give 1 to {MAX_CHOICES}")
    if body.get("best_of") is not None and not _equal(body["best_of"], count):
        raise FieldError(f"best_of is {_shown(body['best_of'])}, but only as many as n ({count}) are served")
    return count


def samplings(sampling: Sampling, choices: int) -> list[Sampling]:
    """The sampling of each choice. Where a seed is given, each has one of its own, counted up from it."""
    if sampling.seed is None:
        return [sampling] * choices
    return [replace(sampling, seed=(sampling.seed + choice) % _SEEDS) for choice in range(choices)]


def sampling_changes(body: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """The fields of `Sampling` that the body sets; null sets nothing. Limits on the numbers are Sampling's own."""
    given = {name: value for name, value in body.items() if value is not None}
    changes: dict[str, Any] = {name: number(name, given[name]) for name in _NUMBERS if name in given}
    changes |= {name: whole(name, given[name]) for name in _WHOLE_NUMBERS if name in given}
    if changes.get("top_p") == 0:
        # The most likely token alone, as with the smallest share above 0.
        changes["top_p"] = sys.float_info.min
    if -_SEEDS <= changes.get("seed", 0) < 0:
        # OpenAI's seeds have a sign; -1 is a random one to most local servers.
        changes["seed"] = None if changes["seed"] == -1 else changes["seed"] + _SEEDS
    if "max_completion_tokens" in changes:
        if "max_tokens" in changes:
            raise FieldError("max_tokens and max_completion_tokens are the same thing; give one")
        changes["max_tokens"] = changes.pop("max_completion_tokens")
    if "stop" in given:
        changes["stop"] = _stop(given["stop"])
    changes |= {name: given[name] for name in ("logit_bias", "response_format") if name in given}
    changes |= {name: switch(name, given[name]) for name in ("ignore_eos", "skip_special_tokens") if name in given}
    return changes | (_chat_logprobs(given) if chat else _completion_logprobs(given))


def _chat_logprobs(given: Mapping[str, Any]) -> dict[str, int | None]:
    wanted = switch("logprobs", given["logprobs"]) if "logprobs" in given else None
    if "top_logprobs" in given:
        count = whole("top_logprobs", given["top_logprobs"])
        if count and not wanted:
            raise FieldError("top_logprobs needs logprobs to be true")
        return {"logprobs": count if wanted else None}
    return {} if wanted is None else {"logprobs": 0 if wanted else None}


def _completion_logprobs(given: Mapping[str, Any]) -> dict[str, int | None]:
    return {"logprobs": whole("logprobs", given["logprobs"])} if "logprobs" in given else {}


def template_kwargs(body: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the chat template that the body sets."""
    given = body.get("chat_template_kwargs")
    if given is not None and not isinstance(given, dict):
        raise mistyped("chat_template_kwargs", "an object", given)
    effort = body.get("reasoning_effort")
    return dict(given or {}) | ({} if effort is None else {"reasoning_effort": words("reasoning_effort", effort)})


def tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ChatPrompt` that the body sets for tools. Their shapes are checked where prompts are made."""
    given = {name: body[name] for name in ("tools", "tool_choice") if body.get(name) is not None}
    if given.get("tools", []) == [] and given.get("tool_choice", "auto") in ("auto", "none"):
        return {}
    return _allowed_tools(given)


def has_one_call(body: Mapping[str, Any]) -> bool:
    """Whether a reply may call one tool at most."""
    parallel = body.get("parallel_tool_calls")
    return parallel is not None and not switch("parallel_tool_calls", parallel)


def _allowed_tools(given: dict[str, Any]) -> dict[str, Any]:
    """`given` with those of its tools alone that its choice allows, where that is a list of them."""
    choice, tools = given.get("tool_choice"), given.get("tools")
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return given
    # Responses have it in the object itself.
    allowed = choice.get("allowed_tools", choice)
    listed = allowed.get("tools") if isinstance(allowed, dict) else None
    if not isinstance(listed, list) or not isinstance(tools, list) or allowed.get("mode") not in ("auto", "required"):
        raise FieldError("tool_choice of type allowed_tools needs tools and a mode, auto or required")
    offered = {name for name in map(_tool_name, tools) if isinstance(name, str)}
    names = set()
    for name in map(_tool_name, listed):
        if name is not None and (not isinstance(name, str) or name not in offered):
            raise FieldError(f"tool_choice allows {shown(name)}, which is none of tools")
        names.add(name)
    kept = [tool for tool in tools if isinstance(name := _tool_name(tool), str) and name in names]
    return {"tools": kept, "tool_choice": allowed["mode"]}


def _tool_name(tool: Any) -> Any:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _stop(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (words("stop", value),)
    if not isinstance(value, list):
        raise mistyped("stop", "a text or a list of texts", value)
    return tuple(words("stop", entry) for entry in value)


# --- what to generate from -----------------------------------------------------------------------


def prompt(value: Any) -> str | tuple[int, ...]:
    """A raw prompt: a text, or token ids."""
    if isinstance(value, str):
        return words("prompt", value)
    if isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value):
        return tuple(value)
    raise FieldError("prompt must be one text or one list of token ids; give a line to each prompt")


def messages(value: Any) -> tuple[dict[str, Any], ...]:
    """The messages of a chat. The shape of calls of tools is checked where prompts are made."""
    if not isinstance(value, list) or not value:
        raise mistyped("messages", "a list of at least one message", value)
    return tuple(_message(entry) for entry in value)


def _message(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise mistyped("each of messages", "an object with role and content", value)
    role = value.get("role")
    own = _FIELDS_OF.get(role, ()) if isinstance(role, str) else ()
    plain = {name: values for name, values in _PLAIN_MESSAGE.items() if name not in own}
    check_fields(value, (*_MESSAGE_FIELDS, *own), plain)
    more = {name: value[name] for name in own if value.get(name)}
    for name in ("name", "refusal"):
        if value.get(name) is not None:
            words(name, value[name])
    # What an assistant has refused or called has no content.
    absent = role == "assistant" and value.get("content") is None
    given = value.get("refusal") or "" if absent else value.get("content")
    content = None if absent and "tool_calls" in more else _content(given)
    message = {"role": words("role", role), "content": content, **more}
    reasoning = value.get("reasoning_content")
    return message if reasoning is None else message | {"reasoning_content": words("reasoning_content", reasoning)}


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
        raise mistyped(name, "a text", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FieldError(f"{name} holds half of a character (a lone surrogate)") from None
    return value


def number(name: str, value: Any) -> float:
    """A number, which true and false are not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise mistyped(name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise FieldError(f"{name} is too large") from None


def whole(name: str, value: Any) -> int:
    """A whole number, which true and false are not."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise mistyped(name, "a whole number", value)
    return value


def switch(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise mistyped(name, "true or false", value)
    return value
