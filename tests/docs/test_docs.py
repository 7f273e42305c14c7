"""The documentation is true: its options exist, its links lead somewhere, its blocks run."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

from edgemoe.cli.arguments import Parser
from edgemoe.cli.main import build_parser
from edgemoe.cli.options.parser import WITHOUT_OPTION

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
COMMAND_LINE = ROOT / "docs" / "command-line.md"
LONGEST_COMMAND = 300
"""Seconds; what a busy machine may take for one."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def tables(text: str) -> Iterator[list[str]]:
    """The cells of every row of every table, without backquotes around a whole cell."""
    for line in text.splitlines():
        if line.startswith("|") and not set(line) <= set("|-: "):
            yield [cell.strip() for cell in line.strip().strip("|").split("|")]


def listed(page: Path) -> set[str]:
    """The first cells of a page's tables."""
    return {row[0].strip("`") for row in tables(page.read_text("utf-8"))}


# --- options -------------------------------------------------------------------------------------


class Option(NamedTuple):
    """An option of one command: its names and its environment variable."""

    command: str
    names: frozenset[str]
    variable: str


def commands() -> dict[str, Parser]:
    actions = build_parser()._actions
    return next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction))


def options_of_parsers() -> set[Option]:
    found = set()
    for command, parser in commands().items():
        variables = {variable.option: variable.name for variable in parser._variables}
        for action in parser._actions:
            if action.option_strings and action.dest != "help":
                found.add(Option(command, frozenset(action.option_strings), variables[action.dest]))
    return found


def options_of_page() -> set[Option]:
    found = set()
    for names, variable, where, *_ in (row for row in tables(COMMAND_LINE.read_text("utf-8")) if len(row) == 4):
        if names.startswith("`-"):
            for command in where.split(", "):
                found.add(Option(command, frozenset(re.findall(r"`(-[^`]+)`", names)), variable.strip("`")))
    return found


def test_every_option_is_documented_and_no_other() -> None:
    assert options_of_page() == options_of_parsers()


