"""The one place where edgemoe's defaults live."""

from __future__ import annotations

import os
from dataclasses import dataclass

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is built. Every default of the library and of the command line is read from here."""

    device: str = "auto"
    """"auto" (the first CUDA device, else the CPU), "cpu", "cuda" or "cuda:N"."""
    dtype: str = "auto"
    """"auto" (as the checkpoint stores its weights), "bfloat16", "float16" or "float32"."""
    expert_cache: str | int = "auto"
    """"auto" (all the memory that is left), bytes ("6GiB"), a share of the experts ("40%"), or slots (an int)."""
    context: int | None = None
    """Longest sequence, prompt and reply, in tokens; None takes the model's, at most `default_context`."""
    threads: int | None = None
    """Compute threads; None takes the cores that this process may use."""
    offline: bool = False
    """Never reach for the network."""
    link_gbps: float | None = None
    """Simulates a link of so many GB/s (1e9 bytes); None measures the real one."""

    state_folder: str | os.PathLike[str] | None = None
    """Where small files about each checkpoint are kept: None is the user's cache folder, "none" keeps nothing."""

    batch: str | int = "auto"
    """Sequences that are decoded together at most: "auto" (as many as make more tokens a second), or a number."""

    speculate: str = "auto"
    """What drafts: "auto" or "auto+self" (what pays), "off", or what always does: "ngram", "self", "model",
    "ngram+self" or "ngram+model"."""
    draft_model: str | os.PathLike[str] | None = None
    """A second, smaller checkpoint with the same tokenizer, for the drafter "model"."""
    draft_nodes: int = 16
    """Most drafted tokens of a sequence that one pass verifies."""
    draft_depth: int = 8
    """Most drafted tokens that follow one another."""
    draft_shape: str = "tree"
    """"tree", or "chain" for no branches."""
    draft_rule: str = "auto"
    """What a self-draft does with an expert that is not resident: "reselect", "affinity" or "fewer"; "auto" is the
    best of them, as measured."""
    prefetch: str = "auto"
    """Loading experts before they are asked for: "auto" (while it pays) or "off"."""

    budget: str | int = "off"
    """Lossy. What a verification may use: "off", experts of each layer (8), a share of the routing mass ("95%"), or
    bytes of a pass ("64MiB")."""
    budget_rule: str = "residency"
    """Which experts those are, and what counts: "sum", "path" or "residency" (see `prefetch.budget.RULES`)."""
    budget_dropped: str = "substitute"
    """What becomes of a choice outside: "substitute" (the token chooses again inside) or "truncate"."""

    default_context: int = 8192
    default_max_tokens: int = 1024
    """Length of a reply, in tokens, where neither the request nor the checkpoint says; the context bounds it too."""
    max_batch: int = 256
    """Most sequences that "auto" decodes together."""
    kv_share: float = 0.1
    """Share of the free memory that keys and values of several sequences may take, where one takes less."""
    patience: int = 256
    """Requests that may be taken before one that came earlier, so that those with the same beginning run together."""
    prefill_workspace: int = 128 * MIB
    """Bytes that a prefill chunk's activations may take; decides how many tokens a chunk has."""
    prefill_chunk: int = 2048
    """Most tokens of a prefill chunk."""
    file_reads: str = "auto"
    """How the checkpoint's files are read: "direct" past the page cache, "cached" through it, "auto" as memory says."""
    reader_threads: int = 8
    """Reads in flight from the checkpoint's files."""
    reserve: int = 256 * MIB
    """Bytes of the device's memory that the plan never touches."""
    reserve_share: float = 0.05
    """Share of the free memory that the plan leaves to others, where that is more than `reserve`."""
    pinned_share: float = 0.75
    """Share of the free RAM that may be page-locked for a CUDA device."""
    staging_records: int = 8
    """Page-locked buffers, each one record, through which records go that are not page-locked themselves."""
