"""`newcomer`: the README's commands, literally, in a fresh environment and on machines that lack something."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measurement import CHECKOUT, BaseSize, Measurement

NAME = "newcomer"
BAR = "the README's commands work in each environment"
ANSWER = "48 + 31 = 79"
"""What the README shows for its question."""
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".bench", "__pycache__", ".whl*", ".card", "*.egg-info", "results.jsonl"
)
PYTORCHS_INDEX = re.compile(r" --index-url https://download\.pytorch\.org/\S+")


@dataclass(frozen=True)
class Environment:
    """A machine that lacks something: variables to set or (None) to unset, and how the commands are run."""

    name: str
    variables: Mapping[str, str | None]
    shell: str = ""
    """What is done with the streams of a command."""
    read_only: bool = False
    """Whether the checkout and the environment's packages are mounted read-only."""


ENVIRONMENTS = (
    Environment("as it is", {}),
    Environment("read-only installation", {}, read_only=True),
    Environment("no home", {"HOME": None, "XDG_CACHE_HOME": None, "XDG_STATE_HOME": None}),
    Environment("a home that is not there", {"HOME": "/dev/null/home"}),
    Environment("LANG=C", {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    Environment("closed stderr", {}, shell="2>&-"),
)


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The environments, and whether one is made by the README's commands; else the one that this runs in is used."""

    installs: bool = True
    environments: tuple[Environment, ...] = ENVIRONMENTS


FULL, SMALL = Size(), Size(small=True, installs=False, environments=ENVIRONMENTS[4:5])


def run(size: Size = FULL) -> Measurement:
    """The commands of installing once, those of running in each environment."""
    found: dict[str, str] = {}
    detail: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="edgemoe-newcomer-") as folder:
        checkout = Path(folder) / "edgemoe"
        shutil.copytree(CHECKOUT, checkout, ignore=NOT_COPIED)
        programs = Path(sys.executable).parent
        if size.installs:
            detail["installing"] = said = _install(checkout)
            programs = checkout / ".venv" / "bin"
            found |= {"installing": said} if said else {}
        for environment in size.environments if not found else ():
            said = _tried(environment, checkout, programs)
            print(f"{environment.name:28}{'WRONG ' + said if said else 'works'}", flush=True)
            found |= {environment.name: said} if said else {}
    return Measurement(
        NAME, {"environments": len(size.environments), "wrong": sorted(found)}, BAR, not found, detail | found
    )


def _blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (CHECKOUT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def _install(checkout: Path) -> str:
    """The README's first block of commands; where PyTorch's own index is out of reach, the usual one serves."""
    commands = _blocks("sh")[0]
    done = _shell(commands, checkout, {})
    if done.returncode and PYTORCHS_INDEX.search(commands):
        print("PyTorch's own index is out of reach: its package comes from the usual one", flush=True)
        shutil.rmtree(checkout / ".venv", ignore_errors=True)
        done = _shell(PYTORCHS_INDEX.sub("", commands), checkout, {})
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-800:]


def _tried(environment: Environment, checkout: Path, programs: Path) -> str:
    """Runs the README's first console block in a folder of its own, and compares what it answers."""
    work = Path(tempfile.mkdtemp(dir=checkout.parent))
    (work / "examples").symlink_to(checkout / "examples")
    variables = dict(environment.variables) | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    for command in re.findall(r"^\$ (.*)$", _blocks("console")[0], re.MULTILINE):
        if environment.shell and command.startswith("edgemoe"):
            command = f"{command} {environment.shell}"
        locked = [checkout, programs.parent] if environment.read_only else []
        done = _shell(command, work, variables, locked)
        if done.returncode or "Traceback" in done.stderr:
            return f"{command}: exit {done.returncode}: {(done.stdout + done.stderr)[-500:]}"
        if "chat" in command and done.stdout.strip() != ANSWER:
            return f"{command}: {done.stdout!r}"
    lines = (work / "results.jsonl").read_text().splitlines()
    asked = (checkout / "examples" / "prompts.jsonl").read_text().splitlines()
    return "" if len(lines) == len(asked) else f"{len(lines)} results for {len(asked)} requests"


def _shell(
    commands: str, folder: Path, variables: Mapping[str, str | None], locked: Sequence[Path] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs commands of a shell; the folders `locked` are mounted read-only for them alone, which takes root."""
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    environment |= {name: value for name, value in variables.items() if value is not None}
    lock = "".join(f"mount --bind {path} {path} && mount -o remount,ro,bind {path} && " for path in locked)
    command = ["bash", "-ec", f"{lock}cd {folder} && {{\n{commands}\n}}"]
    if locked:
        command = ["unshare", "--mount", *command]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
