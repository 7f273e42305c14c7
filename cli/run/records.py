"""The shape of results: OpenAI's batch output, one record for each line of the input."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgemoe.cli.run.requests import BadLine, RequestLine

if TYPE_CHECKING:
    from edgemoe import Completion

Record = dict[str, Any]
RECORD_START = b'{"id": "batch_req_'
"""What every line of results begins with."""


def line_of(record: Record) -> bytes:
    """A record as one line."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def success(
    record_id: str, request: RequestLine, answers: Sequence[Completion], *, model: str, has_tokenizer: bool
) -> Record:
    """The record of a finished request, a choice for each answer. Without a tokenizer, a choice has token ids."""
    if request.one_call:
        answers = [replace(answer, tool_calls=answer.tool_calls[:1]) for answer in answers]
    body = _chat_completion(answers, model) if request.is_chat else _text_completion(answers, model, has_tokenizer)
    response = {"status_code": 200, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
    return {"id": record_id, "custom_id": request.custom_id, "response": response, "error": None}


def failure(record_id: str, bad: BadLine) -> Record:
    """The record of a line that could not be served."""
    error = {"code": bad.code, "message": bad.message}
    return {"id": record_id, "custom_id": bad.custom_id, "response": None, "error": error}


def _chat_completion(answers: Sequence[Completion], model: str) -> Record:
    from edgemoe.results import chat_completion

    bodies = [chat_completion(answer, model) for answer in answers]
    choices = [{**body["choices"][0], "index": index} for index, body in enumerate(bodies)]
    return {**bodies[0], "choices": choices, "usage": _usage(answers)}


def _text_completion(answers: Sequence[Completion], model: str, has_tokenizer: bool) -> Record:
    """Finished completions in the shape of OpenAI's text_completion object."""
    from edgemoe.results import named_lossy
    from edgemoe.server.protocols.openai_completions import text_choice

    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [text_choice(index, answer, has_tokenizer=has_tokenizer) for index, answer in enumerate(answers)],
        "usage": _usage(answers),
    } | named_lossy(answers[0])


def _usage(answers: Sequence[Completion]) -> dict[str, int]:
    """What the choices took; they share one prompt."""
    prompt = answers[0].timings.prompt_tokens
    generated = sum(answer.timings.generated_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
