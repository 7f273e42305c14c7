"""Checkpoints of a few layers of Qwen3-30B-A3B's shape, and the shares of experts that a smaller card has slots for."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from bench.no_card.device_plan import QWEN
from bench.no_card.sparse_checkpoint import make_sparse
from bench.support import checkpoints
from edgemoe.checkpoint.blueprint import blueprint_for, open_blueprint
from edgemoe.checkpoint.packed import packing
from edgemoe.config import GIB, MIB, EngineConfig
from edgemoe.planner import make_plan

LAYERS, SHORT = 4, 1
"""Of the checkpoints, and of one that tells what a step takes beside its layers."""
WHOLE_LAYERS = 48
"""Of Qwen3-30B-A3B."""
EMBEDDING_SCALE = 45.0
"""The square root of the hidden size: the routing follows the token, so that a cache of 30 % does miss."""
NBYTES = 8 << 30
"""What the checkpoints take at most."""
CONTEXT, SMALL_CONTEXT = 4608, 512
CARDS, SMALL_CARD = (8, 12, 16), 12
"""GiB of the cards whose number of slots is taken over."""
CONTEXT_NBYTES = 512 * MIB
"""What a driver's context and a desktop take of a consumer's card: an assumption."""
FORMATS = {"int4": "int4", "bf16": "native"}
"""What is measured, and the setting `experts=` that makes it of bf16."""


def make_wide(folder: Path, *, small: bool) -> dict[str, Path]:
    """By format, checkpoints in `folder`, where they go with the folder; as "short", one of `SHORT` layers in bf16."""
    shape = {"num_hidden_layers": LAYERS, "max_position_embeddings": 2 * CONTEXT}
    with mock.patch.dict(os.environ, {"EDGEMOE_BENCH_DIR": str(folder)}), mock.patch.dict(checkpoints.WIDE, shape):
        source = checkpoints.wide(small=small, embedding_scale=EMBEDDING_SCALE)
    packed = folder / "packed"
    packing.pack(open_blueprint(source, experts="int4"), packed)
    return {"int4": packed, "bf16": source, "short": shortened(source, SHORT)}


def shortened(checkpoint: Path, layers: int) -> Path:
    """A checkpoint of the first `layers` layers of `checkpoint`, which has a file for each, with links to its files."""
    folder = checkpoint.with_name(f"{checkpoint.name}-of-{layers}")
    folder.mkdir()
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text("utf-8"))
    config["num_hidden_layers"] = layers
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if _layer(name) < layers}
    for file in set(index["weight_map"].values()):
        (folder / file).symlink_to(checkpoint / file)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


def _layer(tensor: str) -> int:
    """The layer that a tensor belongs to; -1 for none."""
    return int(tensor.split(".")[2]) if ".layers." in tensor else -1


def card_shares(folder: Path, *, small: bool) -> dict[str, dict[int, float]]:
    """By format and GiB of a card, the share of the experts of all layers that its plan has slots for.

    The plan is the engine's own, for the whole model and a context of `CONTEXT` tokens. Without data: the files have
    holes. A small run plans for int4 and one card.
    """
    model = make_sparse("qwen3_moe", folder / "sparse", **QWEN | {"num_hidden_layers": WHOLE_LAYERS})
    shares: dict[str, dict[int, float]] = {}
    for name, experts in list(FORMATS.items())[: 1 if small else None]:
        config = EngineConfig(
            device="cpu", experts=experts, batch=1, context=CONTEXT, speculate="off", state_folder="none"
        )
        blueprint = blueprint_for(model, config)
        shares[name] = {gib: _share(blueprint, config, gib) for gib in ((SMALL_CARD,) if small else CARDS)}
    return shares


def _share(blueprint: Any, config: EngineConfig, gib: int) -> float:
    """Slots over experts of a plan for a card of `gib` GiB, which need not be there."""
    with ExitStack() as stack:
        for name, value in {
            "_device_free": gib * GIB - CONTEXT_NBYTES,
            "accelerator.is_accelerator": True,
            "predict": None,
        }.items():
            stack.enter_context(mock.patch(f"edgemoe.planner.{name}", return_value=value))
        plan = make_plan(blueprint, config)
    return plan.slots / plan.experts
