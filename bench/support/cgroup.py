"""A control group with a hard memory limit for a child process: hierarchy v1 or v2, as root."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """Used as a context manager; `available` says whether this process may make one."""

    def __init__(self, name: str, limit: int) -> None:
        version_1 = (ROOT / "memory").is_dir()
        self._folder = (ROOT / "memory" if version_1 else ROOT) / name
        self._limit_file = "memory.limit_in_bytes" if version_1 else "memory.max"
        self._limit = limit

    @staticmethod
    def available() -> bool:
        """Whether control groups with a limit can be made here, which takes root and a writable hierarchy."""
        try:
            with MemoryGroup(f"edgemoe-probe-{os.getpid()}", 1 << 30):
                return True
        except OSError:
            return False

    def __enter__(self) -> MemoryGroup:
        self._folder.mkdir(exist_ok=True)
        (self._folder / self._limit_file).write_text(str(self._limit))
        return self

    def __exit__(self, *unused: object) -> None:
        with suppress(OSError):
            self._folder.rmdir()

    def run(self, arguments: Sequence[str], folder: Path, input: str = "") -> subprocess.CompletedProcess[str]:
        """Runs this Python in `folder` with `arguments`, a module first, inside the group; its captured output."""
        entry = f"import os,sys,runpy; open({str(self._folder / 'cgroup.procs')!r},'w').write(str(os.getpid()))"
        program = f"{entry}; sys.argv = {list(arguments)!r}; runpy.run_module(sys.argv[0], run_name='__main__')"
        return subprocess.run(
            [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False, input=input
        )
