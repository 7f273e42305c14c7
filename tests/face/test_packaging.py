"""What is built from the checkout, and the ways in which Python may find the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support import ROOT

RELATIVE = re.compile(r"\]\((?![a-z]+:)([^)#]+)")
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".bench", "build", "__pycache__", "*.egg-info", ".mypy_cache", ".ruff_cache", ".pytest_cache"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution of a copy of the checkout, and the wheel that is built from it."""
    pytest.importorskip("build")
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is older than 77, which the package is built with")
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_COPIED)
    # Without a wheel or sdist named, the wheel is made of the source distribution.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "checkout")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return folder


def names_in_sdist(built: Path) -> set[str]:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.mark.slow
def test_a_source_distribution_has_all_that_the_readme_leads_to(built: Path) -> None:
    names = names_in_sdist(built)
    assert set(RELATIVE.findall((ROOT / "README.md").read_text("utf-8"))) <= names
    wanted = {"constraints.txt", "CHANGELOG.md", ".ci/run", "tests/conftest.py", "bench/__main__.py"}
    assert wanted | {"examples/prompts.jsonl", "docs/library.md", "edgemoe/demo/model/config.json"} <= names
    assert [name for name in names if "__pycache__" in name] == []


@pytest.mark.slow
def test_a_wheel_of_the_source_distribution_has_the_whole_package(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    modules = {
        f"{file.relative_to(ROOT)}" if top == "edgemoe" else f"edgemoe/{file.relative_to(ROOT)}"
        for top in ("edgemoe", "cache", "prefetch", "cli")
        for file in (ROOT / top).rglob("*.py")
    }
    assert modules | {"edgemoe/py.typed", "edgemoe/demo/model/model.safetensors"} <= names
    assert {name.split("/")[0] for name in names} == {"edgemoe", f"edgemoe-{version('edgemoe')}.dist-info"}


@pytest.mark.slow
def test_a_package_index_is_told_no_link_that_leads_nowhere(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        data = Parser().parsestr(wheel.read(f"edgemoe-{version('edgemoe')}.dist-info/METADATA").decode())
    page = str(data.get_payload())
    assert "# edgemoe" in page
    assert "[Architecture]" not in page
    assert RELATIVE.findall(page) == []
    assert data["Description-Content-Type"] == "text/markdown"
    assert "Apache-2.0" in (data["License-Expression"], data["License"])
    assert "Typing :: Typed" in data.get_all("Classifier", [])


@pytest.mark.slow
def test_the_wheel_runs_as_a_module(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    # Isolated: nothing but the standard library and what the wheel holds.
    program = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = ['--version']; " + (
        "runpy.run_module('edgemoe', run_name='__main__', alter_sys=True)"
    )
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, f"edgemoe {version('edgemoe')}", "")


def test_python_that_is_started_in_a_checkout_finds_all_of_the_package() -> None:
    """Without an editable installation, `./edgemoe` goes before the installed package."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import edgemoe.cli.main, edgemoe.prefetch; print(edgemoe)"
    )
    command = [sys.executable, "-I", "-c", f"{WITHOUT_EDITABLE}; {program}"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert str(ROOT / "edgemoe") in ran.stdout


WITHOUT_EDITABLE = (
    "import sys; sys.meta_path[:] = [each for each in sys.meta_path if 'Editable' not in getattr(each, '__name__', '')]"
)


def test_what_hides_the_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "edgemoe").mkdir()
    program = (
        f"import sys; from importlib.util import spec_from_file_location as at, module_from_spec as new; "
        f"sys.path.insert(0, {str(tmp_path)!r}); spec = at('edgemoe.cli', {str(ROOT / 'cli' / '__init__.py')!r}); "
        "spec.loader.exec_module(new(spec))"
    )
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    said = f"an earlier installation of edgemoe has left files behind: remove the folder {tmp_path / 'edgemoe'}"
    assert ran.stderr.splitlines()[-1] == f"ImportError: {said}"


def test_the_command_is_a_module_too(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-m", "edgemoe", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert (ran.returncode, ran.stdout.strip()) == (0, f"edgemoe {version('edgemoe')}")
