"""`newcomer`: the README's commands, literally, in a fresh environment and on machines that lack something.

And those of all the documentation, the ways to install and start the package, and the two waits that come first.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measurement import CHECKOUT, BaseSize, Measurement

NAME = "newcomer"
BAR = "the commands work in each environment; first token <= 8 s, a wrong path <= 1 s"
MAX_FIRST_TOKEN, MAX_WRONG_PATH = 8.0, 1.0
"""Seconds."""
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
    rounds: int = 5
    """Of each command that is timed."""
    pages: tuple[str, ...] = ("README.md", "docs")


FULL, SMALL = Size(), Size(small=True, installs=False, environments=ENVIRONMENTS[4:5], rounds=1, pages=())


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
        commands = list(_documented(checkout, size.pages)) if not found else []
        for page, command in commands:
            said = _succeeds(command, checkout, programs)
            print(f"{page}: {command[:70]}{' WRONG ' + said if said else ''}", flush=True)
            found |= {f"{page}: {command}": said} if said else {}
        if size.installs and not found:
            said = _installed_otherwise(checkout)
            found |= {"a plain installation, then an editable one": said} if said else {}
        waits = _waits(checkout, programs, size.rounds)
    value = {"environments": len(size.environments), "commands": len(commands), "wrong": sorted(found)} | waits
    ok = not found and waits["first_token"] <= MAX_FIRST_TOKEN and waits["wrong_path"] <= MAX_WRONG_PATH
    return Measurement(NAME, value, BAR, ok, detail | found)


def _blocks(kind: str, page: Path = CHECKOUT / "README.md") -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def _documented(checkout: Path, pages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each page's commands, where nothing is typed into them: those need a terminal, which the tests give them."""
    for name in pages:
        place = checkout / name
        for page in sorted(place.glob("*.md")) if place.is_dir() else [place]:
            for part in re.split(r"^\$ ", "\n".join(_blocks("console", page)), flags=re.MULTILINE)[1:]:
                command = part.splitlines()[0]
                if re.search(r"(^|\| )(edgemoe|python)\b", command) and ">>> " not in part:
                    yield page.name, command


def _succeeds(command: str, checkout: Path, programs: Path) -> str:
    """Runs a command in a folder of its own with the examples in it; what is wrong, if anything."""
    work = Path(tempfile.mkdtemp(dir=checkout.parent))
    shutil.copytree(checkout / "examples", work / "examples")
    # A page may show what comes after a failure.
    done = _shell(f"set +e\n{command}", work, _found(programs))
    return "" if done.returncode == 0 else f"exit {done.returncode}: {(done.stdout + done.stderr)[-500:]}"


def _found(programs: Path) -> dict[str, str | None]:
    """The variables with which a shell finds the programs of an environment, and nothing kept by another one."""
    state = tempfile.mkdtemp(dir=programs.parent)
    return {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "XDG_CACHE_HOME": state, "PYTHONPATH": None}


def _installed_otherwise(checkout: Path) -> str:
    """Installs the package itself plainly, runs it in the checkout's root, then installs that: both must work."""
    python = ".venv/bin/python"
    chat = '-m edgemoe chat -p "What is 48 + 31?"'
    commands = (
        f"{python} -m pip uninstall -q -y edgemoe\n{python} -m pip install -q --no-deps .\n"
        f'{python} {chat}\n(cd / && "{checkout}/{python}" {chat})\n'
        f'{python} -m pip install -q --no-deps -e .\n(cd / && "{checkout}/{python}" {chat})\n'
    )
    done = _shell(commands, checkout, {})
    said = "" if done.stdout.split("\n")[:-1] == [ANSWER] * 3 else (done.stdout + done.stderr)[-500:]
    print(f"installed otherwise: {said or 'works'}", flush=True)
    return said


def _waits(checkout: Path, programs: Path, rounds: int) -> dict[str, float]:
    """Seconds to the first token of a question, and to the message about a model that is not there; medians.

    Commands ran before, so that kernels are compiled.
    """

    def timed(command: str, code: int) -> float:
        seconds = []
        for _ in range(rounds):
            begun = time.perf_counter()
            done = _shell(command, checkout.parent, variables)
            seconds.append(time.perf_counter() - begun)
            assert done.returncode == code, done.stderr
        return round(statistics.median(seconds), 2)

    variables = _found(programs) | {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME")}
    return {
        "first_token": timed("edgemoe chat -p Hello --max-tokens 1", 0),
        "wrong_path": timed("edgemoe chat -m ./no/such/folder -p Hello", 3),
    }


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
    """Runs commands of a shell, whose standard input is empty.

    The folders `locked` are mounted read-only for them alone, which takes root.
    """
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    environment |= {name: value for name, value in variables.items() if value is not None}
    lock = "".join(f"mount --bind {path} {path} && mount -o remount,ro,bind {path} && " for path in locked)
    command = ["bash", "-ec", f"{lock}cd {folder} && {{\n{commands}\n}}"]
    if locked:
        command = ["unshare", "--mount", *command]
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )
