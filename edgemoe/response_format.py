"""The form that a reply must have, in the shape of OpenAI's `response_format`: any text, JSON, or JSON of a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from edgemoe.errors import RequestError
from edgemoe.values import shown

MAX_DEPTH = 64
"""Levels of a schema, or of another JSON value in a request."""
MAX_VALUES = 10_000
"""Values in it, those inside of others included."""
MAX_LENGTH = 256 * 1024
"""Characters of its JSON text, and of a text inside."""
WHITE_SPACE = r"\x20{1,2}|\n[\x20\t]{0,32}"
"""What may stand between the parts of a JSON reply: without a bound a model could write white space for ever."""
PARSER_LIMITS = {
    "max_grammar_size": 100_000,
    "initial_lexer_fuel": 500_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}
"""llguidance's limits on the work for one grammar: at most about two seconds for the slowest schema known."""
TYPES = ("text", "json_object", "json_schema")
_SCHEMA_FIELDS = ("name", "description", "schema", "strict")


def checked_format(value: Any) -> dict[str, Any] | None:
    """A copy of the response format `value`; None for None and for any text.

    Raises RequestError, with the reason, for what has another shape, for a schema that llguidance does not support or
    that is too large, and without llguidance.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping) or value.get("type") not in TYPES:
        kinds = ", ".join(f'"{kind}"' for kind in TYPES)
        raise RequestError(f"response_format must be an object whose type is one of {kinds}, not {shown(value)}")
    checked: dict[str, Any] = checked_json(value, "response_format")
    own = ("type", "json_schema") if checked["type"] == "json_schema" else ("type",)
    _refuse_unknown(checked, own, "response_format")
    if checked["type"] == "text":
        return None
    if checked["type"] == "json_schema":
        _check_schema_fields(checked.get("json_schema"))
    check_schema(schema_of(checked), "response_format")
    return checked


def check_schema(schema: Mapping[str, Any], name: str) -> None:
    """Raises RequestError, which begins with `name`, unless llguidance supports `schema`."""
    fault = _schema_fault(json.dumps(_with_options(schema)))
    if fault:
        raise RequestError(f"{name} has a schema that cannot be followed ({fault}): change the schema")


def schema_of(checked: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of replies in a format that `checked_format` returned."""
    schema = checked["json_schema"]["schema"] if checked["type"] == "json_schema" else {"type": "object"}
    return dict(schema)


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a rule, in llguidance's form of Lark, for JSON that fits `schema`."""
    return f"%json {json.dumps(_with_options(schema))}"


def _with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    options = schema.get("x-guidance", {})
    if isinstance(options, Mapping):
        options = {"whitespace_pattern": WHITE_SPACE, **options}
    return {**schema, "x-guidance": options}


@lru_cache(maxsize=64)
def _schema_fault(schema: str) -> str:
    """Why llguidance does not support a schema, as JSON text; empty where it does."""
    matcher = llguidance().LLMatcher
    try:
        grammar = matcher.grammar_from_json_schema(schema)
    except ValueError as error:
        return one_line(str(error))
    return one_line(matcher.validate_grammar(grammar, limits=parser_limits()))


def parser_limits() -> Any:
    """llguidance's limits for one grammar."""
    return llguidance().LLParserLimits(**PARSER_LIMITS)


def llguidance() -> Any:
    """The package; RequestError where it is not installed."""
    try:
        import llguidance as guidance
    except ImportError as error:
        raise RequestError(f"a reply of a given form needs the package llguidance ({error}): install it") from error
    return guidance


def one_line(text: str) -> str:
    """A message of llguidance as one line."""
    return " ".join(text.replace("<non-verbose/>", "").split())[:400]


def checked_json(value: Any, name: str) -> Any:
    """A deep copy of `value`, of JSON's types alone.

    Raises RequestError, which begins with `name`, for other types, numbers that are not finite, and what exceeds
    MAX_DEPTH, MAX_VALUES or MAX_LENGTH.
    """
    _check_extent(value, name)
    try:
        text = json.dumps(value, allow_nan=False, default=_plain)
        json.dumps(value, ensure_ascii=False, default=_plain).encode()
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name} is not JSON ({error}): give JSON's types alone") from None
    if len(text) > MAX_LENGTH:
        raise RequestError(f"{name} has {len(text)} characters as JSON, more than {MAX_LENGTH}: shorten it")
    return json.loads(text)


def _check_extent(value: Any, name: str) -> None:
    left, count = [(value, 1)], 0
    while left:
        each, depth = left.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"{name} has more than {MAX_DEPTH} levels: flatten it")
        if isinstance(each, str) and len(each) > MAX_LENGTH:
            raise RequestError(f"{name} has a text of {len(each)} characters, more than {MAX_LENGTH}: shorten it")
        inside = list(each.values()) if isinstance(each, Mapping) else each if isinstance(each, (list, tuple)) else ()
        if count + len(left) + len(inside) > MAX_VALUES:
            raise RequestError(f"{name} has more than {MAX_VALUES} values: shorten it")
        if isinstance(each, Mapping) and not all(isinstance(key, str) for key in each):
            raise RequestError(f"{name} is not JSON (a key is no text): give JSON's types alone")
        left += [(item, depth + 1) for item in inside]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"it has a {type(value).__name__}")


def _check_schema_fields(described: Any) -> None:
    where = "json_schema of response_format"
    if not isinstance(described, Mapping) or not isinstance(described.get("schema"), Mapping):
        raise RequestError(f'{where} must be an object with the schema under "schema", not {shown(described)}')
    _refuse_unknown(described, _SCHEMA_FIELDS, where)
    for field, kind in (("name", str), ("description", str), ("strict", bool)):
        if described.get(field) is not None and not isinstance(described[field], kind):
            raise RequestError(f"{field} in the {where} must be a {kind.__name__}, not {shown(described[field])}")


def _refuse_unknown(value: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise RequestError(f"{where} has the unknown field {unknown[0][:60]!r}: known are {', '.join(known)}")
