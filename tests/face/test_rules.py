"""The rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

MAX_FILE, MAX_FUNCTION = 400, 50
"""Lines."""
PACKAGE = ("edgemoe", "cache", "prefetch", "cli")


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@pytest.mark.parametrize("folder", [*PACKAGE, "bench"])
def test_no_file_is_long(folder: str) -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines()) for file in sources(folder)}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE} == {}


@pytest.mark.parametrize("folder", [*PACKAGE, "bench"])
def test_no_function_is_long(folder: str) -> None:
    long = {
        f"{file.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for file in sources(folder)
        for node in functions(file)
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    }
    assert long == {}


def test_annotations_are_never_evaluated() -> None:
    """Every module with code begins so: types may then be imported for checkers alone."""
    wrong = [
        str(file.relative_to(ROOT))
        for file in sources(*PACKAGE, "bench", "tests", "examples")
        if re.search(r"^(def|class|import|from) ", text := file.read_text("utf-8"), re.MULTILINE)
        and "from __future__ import annotations" not in text
    ]
    assert wrong == []


def test_the_library_neither_prints_nor_reads_the_environment() -> None:
    """Except for the variables that name the user's cache folder, and one of Ray's that is restored.

    What trains the shipped model is a program.
    """
    wrong = []
    for file in sources("edgemoe", "cache", "prefetch"):
        if file.name in ("train.py", "state_folder.py", "ray_cluster.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            named = ast.unparse(node) if isinstance(node, (ast.Call, ast.Attribute)) else ""
            if named.startswith(("print(", "os.getenv(")) or named == "os.environ":
                wrong.append(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} {named[:40]}")
    assert wrong == []


def test_probes_swallow_no_fault_of_the_machine() -> None:
    """A handler of every exception raises, hands the error on, or asks whether device or memory failed."""
    wrong = []
    for file in sources("edgemoe", "cache", "prefetch"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ExceptHandler) and ast.unparse(node.type or ast.Name("Exception")) == "Exception":
                body = "\n".join(ast.unparse(statement) for statement in node.body)
                hands_on = node.name is not None and re.search(rf"= {node.name}\b", body)
                if not hands_on and "raise" not in body and "is_device_or_memory_error" not in body:
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


BACKENDS = ("cuda", "accelerator", "xpu", "hip", "mps")
"""What PyTorch calls the modules of its devices."""


def test_one_module_names_the_backends_of_pytorch() -> None:
    """Another kind of card is then added in one file."""
    wrong = []
    for file in sources(*PACKAGE):
        if file == ROOT / "cache" / "accelerator.py":
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            named = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Import, ast.ImportFrom)) else ""
            if re.search(rf"\btorch\.({'|'.join(BACKENDS)})\b|^from torch import .*\b({'|'.join(BACKENDS)})\b", named):
                wrong.append(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} {named[:40]}")
    assert wrong == []
