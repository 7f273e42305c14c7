"""The settings of an engine: one definition each, which the library, the cluster and the command line read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from edgemoe.errors import PlanError
from edgemoe.values import number, shown, whole_number

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class SettingInfo:
    """What people are told of a setting, wherever it can be set."""

    help: str
    """What it does, in a few words."""
    group: str
    """Settings that commands take together: "machine", "context", "batch", "state" or "draft"."""
    choices: tuple[str, ...] = ()
    """The words that it may be; empty where it takes other values."""
    metavar: str = "N"
    """A name for its value."""


def _setting(default: Any, help: str, group: str, *, choices: tuple[str, ...] = (), metavar: str = "N") -> Any:
    return field(default=default, metadata={"info": SettingInfo(help, group, choices, metavar)})


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is built. Fields with a `SettingInfo` are its settings; the others are fixed by the library.

    `Engine.load` takes fields by name. A field is defined here and nowhere else. Raises PlanError, with the setting and
    its range, for a value of another type or out of a range that no checkpoint widens.
    """

    threads: int | None = _setting(None, "CPU threads to compute with", "machine")
    """Compute threads; None takes the cores that this process may use."""
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N", "machine", metavar="DEVICE")
    """"auto" (the first CUDA device, else the CPU), "cpu", "cuda" or "cuda:N"."""
    dtype: str = _setting(
        "auto",
        "auto, bfloat16, float16, float32",
        "machine",
        choices=("auto", "bfloat16", "float16", "float32"),
        metavar="DTYPE",
    )
    """"auto" (as the checkpoint stores its weights), "bfloat16", "float16" or "float32"."""
    expert_cache: str | int = _setting(
        "auto",
        "memory for experts on the device: auto, bytes (6GiB), a share of the experts (40%) or slots (96)",
        "machine",
        metavar="SIZE",
    )
    """"auto" (all the memory that is left), bytes ("6GiB"), a share of the experts ("40%"), or slots (an int)."""
    keep_free: str | int = _setting(
        "auto",
        "memory that stays free for other programs on a machine without a CUDA device: while less is free the expert "
        "cache shrinks, and later grows again; auto, off or bytes (2GiB)",
        "machine",
        metavar="SIZE",
    )
    """RAM that is to stay free for other programs where experts are cached in RAM: the cache shrinks while less is
    free, and later grows again. "auto" (half of the plan's reserve, where the cache is "auto"), "off", or bytes."""
    experts: str = _setting(
        "native",
        "lossy: the format to keep experts of float weights in: int8, nf4, fp4, int4; native is as published",
        "machine",
        choices=("native", "int8", "nf4", "fp4", "int4"),
        metavar="FORMAT",
    )
    """Lossy. What float experts are quantised to as they are read: "native" (not at all), "int8", "nf4", "fp4" or
    "int4"."""
    dense: str = _setting(
        "native",
        "lossy: the same for the other large matrices: int8, nf4; native is as published",
        "machine",
        choices=("native", "int8", "nf4"),
        metavar="FORMAT",
    )
    """Lossy. What the other linear layers are quantised to: "native" (not at all), "int8" or "nf4"."""
    model_config: str | os.PathLike[str] | None = _setting(
        None,
        "folder or hub name with the config.json and the tokenizer of a GGUF file, where the file's own do not do",
        "machine",
        metavar="MODEL",
    )
    """Folder or Hugging Face id with the config.json, maybe the tokenizer, of a GGUF file; None takes the file's."""
    offline: bool = _setting(False, "use only what is on this machine", "machine")
    """Never use the network."""
    link_gbps: float | None = _setting(
        None, "simulate a link between host and device of N gigabytes a second", "machine"
    )
    """Simulates a link of so many GB/s (1e9 bytes); None uses the real one."""

    context: int | None = _setting(None, "tokens of context to make room for", "context")
    """Longest sequence, prompt and reply, in tokens; None takes the model's, at most `default_context`."""
    batch: str | int = _setting("auto", "sequences to decode together: auto (as many as pay), or N", "batch")
    """Most sequences that are decoded together: "auto" (as many as make more tokens a second), or a number."""
    state_folder: str | os.PathLike[str] | None = _setting(
        None,
        "keep small files about the model in DIR, not in the user's cache folder; none keeps nothing",
        "state",
        metavar="DIR",
    )
    """Folder for small files about each checkpoint: None is the user's cache folder, "none" keeps nothing."""

    speculate: str = _setting(
        "auto",
        "what drafts tokens: auto, auto+self, off, ngram, mtp, self, model, ngram+mtp, ngram+self, ngram+model; "
        "auto drafts what pays, a named drafter always drafts",
        "draft",
        choices=(
            "auto", "auto+self", "off", "ngram", "mtp", "self", "model", "ngram+mtp", "ngram+self", "ngram+model"
        ),
        metavar="WHAT",
    )  # fmt: skip
    """What drafts: "auto" or "auto+self" (what pays), "off", or drafters that always draft: "ngram", "mtp", "self",
    "model", "ngram+mtp", "ngram+self" or "ngram+model"."""
    draft_model: str | os.PathLike[str] | None = _setting(
        None,
        "smaller checkpoint with the same tokenizer, which drafts with auto or model",
        "draft",
        metavar="MODEL",
    )
    """A second, smaller checkpoint with the same tokenizer, for the drafter "model"."""
    draft_nodes: int = _setting(16, "most drafted tokens that are verified at once", "draft")
    """Most drafted tokens of a sequence that one pass verifies."""
    draft_depth: int = _setting(8, "most drafted tokens that follow one another", "draft")
    """Most drafted tokens that follow one another."""
    draft_shape: str = _setting(
        "tree", "tree, or chain for drafts without branches", "draft", choices=("tree", "chain"), metavar="SHAPE"
    )
    """"tree", or "chain" for no branches."""
    draft_rule: str = _setting(
        "auto",
        "what a self-draft does without an expert that is not resident: takes the next best (reselect), the most "
        "similar (affinity), the best two resident ones (fewer), or whichever of these turns out best (auto)",
        "draft",
        choices=("auto", "reselect", "affinity", "fewer"),
        metavar="RULE",
    )
    """What a self-draft does with an expert that is not resident: "reselect", "affinity" or "fewer"; "auto" is the
    best of them, as measured."""
    prefetch: str = _setting(
        "auto",
        "load experts before they are requested: auto (while that pays) or off",
        "draft",
        choices=("auto", "off"),
        metavar="WHAT",
    )
    """Loading experts before they are requested: "auto" (while it pays) or "off"."""
    cpu_share: str | float = _setting(
        "off",
        "share of the missing experts that the CPU computes beside a CUDA device, while others are loaded: off, auto "
        "(as profile has measured), or a share (35%); the last bits then depend on what is resident",
        "draft",
        metavar="SHARE",
    )
    """Missing experts that the CPU computes beside a CUDA device while others are loaded, in passes of few tokens:
    "off", "auto" (the share that this machine's profile has measured; off without one), or a share (0.35 or "35%").

    Off by default: the CPU sums in another order than the device, so the last bits of a result, and with them now and
    then a token, would depend on which experts happen to be resident."""

    budget: str | int = _setting(
        "off",
        "lossy: keep each verification of drafts to N experts a layer (8), a share of the routing mass (95%) or "
        "bytes of experts (64MiB); off is exact",
        "draft",
        metavar="SIZE",
    )
    """Lossy. What a verification may use: "off", experts of each layer (8), a share of the routing mass ("95%"), or
    bytes of a pass ("64MiB")."""
    budget_rule: str = _setting(
        "residency",
        "which experts the budget allows: those with most routing (sum), the same weighted by how likely each draft "
        "is (path), or enough for every token where only experts that are not resident count (residency)",
        "draft",
        choices=("sum", "path", "residency"),
        metavar="RULE",
    )
    """Which experts those are, and what counts: "sum", "path" or "residency" (see `prefetch.budget.RULES`)."""
    budget_dropped: str = _setting(
        "substitute",
        "what a token does without an expert outside of the budget: takes another (substitute) or none (truncate)",
        "draft",
        choices=("substitute", "truncate"),
        metavar="HOW",
    )
    """What becomes of a choice outside of the budget: "substitute" (the token chooses again inside) or "truncate"."""

    default_context: int = 8192
    default_max_tokens: int = 1024
    """Length of a reply, in tokens, where neither the request nor the checkpoint says; the context bounds it too."""
    max_batch: int = 256
    """Most sequences that "auto" decodes together."""
    kv_share: float = 0.1
    """Share of the free memory that KV caches of several sequences may take, where one takes less."""
    patience: int = 256
    """Requests that may be taken before one that came earlier, so that those with a common prefix run together."""
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
    host_tier: str = "auto"
    """Where experts wait for a device: "ram" (all of them, whatever is free now, as in a virtual machine whose memory
    grows), "file", or "auto" (in RAM if they fit what is free)."""
    pinned_share: float = 0.75
    """Share of the free RAM that may be page-locked for a CUDA device."""
    staging_records: int = 8
    """Page-locked buffers, each one record, through which records go that are not page-locked themselves."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            given = getattr(self, entry.name)
            value = checked_setting(entry.name, given)
            if value is not given:
                object.__setattr__(self, entry.name, value)

    @property
    def drafts_with_head(self) -> bool:
        """Whether the checkpoint's own draft head is to draft, where it has one."""
        asked = self.speculate.strip().lower()
        return "mtp" in asked.split("+") or (asked == "auto" and not self.draft_model)

    def changed(self, **settings: Any) -> EngineConfig:
        """A copy with other values; TypeError for a name that is no field."""
        unknown = sorted(settings.keys() - {entry.name for entry in fields(self)})
        if unknown:
            raise TypeError(f"{unknown[0]!r} is no setting of an engine: the fields of EngineConfig are")
        return replace(self, **settings)


