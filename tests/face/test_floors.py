"""Imports run one way, floor by floor, and no folder holds more modules than one can survey."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

FLOORS = (
    ("cache",),
    ("prefetch",),
    ("version", "errors", "config", "results", "response_format", "sampling", "sizes", "quiet", "values"),
    ("demo",),
    ("formats",),
    ("kernels",),
    ("checkpoint",),
    ("experts",),
    ("model",),
    ("request",),
    ("plan",),
    ("draft",),
    ("scheduler",),
    (
        "planner",
        "runtime",
        "drafters",
        "worker",
        "stream",
        "engine",
        "found_model",
        "async_engine",
        "model_host",
        "__init__",
    ),
    ("measure",),
    ("cluster",),
    ("server",),
    ("cli", "__main__"),
)
"""From the bottom up: a package or module imports what is on its own floor and below, lazily or for types too."""
MAX_MODULES = 20
TOP_LEVEL = ("cache", "prefetch", "cli")
"""Folders beside `edgemoe/` that are installed inside of it."""
SOURCES = ("edgemoe", "cache", "prefetch", "cli", "bench", "tests", "examples")


def imports(file: Path) -> Iterator[str]:
    """Every module, or name in a module, that `file` imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> dict[str, Path]:
    """Every module of the installed package by its dotted name; a package's is that of its `__init__`."""
    found = {}
    for folder in ("edgemoe", *TOP_LEVEL):
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "edgemoe" else ("edgemoe", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def floor_of(module: str) -> int:
    """The floor of a module of the package; -1 for `edgemoe` itself, which its `__init__` is on."""
    unit = module.split(".")[1] if "." in module else "__init__"
    return next(number for number, floor in enumerate(FLOORS) if unit in floor)


def imported_modules(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that `file` imports, each by its own name."""
    for name in imports(file):
        if name.split(".")[0] == "edgemoe":
            if name in known:
                yield name
            elif (parent := name.rpartition(".")[0]) != "edgemoe":
                yield parent
            # A name of `edgemoe` itself is one of the public ones, which it brings lazily.
            elif file not in (ROOT / "cli").rglob("*.py") and name != "edgemoe.__version__":
                raise AssertionError(f"{file.relative_to(ROOT)} imports {name} from the package's face")


def test_every_module_has_its_floor() -> None:
    units = {name.split(".")[1] for name in modules() if "." in name}
    assert units == {unit for floor in FLOORS for unit in floor} - {"__init__"}


def test_no_module_imports_one_of_a_higher_floor() -> None:
    known = modules()
    wrong = [
        f"{name} imports {other}"
        for name, file in known.items()
        for other in imported_modules(file, known)
        # The package's face names its public types, and says so for type checkers only.
        if name != "edgemoe" and floor_of(other) > floor_of(name)
    ]
    assert wrong == []


def test_no_import_goes_in_a_circle() -> None:
    known = modules()
    arrows = {name: set(imported_modules(file, known)) - {name} for name, file in known.items() if name != "edgemoe"}
    while leaves := [name for name, others in arrows.items() if not others & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert {name: others & arrows.keys() for name, others in arrows.items()} == {}


@pytest.mark.parametrize("source", SOURCES)
def test_no_folder_is_crowded(source: str) -> None:
    folders = {file.parent for file in (ROOT / source).rglob("*.py")}
    counts = {str(folder.relative_to(ROOT)): len({*folder.glob("*.py")}) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_no_module_of_the_package_imports_measurements_or_tests() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, file in modules().items()
        for other in imports(file)
        if other.split(".")[0] in ("bench", "tests")
    ]
    assert wrong == []


def test_cache_and_prefetch_know_no_models() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, file in modules().items()
        if name.split(".")[1:2] in (["cache"], ["prefetch"])
        for other in imports(file)
        if other.split(".")[0] in ("transformers", "tokenizers", "huggingface_hub")
    ]
    assert wrong == []


def test_the_rule_sees_lazy_imports_and_those_for_types(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import os\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from edgemoe.engine import Engine\n"
        "def late():\n    import edgemoe.plan as plan\n    from edgemoe.draft import speculation\n"
    )
    known = modules()
    assert list(imported_modules(file, known)) == ["edgemoe.engine", "edgemoe.plan", "edgemoe.draft.speculation"]
    assert floor_of("edgemoe.cache.slots") < floor_of("edgemoe.engine") < floor_of("edgemoe.cli.run.jobs")