def test_every_command_is_documented() -> None:
    text = COMMAND_LINE.read_text("utf-8")
    assert set(re.findall(r"^## `edgemoe (\w+)`$", text, re.MULTILINE)) == set(commands())
    assert {cell.split()[1].strip("`") for cell in listed(COMMAND_LINE) if cell.startswith("edgemoe ")} == set(
        commands()
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_an_unknown_option(page: Path) -> None:
    known = {name for option in options_of_parsers() for name in option.names} | {"-h", "--help", "--version"}
    text = page.read_text("utf-8")
    lines = [line for line in text.splitlines() if "edgemoe " in line or page == COMMAND_LINE]
    if page != COMMAND_LINE:
        called = rf"edgemoe ({'|'.join(commands())})"
        lines = [line[line.index("edgemoe ") :] for line in lines if re.search(called, line)]
    named = set(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)(?![\w-])", "\n".join(lines)))
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_an_unknown_variable(page: Path) -> None:
    known = {option.variable for option in options_of_parsers()} | set(WITHOUT_OPTION)
    assert set(re.findall(r"EDGEMOE_[A-Z_]+", page.read_text("utf-8"))) <= known


def test_every_exit_code_is_documented() -> None:
    from edgemoe.cli.exits import Exit

    assert {str(int(code)) for code in Exit} == {word for word in listed(COMMAND_LINE) if word.isdecimal()}


def test_every_slash_command_is_documented() -> None:
    from edgemoe.cli.chat.slash import COMMANDS

    shown = {name.split()[0] for cell in listed(COMMAND_LINE) for name in cell.replace("`", "").split(", ") if name}
    assert {name for name in shown if name.startswith("/")} == {name for entry in COMMANDS for name in entry.names}


def test_every_field_of_a_request_is_documented() -> None:
    from edgemoe.server.protocols.fields import CHAT_FIELDS, COMPLETION_FIELDS

    words = {name.strip("` ") for cell in listed(COMMAND_LINE) for name in cell.split(",")}
    assert set(CHAT_FIELDS) | set(COMPLETION_FIELDS) <= words


def test_the_shown_error_of_a_request_names_the_fields_that_are_known() -> None:
    from edgemoe.server.protocols.fields import FieldError, check

    with pytest.raises(FieldError) as caught:
        check({"prompt": "", "max_token": 8}, chat=False)
    assert str(caught.value) in COMMAND_LINE.read_text("utf-8")


def test_every_key_of_the_plan_is_documented() -> None:
    from edgemoe import Plan

    words = {name.strip("` ") for cell in listed(COMMAND_LINE) for name in cell.split(",")}
    assert {entry.name for entry in fields(Plan)} - {"kv"} | {"total_nbytes", "simulation"} <= words


# --- the library, the modules, the measurements, the model ---------------------------------------


def test_every_setting_and_field_of_the_library_is_documented() -> None:
    from edgemoe import Completion, Sampling, Stats, Timings

    page = ROOT / "docs" / "library.md"
    words = {name.strip("` ") for cell in listed(page) for name in cell.split(",")}
    assert {entry.name for kind in (Sampling, Completion, Stats, Timings) for entry in fields(kind)} <= words


def test_every_package_is_in_the_architecture() -> None:
    folders = [
        folder for top in ("edgemoe", "cache", "prefetch", "cli") for folder in (ROOT / top, *(ROOT / top).iterdir())
    ]
    packages = {f"{folder.relative_to(ROOT)}/" for folder in folders if (folder / "__init__.py").exists()}
    assert packages <= listed(ROOT / "docs" / "architecture.md")


def test_every_measurement_is_documented() -> None:
    from bench.__main__ import NAMES

    assert set(NAMES) <= listed(ROOT / "docs" / "measurements.md")


def test_every_task_is_documented_with_its_nature() -> None:
    from edgemoe.demo.tasks import TASKS

    rows = [row for row in tables((ROOT / "docs" / "model.md").read_text("utf-8")) if len(row) == 7]
    assert [(row[0].strip("`"), row[1]) for row in rows[1:]] == [(task.name, task.nature) for task in TASKS]


def test_the_changelog_has_this_version() -> None:
    from edgemoe import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


# --- links ---------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that a renderer makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", without_blocks(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(linked), target


# --- what runs -----------------------------------------------------------------------------------


class Transcript(NamedTuple):
    """A command of a console block, the lines that are typed into it, and the last line it shows."""

    page: str
    command: str
    typed: tuple[str, ...]
    last: str


def transcripts() -> Iterator[Transcript]:
    for page in [*DOCS, ROOT / "README.md"]:
        for block in blocks(page, "console"):
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, *output = part.splitlines()
                typed = tuple(line[4:] for line in output if line.startswith(">>> "))
                if re.search(r"(^|\| )(edgemoe|python examples/)", command):
                    yield Transcript(page.name, command, typed, output[-1] if output else "")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the examples in it, and an environment in which `edgemoe` is the installed one."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for name in [name for name in os.environ if name.startswith("EDGEMOE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shown", list(transcripts()), ids=lambda shown: f"{shown.page}: {shown.command[:60]}")
def test_every_command_runs(shown: Transcript, checkout: Path) -> None:
    done = run(shown, checkout)
    assert done.returncode == 0, done.stderr
    if shown.command.endswith("$?"):  # a page that shows an exit code shows the right one
        assert done.stdout.splitlines()[-1] == shown.last, done.stderr


def run(shown: Transcript, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a shell; what is typed into it comes from a terminal, as a chat wants it."""
    if not shown.typed:
        return _shell(shown.command, folder, subprocess.DEVNULL)
    import pty

    keyboard, terminal = pty.openpty()
    try:
        # The last byte is Ctrl-D.
        os.write(keyboard, "".join(f"{line}\n" for line in shown.typed).encode() + b"\x04")
        return _shell(shown.command, folder, terminal)
    finally:
        os.close(keyboard)
        os.close(terminal)


def _shell(command: str, folder: Path, stdin: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, shell=True, cwd=folder, stdin=stdin, capture_output=True, text=True, timeout=LONGEST_COMMAND
    )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_every_python_block_runs(page: Path, checkout: Path) -> None:
    """The blocks of a page share their names, as a reader who follows it does."""
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
