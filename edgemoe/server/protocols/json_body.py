"""The JSON of a request's body, which may be hostile."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from edgemoe.server.protocols.errors import ApiError

MAX_DEPTH = 128
"""How deep arrays and objects may lie in one another; JSON schemas are the deepest of what is usual."""
_TEXT = re.compile(rb'"[^"]*"?')
"""A text without escapes."""
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def read_json_object(raw: bytes) -> dict[str, Any]:
    """The object in `raw`. Raises ApiError for what is no JSON object, for NaN, and for what lies too deep."""
    if not _is_flat(raw):
        raise ApiError(400, f"the body has more than {MAX_DEPTH} levels of arrays and objects: send fewer")
    try:
        found = json.loads(raw, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({str(error)[:120]}): send a JSON object") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body is JSON but no object: begin it with {")
    return found


def _is_flat(raw: bytes) -> bool:
    """Whether `raw` has at most MAX_DEPTH levels; JSON without an end may be said to have more.

    A parser would recurse to find out. All steps here are linear in the body's length.
    """
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return True
    outside = _TEXT.sub(b"", raw.replace(b"\\\\", b"").replace(b'\\"', b""))
    brackets = outside.translate(None, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        if not brackets:
            return True
        # The innermost level goes, and with it all levels that then are innermost beside others.
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return not brackets


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name[:40]} is no number that can be used")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)
