"""`device-plan`: what loading and decoding take of a card against the plan, without a card.

The models have the shapes of published ones, with fewer layers, and no data. The code that loads them, keeps their
records and runs their passes is the engine's; a stand-in for PyTorch's allocator counts what it takes of the card.
Experts run one after the other, as without Triton. Workspaces of libraries and memory of graphs are in the plan's
reserve, and not counted. This has never been held against a card.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench.measurement import BaseSize, Measurement, work_folder
from bench.no_card.counted_card import CARD, CountedCard
from bench.no_card.sparse_checkpoint import make_sparse
from edgemoe import planner
from edgemoe.cache import SlotPool
from edgemoe.cache.host_store import HostStore
from edgemoe.cache.safetensors_store import SafetensorsStore
from edgemoe.checkpoint.blueprint import Blueprint, blueprint_for
from edgemoe.checkpoint.dense_loader import load_dense
from edgemoe.config import GIB, MIB, EngineConfig
from edgemoe.experts.expert_ffn import PlainExperts, SortedGroups
from edgemoe.model.kv_cache import SequenceCache, cache_argument
from edgemoe.model.row_layers import GrowingLayer
from edgemoe.plan.plan import Plan
from edgemoe.planner import make_plan
from edgemoe.runtime import Runtime

NAME = "device-plan"
BAR = "bytes taken are at most the plan and at least 0.95 of it"
MIN_SHARE = 0.95
RAM = 256 * GIB
CHUNKS = 8
"""Chunks of a prompt that are computed after the first, evenly spread; those in between only fill the cache."""
LAST = 4
"""Tokens that are decoded one by one, up to the end of the context."""

QWEN: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 12,
    "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "max_position_embeddings": 40960,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 12,
    "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 32768,
}  # fmt: skip
OLMOE: dict[str, Any] = {
    "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 4096,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 12,
    "num_local_experts": 32, "num_experts_per_tok": 4, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 64, "max_position_embeddings": 131072, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 6,
}  # fmt: skip
SHAPES = {"qwen3_moe": QWEN, "mixtral": MIXTRAL, "olmoe": OLMOE, "gpt_oss": GPT_OSS}
"""Settings of published models, with a part of their layers."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """What is planned: families with the formats of their experts, GiB of cards, and sequences at once."""

    models: tuple[tuple[str, str], ...] = (
        ("qwen3_moe", "native"),
        ("qwen3_moe", "int4"),
        ("mixtral", "native"),
        ("mixtral", "int4"),
        ("olmoe", "native"),
        ("gpt_oss", "native"),
    )
    cards: tuple[int, ...] = (8, 12, 16)
    batches: tuple[int, ...] = (1, 8)
    context: int = 4096
    shapes: dict[str, Any] = field(default_factory=dict)
    """Settings in place of the published ones."""


FULL = Size()
SMALL = Size(small=True, models=(("mixtral", "native"),), cards=(2,), batches=(1,), shapes={"num_hidden_layers": 2})


def run(size: Size = FULL) -> Measurement:
    """Every combination; the smallest share of a plan that is taken decides, and whether anything did not fit."""
    found = {}
    for (family, experts), gib, batch in itertools.product(size.models, size.cards, size.batches):
        found[f"{family} {experts} {gib} GiB batch {batch}"] = taken(family, experts, gib, batch, size)
    shares = [share for each in found.values() for share in (each["card_share"], each["pinned_share"])]
    over = [name for name, each in found.items() if each["short"] or each["pinned_share"] > 1]
    value = {"smallest": min(shares), "largest": max(shares), "over": over}
    return Measurement(NAME, value, BAR, min(shares) >= MIN_SHARE and not over, found)


def taken(family: str, experts: str, gib: int, batch: int, size: Size) -> dict[str, Any]:
    """Bytes of the plan and bytes taken, of the card and of page-locked memory, in MiB, and their shares.

    The allocator may reserve the plan's bytes and not one more: what does not fit is `short`, with the gaps between
    blocks. `taken_MiB` are the most that the allocator could not give back at a time, with the gaps as well.
    """
    folder = work_folder() / ("sparse-" + "-".join([family, *map(str, size.shapes.values())]))
    if not (folder / "model.safetensors").exists():
        make_sparse(family, folder, **SHAPES[family] | size.shapes)
    config = EngineConfig(
        device="cuda", experts=experts, batch=batch, context=size.context, threads=1, state_folder="none"
    )
    card = CountedCard(gib * GIB)
    short, sequences = "", 0
    with card.there(), mock.patch.object(planner, "ram_free", return_value=RAM), ExitStack() as stack:
        blueprint = blueprint_for(folder, config)
        plan = make_plan(blueprint, config)
        card.memory.capacity = plan.total_nbytes
        try:
            with card.tensors():
                model = load_dense(blueprint, CARD, lambda done, total: None)
                pool = stack.enter_context(SlotPool(plan.slot_classes, CARD))
            _link(blueprint, plan, config, stack)
            with card.tensors(), torch.inference_mode():
                caches = _decode(model, blueprint, plan, pool)
                sequences = len(caches)
        except torch.OutOfMemoryError as error:
            short = str(error)
        locked, kept = card.locked, card.memory.allocated
    return {
        "plan_MiB": plan.total_nbytes // MIB,
        "taken_MiB": card.memory.peak_held // MIB,
        "workspace_MiB": (card.memory.peak_allocated - kept) // MIB,
        "reserved_MiB": card.memory.peak_reserved // MIB,
        "card_share": round(card.memory.peak_held / plan.total_nbytes, 4),
        "pinned_share": round(locked / plan.pinned_nbytes, 4),
        "short": short,
        "slots": plan.slots,
        "sequences": sequences,
    }


def _link(blueprint: Blueprint, plan: Plan, config: EngineConfig, stack: ExitStack) -> None:
    """Takes the memory of the host that the link needs, as a runtime does; records are not read."""
    layouts = [moe.layout for moe in blueprint.experts_modules]
    files = SafetensorsStore(blueprint.checkpoint.files, layouts, blueprint.records, direct=False)
    stack.callback(files.close)
    with mock.patch.object(HostStore, "fill"):
        runtime: Any = SimpleNamespace(_stack=stack)
        link = Runtime._link(runtime, files, plan, config, None, lambda progress: None)
    stack.callback(link.close)


def _decode(model: Any, blueprint: Blueprint, plan: Plan, pool: SlotPool) -> list[SequenceCache]:
    """Sequences of full length, and a shorter one for the rest of the room: their prompts, then their last tokens."""
    count = max(1, min(plan.batch, plan.kv_nbytes // plan.kv.nbytes(plan.context)))
    lengths, left = [plan.context] * count, plan.kv_nbytes - count * plan.kv.nbytes(plan.context)
    if count < plan.batch:
        lengths.append(bisect_right(range(plan.context), left, key=plan.kv.nbytes) - 1)
    caches = [SequenceCache.empty(model, length) for length in lengths if length > 2 * LAST]
    for number, cache in enumerate(caches):
        # The first fills its cache chunk by chunk; the buffers of the others are as long from the start.
        end = cache.capacity - LAST if number == 0 else min(plan.prefill_chunk, cache.capacity - LAST)
        step = min(plan.prefill_chunk, end)
        for last in sorted({step + (end - step) * number // CHUNKS for number in range(CHUNKS + 1)}):
            _skip(cache, max(0, last - step - cache.tokens))
            with _experts(model, blueprint, pool, counted=last == plan.context - LAST):
                _pass(model, cache, last - cache.tokens)
    for _ in range(LAST):
        for cache in caches:
            with _experts(model, blueprint, pool, counted=True):
                _pass(model, cache, 1)
    return caches


def _pass(model: Any, cache: SequenceCache, tokens: int) -> None:
    """One pass of `tokens` tokens, as a runner makes it."""
    keep = {"logits_to_keep": 1}
    ids = torch.zeros(1, tokens, dtype=torch.long, device=CARD)
    model(input_ids=ids, use_cache=True, **{cache_argument(model): cache.kv}, **keep)
    cache.tokens += tokens


def _skip(cache: SequenceCache, tokens: int) -> None:
    """Appends rows of no value, which take no memory but the buffers'."""
    for layer in cache.kv.layers if tokens else ():
        if isinstance(layer, GrowingLayer):
            assert layer.keys is not None
            assert layer.values is not None
            like = [rows[..., :1, :].expand(*rows.shape[:-2], tokens, -1) for rows in (layer.keys, layer.values)]
            layer.extend(like[0], like[1])
        else:
            layer.cumulative_length += tokens
    cache.tokens += tokens


class _Groups(SortedGroups):
    """The groups of a router that spreads its choices evenly: those of a tensor without data cannot be read."""

    def _on_host(self, chosen: torch.Tensor) -> list[int]:
        """See the base class."""
        self._below = 0
        return [number % self.spread for number in range(chosen.numel())]

    spread = 1


@contextmanager
def _experts(model: Any, blueprint: Blueprint, pool: SlotPool, *, counted: bool) -> Iterator[None]:
    """In the block, the experts of the first layer compute if they are `counted`, and those of all others do not.

    Layers run one after the other, so that one of them takes as much as all.
    """
    for number, moe in enumerate(blueprint.experts_modules):
        module, region = moe.module(model), pool.region(moe.layout.nbytes)

        def compute(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, moe: Any = moe,
                    module: Any = module, region: Any = region) -> torch.Tensor:  # fmt: skip
            groups = type("Groups", (_Groups,), {"spread": moe.experts})(hidden, index, weights, moe.experts)
            experts = PlainExperts(module, moe, region)
            experts.compute(groups, groups.wanted, [0] * len(groups.wanted))
            return experts.combined(groups)

        module.forward = compute if counted and number == 0 else _nothing
    yield


def _nothing(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden)
