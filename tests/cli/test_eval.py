"""The command, on tiny checkpoints: what it prints, what it says, what it refuses before it loads."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.support.byte_tokenizer import with_tokenizer
from bench.support.zoo import make
from edgemoe.cli.main import main
from edgemoe.demo import demo_folder
from edgemoe.measure.evaluation import evaluate
from edgemoe.quiet import quiet_transformers
from tests.support.fake_engine import FakeEngine, FakeFactory, FakePlan

TEXT = "One thing is what a model says. Another is what it says when it may not ask all of its experts.\n" * 2
KEYS = {
    "model", "lossy", "against", "tokens", "perplexity", "exact_perplexity", "kl_mean", "kl_99", "agreement", "tasks",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixtral that reads bytes."""
    with quiet_transformers():
        return with_tokenizer(make("mixtral", tmp_path_factory.mktemp("zoo") / "tiny", vocab_size=264))


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    out, _ = capsys.readouterr()
    return dict(json.loads(out))


def test_an_exact_model_has_a_perplexity_and_nothing_is_lossy(
    folder: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "-m", str(folder), "--text", text, "--tokens", "100"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split("  ") for line in out.splitlines()]
    first = {cells[0].strip(): [cell.strip() for cell in cells[1:] if cell.strip()] for cells in lines}
    assert first["what"] == ["how much", "of what"]
    assert first["model"] == [str(folder), "exact: nothing is lossy"]
    assert first["against"] == ["exact", "the same weights with nothing lossy"]
    assert first["text"] == ["100", "tokens predicted"]
    # Random weights: nearly as unsure as among all 264 tokens.
    assert 150 < float(first["perplexity"][0]) < 400
    assert first["KL divergence"] == ["0.00000", "nats a token, mean"]
    assert first["top-1 agreement"][0] == "100.00%"
    assert "task score" not in first


