"""Server-sent events: how a reply is streamed over HTTP."""

from __future__ import annotations

import json
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
    return f"{head}data: {json.dumps(data, separators=(',', ':'), ensure_ascii=False)}\n\n".encode("utf-8", "replace")
