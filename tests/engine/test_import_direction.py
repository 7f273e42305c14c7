"""Imports run one way: cli → edgemoe → prefetch → cache."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "cache": ("edgemoe.cache",),
    "prefetch": ("edgemoe.prefetch", "edgemoe.cache"),
    "edgemoe": ("edgemoe",),
}
NEVER = ("edgemoe.cli", "bench", "tests")


def imports(file: Path) -> Iterator[str]:
    """Every module that `file` imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_lower_floor_never_imports_a_higher_one(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports(file)
        if within(name, NEVER) or (within(name, ("edgemoe",)) and not within(name, MAY_IMPORT[package]))
    ]
    assert wrong == []


def test_the_cache_knows_no_models() -> None:
    wrong = [
        f"{file.name} imports {name}"
        for folder in ("cache", "prefetch")
        for file in (ROOT / folder).rglob("*.py")
        for name in imports(file)
        if within(name, ("transformers", "tokenizers", "huggingface_hub"))
    ]
    assert wrong == []


def test_the_rule_sees_what_it_is_for(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import os\ndef late():\n    from edgemoe.engine import Engine\n    import edgemoe.plan as plan\n")
    assert list(imports(file)) == ["os", "edgemoe.engine.Engine", "edgemoe.plan"]
    assert not within("edgemoe.cachet", MAY_IMPORT["cache"])
