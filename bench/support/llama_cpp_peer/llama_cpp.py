"""llama.cpp as a peer: its converter, its quantiser and its logits, each in a process of its own.

A process that dies is a `PeerError`, and not the end of the measurement.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.measurement import CHECKOUT

SOURCE = "EDGEMOE_LLAMA_CPP"
"""The environment variable that names the folder of llama.cpp's source."""
VERSION = "0.3.36"
INSTALL = (
    f"llama.cpp is missing: `pip install llama-cpp-python=={VERSION}`, fetch its source with `pip download "
    f"--no-binary llama-cpp-python --no-deps llama-cpp-python=={VERSION}`, unpack it, and name its folder in {SOURCE}"
)
CONVERTER = "convert_hf_to_gguf.py"
FOLDERS = ("", "vendor/llama.cpp")
"""Where the converter may be in the named folder: in llama.cpp's own source, and in that of llama-cpp-python."""
PACKAGE = "bench.support.llama_cpp_peer"
TIMEOUT = 1200.0
"""Seconds for one call."""


class PeerError(Exception):
    """llama.cpp refused something, or died of it."""


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's source and its built library."""

    source: Path
    library: Path

    def convert(self, checkpoint: Path, out: Path, kind: str = "f32") -> Path:
        """`checkpoint` as a GGUF file of float32, or of `bf16`. Raises PeerError."""
        _run("llama_cpp_converter", self.source, checkpoint, out, kind)
        return out

    def quantize(self, file: Path, out: Path, kind: str) -> Path:
        """`file` in another type, one of `llama_cpp_library.TYPES`; F32 writes its values. Raises PeerError."""
        _run("llama_cpp_library", "quantize", self.library, file, out, kind)
        return out

    def features(self) -> str:
        """The instructions that the library was built for, as it names them. Raises PeerError."""
        return _run("llama_cpp_library", "features", self.library).strip()

    def server(self, file: Path, threads: int, length: int) -> list[str]:
        """A module and its arguments: what `serving` runs, which answers lines as `llama_cpp_library.serve` says.

        With "mapped" behind them the weights stay in the file's memory map.
        """
        return [f"{PACKAGE}.llama_cpp_library", "serve", str(self.library), str(file), str(threads), str(length)]

    @contextmanager
    def serving(self, file: Path, threads: int, length: int) -> Iterator[LlamaCppSession]:
        """A process with `file` in memory and room for `length` tokens. Raises PeerError."""
        with subprocess.Popen(
            [sys.executable, "-m", *self.server(file, threads, length)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=_environment(),
        ) as process:  # fmt: skip
            try:
                yield LlamaCppSession(process)
            finally:
                process.kill()

    def logits(self, file: Path, tokens: Sequence[int]) -> torch.Tensor:
        """The logits after each of `tokens`, float32 [tokens, vocabulary]. Raises PeerError."""
        with tempfile.TemporaryDirectory(prefix="edgemoe-logits-") as folder:
            out = Path(folder) / "logits.npy"
            _run("llama_cpp_library", "logits", self.library, file, out, json.dumps(list(tokens)))
            return torch.from_numpy(np.load(out))


class LlamaCppSession:
    """One sequence in a process of llama.cpp."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Waits until the model is loaded. Raises PeerError."""
        self._process = process
        self._answer()

    def append(self, tokens: Sequence[int]) -> float:
        """Appends `tokens`; the seconds until the logits of the last one were there. Raises PeerError."""
        return self._ask(list(tokens))

    def clear(self) -> None:
        """Forgets the sequence. Raises PeerError."""
        self._ask(None)

    def _ask(self, question: list[int] | None) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(f"llama.cpp ended with {self._process.wait()}") from error
        return self._answer()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"llama.cpp ended with {self._process.wait()}")
        return float(line)


def llama_cpp() -> LlamaCpp | None:
    """llama.cpp's source and library; None where one of them is missing."""
    named = os.environ.get(SOURCE)
    source = next((folder for folder in _sources(named) if (folder / CONVERTER).exists()), None)
    if source is None:
        return None
    library = next((path for path in _libraries(source) if path.exists()), None)
    return None if library is None else LlamaCpp(source, library)


def _sources(named: str | None) -> list[Path]:
    return [] if not named else [Path(named).resolve() / each for each in FOLDERS]


def _libraries(source: Path) -> Iterator[Path]:
    """Where the library may be: built in the source, or in the installed package."""
    yield source / "build" / "bin" / "libllama.so"
    found = importlib.util.find_spec("llama_cpp")
    if found is not None:
        for folder in found.submodule_search_locations or ():
            yield from (Path(folder) / "lib" / f"libllama.{end}" for end in ("so", "dylib"))


def _run(module: str, *arguments: str | Path) -> str:
    """What it prints."""
    try:
        done = subprocess.run(
            _command(module, *arguments), capture_output=True, text=True, errors="replace", timeout=TIMEOUT,
            env=_environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{module} took more than {TIMEOUT:.0f} seconds") from error
    if done.returncode:
        raise PeerError(f"{module} ended with {done.returncode}: {_reason(done.stderr)}")
    return done.stdout


def _command(module: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", f"{PACKAGE}.{module}", *(str(each) for each in arguments)]


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path}


def _reason(log: str) -> str:
    """The lines of a log that name an error, else its last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower() or "GGML_ASSERT" in line]
    return " | ".join((told or lines)[-2:])[-400:]
