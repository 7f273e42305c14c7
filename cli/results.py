"""Results: their shape (OpenAI's), and the file or stream that they are appended to, one line each."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import time
import uuid
from collections.abc import Iterable
from io import FileIO
from typing import TYPE_CHECKING, Any

from edgemoe.cli.exits import FileTrouble, why
from edgemoe.cli.render import counted
from edgemoe.cli.requests import BadLine, Request

if TYPE_CHECKING:
    from edgemoe import Completion
    from edgemoe.results import TokenLogprob

Record = dict[str, Any]
STANDARD_OUTPUT = "-"


# --- the file ------------------------------------------------------------------------------------


class Results:
    """Where results go. `written` counts the whole lines there; a line that fails half-way is taken back."""

    def __init__(self, name: str, file: FileIO | None) -> None:
        """Write to a file opened for unbuffered appending, or to standard output."""
        self.name = name
        self.written = 0
        self._file = file

    @classmethod
    def open(cls, path: str | None, *, overwrite: bool) -> Results:
        """Open without changing what is there. Raises FileTrouble when it cannot be written or is not empty."""
        if path is None or path == STANDARD_OUTPUT:
            return cls("standard output", None)
        try:
            file = FileIO(path, "ab")
            status = os.fstat(file.fileno())
        except OSError as error:
            raise FileTrouble(f"cannot write {path}: {why(error)}; give another file with -o") from error
        if stat.S_ISREG(status.st_mode) and status.st_size and not overwrite:
            file.close()
            raise FileTrouble(f"{path} is not empty; give another file with -o, or --overwrite to replace it")
        return cls(path, file)

    @property
    def on_terminal(self) -> bool:
        """Whether the results scroll by on a terminal."""
        return self._file is None and sys.stdout.isatty()

    def begin(self) -> None:
        """Drop what the file held. To be called once the model is loaded, so that a failed start loses nothing."""
        if self._file is not None:
            self._shorten_to(0)

    def write(self, record: Record) -> None:
        """Append one line. Raises FileTrouble, saying how many results are safe."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        try:
            if self._file is None:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            else:
                self._append(self._file, line)
        except OSError as error:
            raise FileTrouble(
                f"cannot write to {self.name} any more: {why(error)}; {counted(self.written, 'result')} written so far"
            ) from error
        self.written += 1

    def close(self) -> None:
        """Close the file; standard output stays open."""
        if self._file is not None:
            self._file.close()

    def _append(self, file: FileIO, line: bytes) -> None:
        end = os.fstat(file.fileno()).st_size
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            self._shorten_to(end)
            raise

    def _shorten_to(self, length: int) -> None:
        # What is no regular file (a pipe, a device) has no length; there is nothing to take back.
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(length)


# --- the shape -----------------------------------------------------------------------------------


def success(request: Request, answer: Completion, *, model: str, has_tokenizer: bool) -> Record:
    """The record of a finished request. Without a tokenizer, its text is nothing and its token ids are there."""
    if request.messages is None:
        body = _text_completion(answer, model, has_tokenizer)
    else:
        from edgemoe.results import chat_completion

        body = chat_completion(answer, model)
    response = {"status_code": 200, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
    return {"id": _record_id(), "custom_id": request.custom_id, "response": response, "error": None}


def failure(bad: BadLine) -> Record:
    """The record of a line that could not be served."""
    error = {"code": bad.code, "message": bad.message}
    return {"id": _record_id(), "custom_id": bad.custom_id, "response": None, "error": error}


def _record_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def _text_completion(answer: Completion, model: str, has_tokenizer: bool) -> Record:
    """A finished completion in the shape of OpenAI's text_completion object."""
    choice: Record = {"index": 0, "text": answer.text, "finish_reason": answer.finish_reason, "logprobs": None}
    if answer.logprobs is not None:
        choice["logprobs"] = _completion_logprobs(answer.logprobs)
    if not has_tokenizer:
        choice["token_ids"] = list(answer.token_ids)
    prompt, generated = answer.timings.prompt_tokens, answer.timings.generated_tokens
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated},
    }


def _completion_logprobs(entries: Iterable[TokenLogprob]) -> Record:
    shape: Record = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    offset = 0
    for entry in entries:
        shape["tokens"].append(entry.token)
        shape["token_logprobs"].append(entry.logprob)
        shape["top_logprobs"].append({token: logprob for _, token, logprob in entry.top})
        shape["text_offset"].append(offset)
        offset += len(entry.token)
    return shape
