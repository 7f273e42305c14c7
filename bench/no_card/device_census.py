"""`device-census`: what a step queues on a card, and what the host waits for, counted with tensors without values."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.no_card.fake_card import Counts, FakeCard, put_on
from bench.support.no_card.fake_passes import FakePasses, without_weights
from bench.support.zoo import config
from edgemoe.checkpoint.experts_module import ExpertsModule

NAME = "device-census"
BAR = (
    "the host waits for a card at most once a layer, never for hits and in drafts; "
    "at most 12 launches a layer outside of graphs, at most 4 of them for experts that are resident"
)
QWEN3_30B_A3B = {
    "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "intermediate_size": 6144, "vocab_size": 151936, "mlp_only_layers": [], "decoder_sparse_step": 1,
    "max_position_embeddings": 40960,
}  # fmt: skip
"""The shape of the model."""
MAX_LAUNCHES, MAX_EXPERT_LAUNCHES = 12, 4
PROMPT, CONTEXT = 24, 512


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The layers, and the share of the experts that have a slot where not all have one."""

    layers: int = 48
    share: float = 0.6


FULL, SMALL = Size(), Size(small=True, layers=3)


def run(size: Size = FULL) -> Measurement:
    """Decoding with every expert resident, with some, and drafting, once each graph is captured."""
    shape = QWEN3_30B_A3B | {"num_hidden_layers": size.layers}
    model, modules = without_weights(config("qwen3_moe", **shape))
    rows = {
        "decode, all resident": _row(model, modules, size, share=1.0, work=FakePasses.decode),
        "decode, some resident": _row(model, modules, size, share=size.share, work=FakePasses.decode),
        "verify 4, some resident": _row(model, modules, size, share=size.share, work=FakePasses.verify),
        "draft, some resident": _row(model, modules, size, share=size.share, work=FakePasses.draft),
    }
    faults = [f"{name}: {fault}" for name, row in rows.items() for fault in _faults(name, row)]
    return Measurement(NAME, rows, BAR, not faults, {"faults": faults, "layers": size.layers})


def _row(
    model: Any, modules: Sequence[ExpertsModule], size: Size, *, share: float, work: Callable[[FakePasses], Counts]
) -> dict[str, Any]:
    """Counts a layer of the second pass: the first one captures."""
    slots = round(share * sum(moe.experts for moe in modules))
    card, choices = FakeCard(), random.Random(1)

    def chosen(pairs: int) -> list[int]:
        top_k = model.config.num_experts_per_tok
        return [each for _ in range(pairs // top_k) for each in choices.sample(range(modules[0].experts), top_k)]

    card.chosen = chosen
    with card.running():
        passes = FakePasses(card, put_on(card, model, modules, slots), CONTEXT)
        passes.prompt(PROMPT)
        work(passes)
        found = work(passes)
    layers = size.layers
    return {
        "host_waits_a_layer": round(found.host_reads / layers, 2),
        "launches_a_layer": round(found.launches / layers, 1),
        "expert_launches_a_layer": round(found.experts / layers, 1),
        "copies_a_layer": round(found.copies / layers, 1),
        "captured": passes.captured,
        "refusal": passes.refusal,
        "launches": dict(found.names.most_common()),
    }


def _faults(name: str, row: dict[str, Any]) -> list[str]:
    waits = 0 if name.endswith("all resident") or name.startswith("draft") else 1
    found = [f"it is not captured: {row['refusal']}"] if row["refusal"] else []
    if row["host_waits_a_layer"] > waits:
        found.append(f"the host waits {row['host_waits_a_layer']} times a layer, not {waits}")
    if row["launches_a_layer"] > MAX_LAUNCHES:
        found.append(f"{row['launches_a_layer']} launches a layer, more than {MAX_LAUNCHES}")
    if name.endswith("all resident") and row["expert_launches_a_layer"] > MAX_EXPERT_LAUNCHES:
        found.append(f"{row['expert_launches_a_layer']} launches for experts, more than {MAX_EXPERT_LAUNCHES}")
    return found
