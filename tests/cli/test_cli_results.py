from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_engine import timings

from edgemoe import Completion
from edgemoe.cli.exits import FileTrouble
from edgemoe.cli.requests import BadLine, Request
from edgemoe.cli.results import Results, failure, success
from edgemoe.results import TokenLogprob
from edgemoe.sampling import Sampling

CHAT = Request(custom_id="c", messages=({"role": "user", "content": "Hi"},), sampling=Sampling())
COMPLETION = Request(custom_id="p", prompt="Once", sampling=Sampling())
LOGPROBS = (
    TokenLogprob(5, "Hé", -0.25, ((5, "Hé", -0.25), (6, "Ho", -2.0))),
    TokenLogprob(7, " there", -0.5, ()),
)


def answer(logprobs: tuple[TokenLogprob, ...] | None = None) -> Completion:
    return Completion("Hé there", (5, 7), "stop", logprobs, timings(4, 2), ())


def body(request: Request, given: Completion, *, has_tokenizer: bool = True) -> dict[str, Any]:
    record = success(request, given, model="fake", has_tokenizer=has_tokenizer)
    assert set(record) == {"id", "custom_id", "response", "error"}
    assert (record["custom_id"], record["error"]) == (request.custom_id, None)
    assert record["response"]["status_code"] == 200
    assert record["response"]["request_id"]
    made: dict[str, Any] = record["response"]["body"]
    return made


def test_the_body_of_a_chat() -> None:
    made = body(CHAT, answer())
    assert made.pop("id").startswith("chatcmpl-")
    assert made.pop("created") > 1_700_000_000
    assert made == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hé there"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6},
    }


def test_the_body_of_a_completion() -> None:
    made = body(COMPLETION, answer())
    assert made["object"] == "text_completion"
    assert made["id"].startswith("cmpl-")
    assert made["choices"] == [{"index": 0, "text": "Hé there", "logprobs": None, "finish_reason": "stop"}]


def test_without_a_tokenizer_the_token_ids_are_the_answer() -> None:
    assert body(COMPLETION, answer(), has_tokenizer=False)["choices"][0]["token_ids"] == [5, 7]


def test_logprobs_have_the_shape_of_their_endpoint() -> None:
    first = {"token": "Hé", "logprob": -0.25, "bytes": [72, 195, 169]}
    assert body(CHAT, answer(LOGPROBS))["choices"][0]["logprobs"] == {
        "content": [
            {**first, "top_logprobs": [first, {"token": "Ho", "logprob": -2.0, "bytes": [72, 111]}]},
            {"token": " there", "logprob": -0.5, "bytes": list(b" there"), "top_logprobs": []},
        ]
    }
    assert body(COMPLETION, answer(LOGPROBS))["choices"][0]["logprobs"] == {
        "tokens": ["Hé", " there"],
        "token_logprobs": [-0.25, -0.5],
        "top_logprobs": [{"Hé": -0.25, "Ho": -2.0}, {}],
        "text_offset": [0, 2],
    }


def test_a_failure() -> None:
    record = failure(BadLine("a", "invalid_json", "line 3 is not JSON"))
    assert record.pop("id")
    assert record == {
        "custom_id": "a",
        "response": None,
        "error": {"code": "invalid_json", "message": "line 3 is not JSON"},
    }


def test_records_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    results = Results.open(str(path), overwrite=False)
    results.begin()
    for number, text in enumerate(["é\n", "b"], 1):
        results.write({"custom_id": text})
        assert results.written == number
        assert [json.loads(line)["custom_id"] for line in path.read_text("utf-8").split("\n")[:-1]][-1] == text
    assert path.read_text("utf-8") == '{"custom_id": "é\\n"}\n{"custom_id": "b"}\n'
    results.close()


def test_a_file_with_something_in_it_is_refused_or_replaced_only_at_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    with pytest.raises(FileTrouble, match=r"out.jsonl is not empty; give another file with -o, or --overwrite"):
        Results.open(str(path), overwrite=False)
    results = Results.open(str(path), overwrite=True)
    assert path.read_text() == "old\n"
    results.begin()
    results.write({})
    results.close()
    assert path.read_text() == "{}\n"


def test_an_empty_file_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.touch()
    Results.open(str(path), overwrite=False).close()


def test_what_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble, match="is a directory"):
        Results.open(str(tmp_path), overwrite=False)
    with pytest.raises(FileTrouble, match=r"cannot write .*missing/out: no such file or directory"):
        Results.open(str(tmp_path / "missing" / "out"), overwrite=False)


def test_a_device_may_take_the_results() -> None:
    results = Results.open("/dev/null", overwrite=False)
    results.begin()
    results.write({"a": 1})
    results.close()


def test_a_full_disk_names_what_is_safe() -> None:
    results = Results.open("/dev/full", overwrite=False)
    with pytest.raises(FileTrouble, match=r"cannot write to /dev/full any more: no space left.*; 0 results written"):
        results.write({"a": 1})
    results.close()


def test_a_line_that_fails_half_way_is_taken_back(tmp_path: Path) -> None:
    """A limit on the size of files ends a write in the middle, as a full disk does."""
    path = tmp_path / "out.jsonl"
    code = (
        "import resource, sys; from edgemoe.cli.results import Results\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "results = Results.open(sys.argv[1], overwrite=False)\n"
        "[results.write({'a': 'x' * 30}) for _ in range(9)]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert "any more: file too large; 2 results written so far" in done.stderr
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": "x" * 30}] * 2
    assert path.read_text().endswith("\n")


def test_standard_output(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    for path in (None, "-"):
        results = Results.open(path, overwrite=False)
        results.begin()
        results.write({"é": 1})
        results.close()
    assert capfdbinary.readouterr().out == '{"é": 1}\n{"é": 1}\n'.encode()
