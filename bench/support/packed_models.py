"""The shipped model and its widened form in packed formats, made once in the folder of the measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from bench.measurement import work_folder
from bench.support.checkpoints import inflated
from bench.support.gguf_files import GgufMaker
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.checkpoint.packed import packing


def packed(source: Path, experts: str) -> Path:
    """The checkpoint `source` with quantised experts, as `edgemoe pack` writes it."""
    out = work_folder() / f"{source.name}-{experts}"
    packing.pack(open_blueprint(source, experts=experts), out)
    return out


def gguf_of(source: Path, name: str, experts: str, dense: str, **own: str) -> dict[str, Any]:
    """A GGUF file of a Qwen3-MoE checkpoint, and how an engine is loaded with it.

    `experts` and `dense` are types of ggml, as are those in `own`, by a part of the tensors' names.
    """
    # Files that llama.cpp makes have the other names, and a tokenizer.
    path = work_folder() / f"{source.name}-{name}-without-tokenizer.gguf"
    if not path.exists():
        maker = GgufMaker(source)
        names = [(tensor, kind) for tensor in maker.names() for part, kind in own.items() if part in tensor]
        kinds = {tensor: GGMLQuantizationType[kind] for tensor, kind in names}
        begun = path.with_suffix(".part")
        maker.write(begun, GGMLQuantizationType[experts], GGMLQuantizationType[dense], kinds)
        begun.rename(path)
    return {"model": path, "model_config": source}


def inflated_variants(factor: int) -> dict[str, dict[str, Any]]:
    """The widened shipped model as it is, in 8 bits and in 4, by the names of the formats."""
    source = inflated(factor)
    return {
        "bf16": {"model": source},
        "Q8_0": gguf_of(source, "Q8_0", "Q8_0", "Q8_0"),
        "int4": {"model": packed(source, "int4")},
    }
