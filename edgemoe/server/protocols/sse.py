"""Server-sent events: how a reply is streamed over HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

DONE = b"data: [DONE]\n\n"
"""What ends a stream of OpenAI's."""
COMMENT = b": waiting\n\n"
"""An event that every client ignores, and that shows a proxy that the connection lives."""
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    # Without it, nginx would hold events back.
    "x-accel-buffering": "no",
}


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """An event with `data` as JSON, which is one line, and the event's name where it has one."""
    head = f"event: {name}\n" if name is not None else ""
    return b"%sdata: %s\n\n" % (head.encode(), json_text(data))


def json_text(data: Mapping[str, Any]) -> bytes:
    """`data` as JSON in one line. Half of a character, which fields that are sent back may have, is a question mark."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
