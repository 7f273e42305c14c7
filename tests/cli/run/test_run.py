from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgemoe.cli.main import main
from edgemoe.errors import CheckpointError, RequestError
from edgemoe.sampling import Sampling
from tests.support.fake_engine import FakeEngine, FakeFactory, FakePlan, FakeStats

SUMMARY = re.compile(
    r"edgemoe: (\d+) requests?, (\d+) failed, in \d+\.\d\d s\n"
    r"(?:edgemoe: prompt (\d+) tokens at [\d.]+/s, generated (\d+) tokens at [\d.]+/s, (.*)\n"
    r"edgemoe: (batch .*)\n"
    r"edgemoe: (?:speculation|\d+ cycles? of speculation).*\n)?"
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines: list[Any] = [{"prompt": "one"}, {"prompt": "two", "n": 0}, {"messages": [{"role": "user", "content": "3"}]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def outcomes(path: Path) -> list[tuple[str, str]]:
    """Each record's id, and its text or what was wrong."""

    def told(record: dict[str, Any]) -> str:
        if record["error"]:
            return str(record["error"]["message"])
        choice = record["response"]["body"]["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])

    return [(record["custom_id"], told(record)) for record in records(path)]


def test_a_line_a_result_and_a_bad_line_does_not_stop_the_run(
    prompts: Path, out: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(prompts), "-o", str(out), "-m", "x"], engine=factory) == 1
    assert outcomes(out) == [
        ("line-2", "line 2: n is 0; give 1 to 128"),
        ("line-1", "You said one"),
        ("line-3", "You said 3"),
    ]
    assert factory.engine.prompts == ["one", "<user>3"]
    assert factory.engine.closed
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    match = SUMMARY.fullmatch(stderr)
    assert match, stderr
    assert stderr.endswith("edgemoe: speculation off: asked for\n")
    # Prompts of 3 and 7 tokens, two replies of 3 tokens, 3 hits a miss and 1 KiB a token.
    assert match.groups() == (
        "3", "1", "10", "6", "hit rate 75.0%, 2.7 KiB moved for a generated token", "batch 2: as asked for",
    )  # fmt: skip


def test_all_well_is_exit_code_0_and_results_go_to_standard_output(
    tmp_path: Path, factory: FakeFactory, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "p.txt").write_text("Hello\n\nBye\n")
    assert main(["run", str(tmp_path / "p.txt"), "-m", "x"], engine=factory) == 0
    stdout, stderr = capsysbinary.readouterr()
    contents = [
        json.loads(line)["response"]["body"]["choices"][0]["message"]["content"] for line in stdout.splitlines()
    ]
    assert contents == ["You said Hello", "You said Bye"]
    assert stderr.startswith(b"edgemoe: 2 requests, 0 failed")


def test_requests_from_standard_input(out: Path, factory: FakeFactory, pipe_in: Callable[[bytes], None]) -> None:
    pipe_in(b'{"prompt": "a", "id": "first"}\n{"prompt": "b"}\n')
    assert main(["run", "-", "-o", str(out), "-m", "x"], engine=factory) == 0
    assert outcomes(out) == [("first", "You said a"), ("line-2", "You said b")]


def test_what_the_engine_refuses_becomes_an_error_record(prompts: Path, out: Path) -> None:
    engine = FakeEngine(replies={"one": RequestError("the prompt has 900 tokens of 512; give -c 900")})
    assert main(["run", str(prompts), "-o", str(out), "-m", "x"], engine=FakeFactory(engine)) == 1
    assert records(out)[1]["error"] == {
        "code": "invalid_request",
        "message": "the prompt has 900 tokens of 512; give -c 900",
    }
    assert outcomes(out)[2] == ("line-3", "You said 3")


def test_a_fault_ends_the_run_and_keeps_what_was_written(
    prompts: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = CheckpointError("shard 2 of x ends too early; fetch it again")
    engine = FakeEngine(replies={"3": broken}, stats=FakeStats(batch=1))
    assert main(["run", str(prompts), "-o", str(out), "-m", "x"], engine=FakeFactory(engine)) == 3
    assert [custom_id for custom_id, _ in outcomes(out)] == ["line-2", "line-1"]
    summary, _, error = capsys.readouterr().err.partition("edgemoe: error: ")
    assert SUMMARY.fullmatch(summary)
    assert error == f"{broken}\n"
    assert engine.closed


def test_the_command_line_gives_defaults_to_every_kind_of_line(tmp_path: Path, out: Path, factory: FakeFactory) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "max_tokens": 1, "seed": 5}\n')
    assert main(["run", str(path), "-o", str(out), "-m", "x", "-n", "2", "--temp", "0.5"], engine=factory) == 0
    assert factory.engine.samplings == [
        Sampling(max_tokens=2, temperature=0.5), Sampling(max_tokens=1, seed=5, temperature=0.5),
    ]  # fmt: skip
    assert outcomes(out) == [("line-2", "You"), ("line-1", "You said")]
    choices = [record["response"]["body"]["choices"][0] for record in records(out)]
    assert [choice["finish_reason"] for choice in choices] == ["length", "length"]


@pytest.mark.parametrize(
    ("flags", "template", "prompt"),
    [
        ([], True, "<user>Hello"),
        (["--raw"], True, "Hello"),
        ([], False, "Hello"),
        (["-sys", "Be brief."], True, "<system>Be brief.<user>Hello"),
        (["-sys", "Be brief.", "--raw"], True, "Hello"),
    ],
)
def test_plain_text_goes_through_the_chat_template_where_there_is_one(
    tmp_path: Path, out: Path, flags: list[str], template: bool, prompt: str
) -> None:
    (tmp_path / "p.txt").write_text("Hello\n")
    engine = FakeEngine(has_chat_template=template)
    assert main(["run", str(tmp_path / "p.txt"), "-o", str(out), *flags], engine=FakeFactory(engine)) == 0
    assert engine.prompts == [prompt]


def test_a_chat_line_without_a_template_is_that_lines_error(prompts: Path, out: Path) -> None:
    assert main(["run", str(prompts), "-o", str(out)], engine=FakeFactory(FakeEngine(has_chat_template=False))) == 1
    assert outcomes(out)[1] == ("line-3", "fake has no chat template; give a raw prompt")


def test_logprobs_of_the_command_line(prompts: Path, out: Path, factory: FakeFactory) -> None:
    main(["run", str(prompts), "-o", str(out), "--logprobs", "1"], engine=factory)
    _, completion, chat = records(out)
    logprobs = completion["response"]["body"]["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["You", " said", " one"]
    assert logprobs["top_logprobs"][1] == {" said0": 0.0}
    assert len(chat["response"]["body"]["choices"][0]["logprobs"]["content"]) == 3


@pytest.mark.parametrize("trouble", ["no input", "no output", "not empty", "itself", "not text"])
def test_file_trouble_is_told_before_a_model_is_loaded(
    trouble: str, tmp_path: Path, prompts: Path, out: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, flags = str(prompts), str(out), []
    if trouble == "no input":
        source = str(tmp_path / "missing")
    elif trouble == "no output":
        target = str(tmp_path / "missing" / "out")
    elif trouble == "not empty":
        out.write_text("old")
    elif trouble == "itself":
        target, flags = source, ["--overwrite"]
    else:
        prompts.write_bytes(b"\xff")
    before = prompts.read_bytes()
    assert main(["run", source, "-o", target, *flags], engine=factory) == 5
    assert factory.asked == []
    assert prompts.read_bytes() == before
    assert capsys.readouterr().err.startswith("edgemoe: error: ")


def test_a_failed_start_leaves_the_old_results(prompts: Path, out: Path) -> None:
    out.write_text("old\n")
    broken = FakeFactory(error=CheckpointError("no config.json"))
    assert main(["run", str(prompts), "-o", str(out), "--overwrite"], engine=broken) == 3
    assert out.read_text() == "old\n"


def test_a_disk_that_fills_ends_the_run(
    prompts: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(prompts), "-o", "/dev/full", "-m", "x"], engine=factory) == 5
    assert factory.engine.prompts == []
    assert "no space left on device; 0 results written so far" in capsys.readouterr().err


def test_what_standard_error_says_of_the_model(prompts: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(plan=FakePlan(simulation="simulation: a link of 2 GB/s"))
    main(["run", str(prompts), "-o", str(out)], engine=FakeFactory(engine))
    first, second, summary = capsys.readouterr().err.split("\n", 2)
    assert (
        first
        == "edgemoe: no model given, so the small demo model that ships with edgemoe is used (choose another with -m)"
    )
    assert second == "edgemoe: simulation: a link of 2 GB/s"
    assert SUMMARY.fullmatch(summary)


def test_verbose_shows_the_plan_and_a_line_a_request(
    prompts: Path, out: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["run", str(prompts), "-o", str(out), "-m", "x", "-v"], engine=factory)
    assert capsys.readouterr().err.splitlines()[:-5] == [
        "experts        1.0 GiB  memory",
        "dense weights  96 MiB   memory, always resident",
        "edgemoe: line-2: failed: line 2: n is 0; give 1 to 128",
        "edgemoe: line-1: prompt 3 tokens at 10.0/s, generated 3 tokens at 4.0/s, hit rate 75.0%, 1.0 KiB a token",
        "edgemoe: line-3: prompt 7 tokens at 10.0/s, generated 3 tokens at 4.0/s, hit rate 75.0%, 1.0 KiB a token",
    ]


def test_what_was_drafted_is_told_of_each_request_and_of_the_run(
    prompts: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory = FakeFactory(FakeEngine(drafts=True))
    main(["run", str(prompts), "-o", str(out), "-m", "x", "-v", "--speculate", "ngram"], engine=factory)
    lines = capsys.readouterr().err.splitlines()
    assert [line.endswith(", 3 of 9 drafted tokens accepted") for line in lines[3:5]] == [True, True]
    assert lines[-2:] == [
        "edgemoe: 6 steps, each 512 B demanded, 256 B prefetched in time, 192 B late, 64 B in vain, link wait 1.00 ms",
        "edgemoe: 6 cycles of speculation, each 3.00 tokens drafted, 1.00 accepted, 2.00 generated, "
        "draft 2.00 ms, verify 10.0 ms",
    ]
    assert factory.asked == [{"model": "x", "speculate": "ngram"}]
    assert SUMMARY.fullmatch("\n".join([*lines[5:8], lines[-1], ""]))


def test_an_empty_file_is_a_run_of_nothing(
    tmp_path: Path, out: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").touch()
    assert main(["run", str(tmp_path / "empty"), "-o", str(out), "-m", "x"], engine=factory) == 0
    assert re.match(r"edgemoe: 0 requests, 0 failed, in 0\.\d\d s", capsys.readouterr().err)
    assert out.read_text() == ""


def test_choices_are_gathered_into_one_record(
    tmp_path: Path, out: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    chat = {"messages": [{"role": "user", "content": "a"}], "n": 2}
    path.write_text(json.dumps({"prompt": "a b c", "n": 3, "seed": 5}) + "\n" + json.dumps(chat) + "\n")
    assert main(["run", str(path), "-o", str(out), "-m", "x", "-v"], engine=factory) == 0
    completion, reply = (record["response"]["body"] for record in records(out))
    assert [choice["index"] for choice in completion["choices"]] == [0, 1, 2]
    assert {choice["text"] for choice in completion["choices"]} == {"You said a b c"}
    assert completion["usage"] == {"prompt_tokens": 5, "completion_tokens": 15, "total_tokens": 20}
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["You said a"] * 2
    assert [sampling.seed for sampling in factory.engine.samplings] == [5, 6, 7, None, None]
    assert "edgemoe: line-1: 3 choices, generated 15 tokens\n" in capsys.readouterr().err


def test_one_choice_that_is_refused_refuses_the_request(tmp_path: Path, out: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "n": 2}\n')
    engine = FakeEngine(replies={"a": RequestError("too long")})
    assert main(["run", str(tmp_path / "p.jsonl"), "-o", str(out), "-m", "x"], engine=FakeFactory(engine)) == 1
    assert outcomes(out) == [("line-1", "too long")]


def test_an_id_that_is_given_twice_is_an_error_under_an_id_of_its_own(
    tmp_path: Path, out: Path, factory: FakeFactory
) -> None:
    path = tmp_path / "p.jsonl"
    ids = ["a", "line-5", "a", None, None, "line-3"]
    path.write_text("".join(json.dumps({"prompt": "p", "custom_id": each}) + "\n" for each in ids))
    assert main(["run", str(path), "-o", str(out), "-m", "x", "--order", "input"], engine=factory) == 1
    said = "You said p"
    assert outcomes(out) == [
        ("a", said),
        ("line-5", said),
        ("line-3", "line 3: custom_id 'a' is that of line 1; give each line its own"),
        ("line-4", said),
        ("line-5-2", said),
        ("line-6", "line 6: custom_id 'line-3' is that of line 3; give each line its own"),
    ]
    assert records(out)[2]["error"]["code"] == "duplicate_custom_id"


def test_the_engines_of_a_ray_cluster_stand_in_for_one(
    prompts: Path, out: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class RayEngines:
        @classmethod
        def load(cls, address: str, model: str | None = None, **settings: Any) -> FakeEngine:
            del settings["on_progress"]
            asked.append((address, model, settings))
            return engine

    module = types.ModuleType("edgemoe.cluster.engines")
    module.RayEngines = RayEngines  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "edgemoe.cluster.engines", module)
    flags = ["--ray", "head:6379", "-m", "x", "--batch", "8", "-c", "99"]
    assert main(["run", str(prompts), "-o", str(out), *flags]) == 1
    assert asked == [("head:6379", "x", {"batch": 8, "context": 99})]
    assert len(records(out)) == 3
    assert engine.closed
