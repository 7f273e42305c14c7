"""Checkpoints as GGUF files that llama.cpp makes, in the folder of the measurements."""

from __future__ import annotations

from pathlib import Path

from bench.support.byte_tokenizer import with_tokenizer
from bench.support.checkpoints import wide
from bench.support.llama_cpp_peer.llama_cpp import LlamaCpp


def wide_gguf(peer: LlamaCpp, kind: str, *, small: bool = False) -> Path:
    """The wide checkpoint in `kind`, BF16 or what llama.cpp quantises to. Made once."""
    return gguf_by_peer(peer, wide(small=small), kind)


def gguf_by_peer(peer: LlamaCpp, source: Path, kind: str) -> Path:
    """The checkpoint `source`, in the folder of the measurements, in `kind`. Made once."""
    out = source.with_name(f"{source.name}-{kind}.gguf")
    if out.exists():
        return out
    begun = out.with_suffix(".part")
    if kind == "BF16":
        peer.convert(_with_tokenizer(source), begun, "bf16")
    else:
        peer.quantize(gguf_by_peer(peer, source, "BF16"), begun, kind)
    begun.rename(out)
    return out


def _with_tokenizer(source: Path) -> Path:
    """The same weights with a tokenizer, which llama.cpp's converter needs."""
    folder = source.with_name(f"{source.name}-with-tokenizer")
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        linked = folder / file.name
        if linked.exists():
            continue
        if file.suffix == ".json":
            # What makes the converter take a checkpoint is written into config.json.
            linked.write_bytes(file.read_bytes())
        else:
            linked.symlink_to(file)
    return with_tokenizer(folder, merge=("a", "b"))