def settings_of(*groups: str) -> dict[str, SettingInfo]:
    """What people are told of the settings in `groups`, of all groups where none is named; in order, by name."""
    infos = {entry.name: entry.metadata["info"] for entry in fields(EngineConfig) if "info" in entry.metadata}
    return {name: info for name, info in infos.items() if not groups or info.group in groups}


def choices_of(setting: str) -> tuple[str, ...]:
    """The words that `setting` may be."""
    return settings_of()[setting].choices


def chosen_config(config: EngineConfig | None, settings: Mapping[str, Any]) -> EngineConfig:
    """`config`, or the defaults for None, with `settings` in place of its own.

    Raises PlanError for a value that a setting may not have, TypeError for a name that is no field.
    """
    if config is not None and not isinstance(config, EngineConfig):
        raise PlanError(f"config must be an edgemoe.config.EngineConfig or None, not {shown(config)}")
    return (config or EngineConfig()).changed(**settings)


MAX_COUNT = (1 << 63) - 1
MAX_WORD, MAX_PATH = 256, 4096
"""Characters of a setting."""
LIMITS = {
    "threads": (1, 1024),
    "reader_threads": (1, 256),
    "patience": (0, MAX_COUNT),
    "reserve": (0, MAX_COUNT),
} | dict.fromkeys(
    ("context", "expert_cache", "keep_free", "batch", "draft_nodes", "draft_depth", "budget"), (-MAX_COUNT, MAX_COUNT)
)
"""Ranges of whole numbers that are not from 1. Those of the last ones are checked beside a checkpoint."""
WORDS = {"prefetch": choices_of("prefetch"), "file_reads": ("auto", "direct", "cached")}
"""Words that are checked here; those of other settings are checked where they are read."""


