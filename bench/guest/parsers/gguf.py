"""GGUF files, up to the point where their weights would be read."""

from __future__ import annotations

from pathlib import Path

from bench.guest.parser import Parser
from bench.support.gguf_files import GgufMaker
from edgemoe import CheckpointError
from edgemoe.checkpoint.checkpoint import open_checkpoint

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_next")


def _samples(folder: Path) -> list[bytes]:
    """The headers alone, with the size that the whole files have."""
    found = []
    for family in FAMILIES:
        path = folder / f"{family}.gguf"
        GgufMaker.of_zoo(family, folder / family).write(path)
        found.append(path.read_bytes())
    return found


def _parse(data: bytes, folder: Path) -> None:
    path = folder / "it.gguf"
    path.write_bytes(data)
    open_checkpoint(path, offline=True)


PARSERS = (Parser("GGUF", _samples, _parse, (CheckpointError,), share=0.05, text=False),)