def test_a_budget_as_json(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["eval", "-m", str(folder), "--text", text, "--json", "--budget-rule", "sum"]
    assert main([*asked, "--budget", "1"]) == 0
    quality = shown(capsys)
    assert set(quality) == KEYS
    assert quality["lossy"]
    assert isinstance(quality["kl_mean"], float)
    assert 0 < quality["kl_mean"] < math.inf
    assert main([*asked, "--budget", "8"]) == 0
    assert shown(capsys) == {
        **quality,
        "lossy": str(quality["lossy"]).replace("1 expert a", "8 experts a"),
        "perplexity": quality["exact_perplexity"],
        "kl_mean": 0.0,
        "kl_99": 0.0,
        "agreement": 1.0,
    }


@pytest.mark.parametrize("page", ["command-line.md", "library.md"])
def test_every_key_is_documented(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text("utf-8")
    cells = {
        cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split("|")[1].split(",")
    }
    assert {cell.strip("`") for cell in cells} >= KEYS


def test_texts_from_files_and_from_standard_input(
    folder: Path, text: str, pipe_in: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["eval", "-m", str(folder), "--json"]
    assert main([*asked, "--text", text]) == 0
    one = shown(capsys)
    pipe_in(TEXT.encode())
    assert main([*asked, "--text", "-"]) == 0
    assert shown(capsys) == one
    pipe_in(b"Now something else.")
    assert main([*asked, "--text", text, "--text", "-"]) == 0
    both = shown(capsys)
    # A quarter of the piped text is its prompt, and the first token behind that is not predicted.
    assert both["tokens"] == int(str(one["tokens"])) + len("Now something else.") - len("Now ") - 1


def test_without_a_text_the_built_in_ones_are_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "-m", str(folder), "--json"]) == 0
    assert shown(capsys)["tokens"] == 2048


def test_the_shipped_model_is_asked_its_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--tokens", "50", "--questions", "1", "--json"]) == 0
    quality = shown(capsys)
    assert isinstance(quality["tasks"], list)
    assert [task["task"] for task in quality["tasks"]][:2] == ["repeat", "replace"]
    assert all(set(task) == {"task", "asked", "right", "exact_right"} for task in quality["tasks"])
    assert float(str(quality["perplexity"])) < 1.2
    assert main(["eval", "--tokens", "50", "--questions", "0"]) == 0
    assert "task score" not in capsys.readouterr().out


def test_another_checkpoint_to_compare_with(
    folder: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    with quiet_transformers():
        with_tokenizer(make("mixtral", other, vocab_size=264, seed=5))
    asked = ["eval", "-m", str(folder), "--text", text, "--json"]
    assert main([*asked, "--against", str(other)]) == 0
    quality = shown(capsys)
    assert (quality["model"], quality["against"], quality["lossy"]) == (str(folder), str(other), "")
    assert quality["perplexity"] != quality["exact_perplexity"]
    assert float(str(quality["kl_mean"])) > 0
    # The same weights elsewhere, and a budget that the reference shall not have.
    same = tmp_path / "same"
    shutil.copytree(folder, same)
    assert main([*asked, "--against", str(same), "--budget", "1", "--budget-rule", "sum"]) == 0
    lossy = shown(capsys)
    assert lossy["exact_perplexity"] == quality["perplexity"]
    assert float(str(lossy["kl_mean"])) > 0
    assert main([*asked, "--against", "exact"]) == 0
    assert shown(capsys)["against"] == "exact"


def test_progress_on_a_terminal(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["eval", "-m", str(folder), "--text", text]) == 0
    out, err = capsys.readouterr()
    assert "text, compared" in err
    assert out.startswith("what ")


def test_a_table_on_a_terminal(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["eval", "-m", str(folder), "--text", text]) == 0
    out, _ = capsys.readouterr()
    assert "─" in out
    assert "top-1 agreement" in out


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("--questions -1", 2, "--questions: -1 is below 0; give 0 to ask none"),
        ("--tokens 0", 2, "--tokens: 0 is below 1; give 1 or more"),
        ("--text - --text -", 2, "--text: standard input can be read once"),
        ("--text no/such.txt", 5, "cannot read no/such.txt"),
        ("--against ./nowhere", 3, "./nowhere does not exist: give a checkpoint's folder or a Hugging Face id such as "
         "org/name with --against"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_loaded(
    line: str, code: int, said: str, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *line.split()], engine=factory) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert factory.asked == []


def test_another_vocabulary_is_refused_before_anything_is_loaded(
    folder: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "-m", str(folder), "--against", str(demo_folder())], engine=factory) == 3
    err = capsys.readouterr().err
    assert f"has another vocabulary than {folder}, so that" in err
    assert err.endswith("give a checkpoint with the same tokenizer with --against\n")
    assert factory.asked == []


def test_a_model_without_a_tokenizer_or_a_template(factory: FakeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    factory.engine.has_tokenizer = factory.engine.has_chat_template = False
    assert main(["eval", "-m", "x"], engine=factory) == 3
    said = capsys.readouterr().err
    assert "fake has no tokenizer, so that it cannot read a text" in said
    assert f"with {evaluate.__module__}.{evaluate.__name__}" in said
    factory.engine.has_tokenizer = True
    assert main(["eval", "-m", "x", "--questions", "2"], engine=factory) == 3
    assert "fake has no chat template, so that the tasks cannot be asked" in capsys.readouterr().err
    assert factory.engine.closed


def test_too_little_text(folder: Path, pipe_in: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"")
    assert main(["eval", "-m", str(folder), "--text", "-"]) == 1
    assert "empty" in capsys.readouterr().err
    pipe_in(b"ab")
    assert main(["eval", "-m", str(folder), "--text", "-"]) == 1
    assert "there is nothing to predict" in capsys.readouterr().err


# --- where it is pointed to ----------------------------------------------------------------------

LOSSY = (
    "edgemoe: lossy: checks keep to 8 experts; "
    "'edgemoe eval' with the same options of the model measures what that costs"
)


def lossy_factory() -> FakeFactory:
    return FakeFactory(FakeEngine(plan=FakePlan(lossy="checks keep to 8 experts")))


def test_a_lossy_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Hello\n")
    assert main(["run", str(file), "-m", "x", "--budget", "8"], engine=lossy_factory()) == 0
    assert capsys.readouterr().err.splitlines().count(LOSSY) == 1
    assert main(["run", str(file), "-m", "x"], engine=FakeFactory()) == 0
    assert "lossy" not in capsys.readouterr().err


def test_a_lossy_chat_says_so(pipe_in: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]) -> None:
    for factory, lines in ((lossy_factory(), [LOSSY]), (FakeFactory(), [])):
        pipe_in(b"Hello")
        assert main(["chat", "-m", "x"], engine=factory) == 0
        assert capsys.readouterr().err.splitlines() == lines


def test_the_real_plan_is_what_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Hello\n")
    assert main(["run", str(file), "--budget", "8", "-n", "2"]) == 0
    assert "edgemoe: lossy: verifications of drafts keep to 8" in capsys.readouterr().err