def checked_setting(name: str, value: Any) -> Any:
    """`value` of the setting `name`, a field of `EngineConfig`; numbers of numpy become Python's.

    Raises PlanError for a value of another type, a number out of its range, and a text that is no path and no word.
    """
    kinds = str(EngineConfig.__dataclass_fields__[name].type).split(" | ")
    if value is None and "None" in kinds:
        return value
    allowed = []
    for each in kinds:
        if each == "None":
            continue
        read, what = _READERS[each](name, value)
        if read is not None:
            return read
        allowed.append(what)
    nothing = " or None" if "None" in kinds else ""
    raise PlanError(f"{name}={shown(value)} is not possible: give {' or '.join(allowed)}{nothing}")


Read = tuple[Any, str]
"""What a value is read as, None where it is none of its kind; and what to give in its place, in words."""


def _switch(name: str, value: Any) -> Read:
    return value if isinstance(value, bool) else None, "True or False"


def _count(name: str, value: Any) -> Read:
    least, most = LIMITS.get(name, (1, MAX_COUNT))
    read = whole_number(value) if not isinstance(value, float) else None
    range_ = "" if -least == most else f" from {least} to {most}" if most < MAX_COUNT else f" of at least {least}"
    return read if read is not None and least <= read <= most else None, f"a whole number{range_}"


def _decimal(name: str, value: Any) -> Read:
    read = number(value)
    if name.endswith("_share") and name != "cpu_share":
        return read if read is not None and 0 <= read <= 1 else None, "a number from 0 to 1"
    return read, "a number"


def _text(name: str, value: Any) -> Read:
    entry = EngineConfig.__dataclass_fields__[name]
    most = MAX_PATH if "PathLike" in str(entry.type) else MAX_WORD
    what = f"one of {', '.join(WORDS[name])}" if name in WORDS else f"a text of at most {most} characters"
    if isinstance(entry.default, str):
        what += f', such as "{entry.default}"'
    fits = isinstance(value, str) and len(value) <= most and "\0" not in value
    return value if fits and value in WORDS.get(name, (value,)) else None, what


def _path(name: str, value: Any) -> Read:
    fits = isinstance(value, os.PathLike) and _text(name, os.fspath(value))[0] is not None
    return value if fits else None, "a path"


_READERS: dict[str, Callable[[str, Any], Read]] = {
    "bool": _switch, "int": _count, "float": _decimal, "str": _text, "os.PathLike[str]": _path,
}  # fmt: skip
