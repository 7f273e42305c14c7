"""The memory plan of an engine: shown before loading, and used by the run."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from edgemoe.cache.slot_classes import SlotClass
from edgemoe.plan.kv_size import KvSize
from edgemoe.plan.predicted_speed import PredictedSpeed
from edgemoe.sizes import format_bytes

FLOATS = frozenset({"bf16", "fp16", "fp32"})
"""Formats that a plan does not tell of: the dtype says it."""


@dataclass(frozen=True)
class Plan:
    """The memory plan of one engine. Sizes are in bytes, `context` and `prefill_chunk` in tokens."""

    model: str
    family: str
    device: str
    dtype: str
    threads: int
    context: int
    layers: int
    """MoE layers."""
    experts: int
    """Experts of all MoE layers together."""
    top_k: int
    formats: tuple[str, ...]
    """How the checkpoint stores the experts' matrices, by names such as "bf16" and "Q4_K"; most of them first."""
    dense_format: str
    """What the other linear layers are quantised to as they are read; empty for nothing."""
    record_nbytes: int
    """Bytes of one expert's record; the mean where layers differ."""
    slot_nbytes: int
    """Bytes of the largest slot, which holds any record."""
    slots: int
    """Number of slots of all sizes."""
    slot_classes: tuple[SlotClass, ...]
    """The sizes of the slots, smallest first, and how many there are of each."""
    device_free: int
    """Free memory of the device (VRAM or RAM) before loading."""
    dense_nbytes: int
    batch: int
    """Maximum number of sequences that are decoded together."""
    kv: KvSize
    """Bytes of one sequence's keys, values and states, by its tokens."""
    kv_nbytes: int
    """Memory for the keys, values and states of all sequences: enough for at least one of `context` tokens."""
    draft_weights_nbytes: int
    """Weights of the draft model; 0 without one."""
    draft_kv_nbytes: int
    """Memory for the draft model's keys and values."""
    kept_states_nbytes: int
    """Memory for the states that recurrent layers keep for drafted tokens; 0 without such layers or drafts."""
    workspace_nbytes: int
    """Memory for the activations of a prefill chunk, and while loading for a second copy of the largest weight."""
    reserve_nbytes: int
    """Memory left to other programs; not part of the total."""
    cache_nbytes: int
    """Bytes of all slots."""
    host_tier: str
    """Where missing experts come from: "file", or "pinned" or "pageable" RAM."""
    pinned_nbytes: int
    """Page-locked RAM, with the staging buffers; 0 on a CPU."""
    pageable_nbytes: int
    """Expert records in RAM that is not page-locked."""
    file_nbytes: int
    """Expert bytes in the checkpoint's files."""
    direct_reads: bool
    """Whether reads of the files bypass the page cache, which is too small for the experts."""
    prefill_chunk: int
    link_gbps: float | None
    speculation: str
    """The drafter and when it runs, as "ngram, while it pays, ...", or "off: ..." with the reason."""
    lossy: str
    """The settings that make replies differ from the model's own; empty for none."""
    quantised: str
    """Of them those of the weights, which a loaded engine keeps; empty for none."""
    other_formats: tuple[tuple[str, int], ...] = ()
    """Bytes of all experts in formats that they could be quantised to (`experts=`), by its name; none where packed."""
    not_served: tuple[str, ...] = ()
    """What the checkpoint says about generation and edgemoe does not do, as "name=value"."""
    dtype_note: str = ""
    """Why the dtype is not the one of the checkpoint although none was asked for; empty where it is."""
    head_layers: int = 0
    """How many of the MoE layers are a draft head's."""
    cpu_share: float = 0.0
    """Share of the missing experts, from 0 to 1, that the CPU computes beside a device, in passes of few tokens."""
    cpu_share_note: str = ""
    """Where that share is from, or why it is 0; empty where none was asked for."""
    predicted: PredictedSpeed | None = None
    """Predicted tokens per second; None without a profile of the model on this machine (see `edgemoe profile`)."""

    @property
    def total_nbytes(self) -> int:
        """Bytes of everything on the device."""
        draft = self.draft_weights_nbytes + self.draft_kv_nbytes + self.kept_states_nbytes
        return self.dense_nbytes + self.kv_nbytes + draft + self.workspace_nbytes + self.cache_nbytes

    @property
    def kept_states(self) -> int | None:
        """How many states of a sequence may be kept at once, for drafts; None where families keep none."""
        return self.kept_states_nbytes // self.kv.state_nbytes if self.kv.state_nbytes else None

    @property
    def nbytes_per_token(self) -> int:
        """Bytes of the weights that one token uses, with the whole embedding."""
        return self.dense_nbytes + self.layers * self.top_k * self.record_nbytes

    @property
    def simulation(self) -> str | None:
        """A sentence that every report must show if the link is simulated; None if it is not."""
        if self.link_gbps is None:
            return None
        return f"simulation: the link is throttled to {self.link_gbps:g} GB/s (link_gbps=)"

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        known = {name: value for name, value in asdict(self).items() if name != "kv"}
        return known | {"total_nbytes": self.total_nbytes, "simulation": self.simulation}

    def _sequences(self) -> str:
        one = self.kv.nbytes(self.context)
        if self.batch == 1:
            return f"one sequence of {self.context} tokens"
        whole = max(1, self.kv_nbytes // max(1, one))
        return f"up to {self.batch} sequences, {whole} of them with {self.context} tokens"

    def _layers(self) -> str:
        head = " and a draft head" if self.head_layers else ""
        return f"{self.layers - self.head_layers} MoE layers{head}"

    def _slot_sizes(self) -> str:
        smallest, largest = (format_bytes(self.slot_classes[index].nbytes) for index in (0, -1))
        return smallest if smallest == largest else f"{smallest} to {largest}"

    def _draft_model(self, memory: str) -> list[tuple[str, str, str]]:
        if not self.draft_weights_nbytes:
            return []
        nbytes = self.draft_weights_nbytes + self.draft_kv_nbytes
        return [("draft model", format_bytes(nbytes), f"{memory}, its keys and values included")]

    def _kept(self, memory: str) -> list[tuple[str, str, str]]:
        if not self.kept_states_nbytes:
            return []
        one = format_bytes(self.kv.state_nbytes)
        why = f"{memory}, {self.kept_states} of {one}, to take drafted tokens back"
        return [("kept states", format_bytes(self.kept_states_nbytes), why)]

    def lines(self) -> list[tuple[str, str, str]]:
        """Rows for people: name, amount, and where or why."""
        memory = "RAM" if self.device == "cpu" else "VRAM"
        size = format_bytes
        slots = f"{self.slots} slots of {self._slot_sizes()}, {self.slots / self.experts:.0%} of the experts"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        dtype = f"{self.dtype}: {self.dtype_note}" if self.dtype_note else self.dtype
        experts = f"{self._layers()}, {self.experts} experts, top-{self.top_k}"
        if not set(self.formats) <= FLOATS:
            experts += f", in {' and '.join(self.formats)}"
        rows = [
            ("model", self.model, f"{self.family}, {experts}"),
            ("device", self.device, f"{size(self.device_free)} {memory} free, {threads}, {dtype}"),
            ("non-expert weights", size(self.dense_nbytes), memory),
            ("KV cache", size(self.kv_nbytes), f"{memory}, {self._sequences()}"),
            *self._draft_model(memory),
            *self._kept(memory),
            ("workspace", size(self.workspace_nbytes), f"{memory}, prefill chunks of {self.prefill_chunk} tokens"),
            ("expert cache", size(self.cache_nbytes), f"{memory}, {slots}"),
            ("total", size(self.total_nbytes), f"{memory}, {size(self.reserve_nbytes)} more are left untouched"),
        ]
        way = "past the page cache" if self.direct_reads else "through the page cache"
        if self.host_tier == "file":
            # On a CPU alone there is no other place.
            why = "" if self.device == "cpu" else ": free RAM does not hold them all (host_tier=)"
            rows.append(
                ("experts", size(self.file_nbytes), f"read from the checkpoint's files as they are needed, {way}{why}")
            )
        else:
            rows.append(("pinned RAM", size(self.pinned_nbytes), "records and staging, page-locked"))
            rows.append(("pageable RAM", size(self.pageable_nbytes), "records beyond the page-locked ones"))
        if self.cpu_share_note:
            on = f"of the missing experts, {self.cpu_share_note}; the last bits depend on what is resident"
            share = (f"{self.cpu_share:.0%}", on) if self.cpu_share else ("off", self.cpu_share_note)
            rows.append(("CPU share", *share))
        # The drafter comes first, then when it runs, or why none does.
        what, why = re.split(": |, ", self.speculation, maxsplit=1)
        rows.append(("speculation", what, why))
        if self.other_formats and self.slots < self.experts:
            sizes = ", ".join(f"{size(nbytes)} as {name}" for name, nbytes in self.other_formats)
            rows.append(("other formats", "lossy", f"all experts take {sizes} (experts=)"))
        if self.lossy:
            rows.append(("lossy", "yes", self.lossy))
        if self.not_served:
            rows.append(("not served", ", ".join(self.not_served), "of the checkpoint's generation_config.json"))
        if self.predicted:
            rows.append(self.predicted.line())
        if self.simulation:
            rows.append(("link", f"{self.link_gbps:g} GB/s", "simulated"))
        return rows
