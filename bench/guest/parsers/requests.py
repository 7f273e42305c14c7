"""The parsers of requests: lines of a run, what an earlier run has written, settings, prompts and conversations.

Each takes bytes and either returns or raises an EdgeMoEError; anything else is a fault.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from bench.guest.parser import Parser
from edgemoe.checkpoint.chat_template import ChatPrompt
from edgemoe.checkpoint.prompts.conversation import check_messages, check_variables
from edgemoe.checkpoint.prompts.token_ids import check_token_ids, read_token_ids
from edgemoe.checkpoint.tokenizer import as_chat, check_prompt, prompt_tokens
from edgemoe.cli.run.finished import read_finished
from edgemoe.cli.run.ledger import Ledger
from edgemoe.cli.run.records import failure, line_of
from edgemoe.cli.run.requests import BadLine, RequestReader
from edgemoe.cli.run.source import Source
from edgemoe.config import EngineConfig, chosen_config
from edgemoe.errors import EdgeMoEError, RequestError
from edgemoe.sampling import Sampling, given_sampling, read_pair

VOCABULARY, CONTEXT = 1000, 512


class Bytes:
    """A tokenizer with a token for every byte."""

    def get_vocab(self) -> dict[str, int]:
        """One character a token."""
        return {chr(number): number for number in range(256)}

    def encode(self, text: str) -> list[int]:
        """The bytes of `text` as UTF-8. Raises UnicodeEncodeError for a lone surrogate."""
        return list(text.encode())


def value_of(data: bytes) -> Any:
    """A value of JSON, with what JSON has no way to say: "bytes:", "set:" and "half:" before a text stand for these."""
    try:
        text = data.decode("utf-8", "surrogateescape")
        return _python(json.loads(text))
    except (ValueError, RecursionError):
        return text


def _python(value: Any) -> Any:
    if isinstance(value, list):
        return [_python(each) for each in value]
    if isinstance(value, dict):
        return {name: _python(each) for name, each in value.items()}
    if isinstance(value, str):
        kind, _, rest = value.partition(":")
        if kind == "bytes":
            return rest.encode(errors="replace")
        if kind == "set":
            return set(rest)
        if kind == "half":
            return rest + "\ud800"
    return value


def run_lines(data: bytes) -> None:
    """An input of `edgemoe run`; every line becomes a request, or the record of an error."""
    for jsonl in (True, False):
        with closing(Source("input", io.BytesIO(data))) as source:  # type: ignore[arg-type]
            for entry in RequestReader(Sampling()).read(source.lines(), jsonl=jsonl):
                if isinstance(entry.request, BadLine):
                    json.loads(line_of(failure("batch_req_1", entry.request)))
                else:
                    entry.request.samplings()
                    _ask(entry.request.asked)


def run_results(data: bytes) -> None:
    """The results of an earlier run that is to be resumed."""
    with tempfile.TemporaryDirectory(prefix="edgemoe-fuzz-") as folder, closing(Ledger()) as ledger:
        path = Path(folder) / "results.jsonl"
        path.write_bytes(data)
        read_finished(str(path), ledger)


def sampling(data: bytes) -> None:
    """The settings of a request."""
    value = value_of(data)
    if isinstance(value, dict):
        known = {name: each for name, each in value.items() if name in Sampling.__dataclass_fields__}
        made = Sampling(**known)
        check_token_ids(made.logit_bias or (), VOCABULARY, "logit_bias has the")
    else:
        given_sampling(value)


def settings(data: bytes) -> None:
    """The settings of an engine."""
    value = value_of(data)
    if isinstance(value, dict):
        chosen_config(None, {name: each for name, each in value.items() if name in EngineConfig.__dataclass_fields__})
    else:
        chosen_config(value, {})


def prompt(data: bytes) -> None:
    """A prompt: a text, token ids, messages, or one of many with its settings."""
    value = value_of(data)
    try:
        _ask(value)
    except RequestError:
        _ask(read_pair(value)[0])


def conversation(data: bytes) -> None:
    """Messages, and variables of a template."""
    value = value_of(data)
    check_variables(value.get("template_kwargs", {}) if isinstance(value, dict) else {})
    check_messages(value.get("messages") if isinstance(value, dict) else value)


def _ask(asked: Any) -> None:
    chat = as_chat(asked)
    if chat is not None:
        check_messages(chat.messages)
        check_variables(chat.template_kwargs)
    elif not isinstance(asked, ChatPrompt):
        check_prompt(prompt_tokens(Bytes(), asked, "model", CONTEXT), VOCABULARY)
        if not isinstance(asked, str):
            read_token_ids(asked)


_ENVELOPE = (
    b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": '
    b'[{"role": "system", "content": "b"}, {"role": "user", "content": [{"type": "text", "text": "c"}]}], "n": 2, '
    b'"temperature": 0.5, "logit_bias": {"5": -1.5}, "stop": ["x"], "max_completion_tokens": 5, "logprobs": true, '
    b'"top_logprobs": 3, "chat_template_kwargs": {"enable_thinking": false}, "response_format": {"type": "text"}}}\n'
)
_SAMPLES: Mapping[str, tuple[bytes, ...]] = {
    "run-lines": (
        _ENVELOPE,
        b'{"prompt": "a", "max_tokens": 5, "seed": 1, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "id": 5}\n\n'
        b'{"prompt": [1, 2, 3], "logprobs": 2, "ignore_eos": true, "best_of": 1}\r\n',
        b'{"prompt": [1, 2, 999], "max_tokens": 5}\n',
        b"a line of text\nand one more\n",
        b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}',
    ),
    "run-results": (
        b'{"id": "batch_req_1", "custom_id": "a", "response": null, "error": {"code": "x", "message": "y"}}\n'
        b'{"id": "batch_req_2", "custom_id": "b", "response": {"status_code": 200}, "error": null}\n{"id": "batch_r',
    ),
    "sampling": (
        b'{"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 5, '
        b'"presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"5": 1.5, "7": -100}, "stop": ["a", "b"], '
        b'"max_tokens": 9, "logprobs": 3, "ignore_eos": true, "skip_special_tokens": false}',
        b'{"stop": "half:a", "logit_bias": {"1": "bytes:x"}, "top_k": "set:ab"}',
    ),
    "settings": (
        b'{"threads": 2, "device": "cpu", "dtype": "auto", "expert_cache": "40%", "context": 512, "batch": 4, '
        b'"link_gbps": 1.5, "offline": true, "speculate": "off", "budget": 8, "kv_share": 0.5, "state_folder": "none"}',
    ),
    "prompt": (
        b'"a text"',
        b"[1, 2, 999]",
        b"[[1, 2], null]",
        b'["a text", {"temperature": 0}]',
        b'[{"role": "user", "content": "half:a"}]',
        b'"bytes:x"',
    ),
    "conversation": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": '
        b'"c"}], "template_kwargs": {"enable_thinking": false, "more": [{"a": [1]}]}}',
        b'[{"role": "user", "content": "a"}]',
    ),
}
"""Inputs of each parser; some have lines that it refuses."""


def _parser(read: Callable[[bytes], None]) -> Parser:
    name = read.__name__.replace("_", "-")
    return Parser(
        name,
        lambda folder: list(_SAMPLES[name]),
        lambda data, folder: read(data),
        (EdgeMoEError,),
        share=0.2,
        sound=False,
    )


PARSERS = tuple(map(_parser, (run_lines, run_results, sampling, settings, prompt, conversation)))
"""The parsers of this module."""
