"""Decides what goes where, from a checkpoint's blueprint and the memory that is there now."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from edgemoe.cache import accelerator
from edgemoe.cache.slot_classes import SlotClass, fitting_slots, limit_slots, slot_classes, total_nbytes
from edgemoe.checkpoint.blueprint import Blueprint
from edgemoe.checkpoint.generation_defaults import load_generation_defaults, not_served
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.config import EngineConfig
from edgemoe.draft.draft_model import DraftModel
from edgemoe.draft.settings import DraftSettings, budget_settings, draft_settings
from edgemoe.errors import PlanError
from edgemoe.formats.made import MADE
from edgemoe.model.kv_cache import STATES_BESIDE_NODES
from edgemoe.plan.cpu_share import cpu_share
from edgemoe.plan.kv_size import KvSize, measure_kv
from edgemoe.plan.machine import cores, ram_free
from edgemoe.plan.plan import FLOATS, Plan
from edgemoe.plan.prediction import predict
from edgemoe.sizes import format_bytes, parse_bytes

DRAFTED_FOR = 4
"""Sequences of full length that a draft model has room for; for others, while these run, nothing drafts."""
KEPT_SHARE = 0.03
"""Most of the free memory that states of drafted tokens get."""
HOST_TIERS = ("auto", "ram", "file")
"""The values of the setting `host_tier`."""
LIBRARY_NBYTES = 128 << 20
"""Memory of a device beside PyTorch's tensors: workspaces of the libraries that multiply matrices, 8 MiB for each
stream and 32 MiB on sm_90 by PyTorch's default, code that is loaded when it is first used, and the pools of graphs. An
estimate: it has not been measured on a card."""
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")
"""The names under which configurations give the experts that a token uses."""


def make_plan(blueprint: Blueprint, config: EngineConfig, draft_model: DraftModel | None = None) -> Plan:
    """The plan for `blueprint` under `config` on this machine, now.

    Raises PlanError, naming the smallest change that fits, when it cannot be done.
    """
    if config.link_gbps is not None and not config.link_gbps > 0:
        raise PlanError(f"a simulated link of {config.link_gbps} GB/s moves nothing: give more than 0 as link_gbps=")
    device = choose_device(config.device)
    plan = _without_slots(blueprint, config, draft_model, device)
    if config.context is None:
        plan = _shrink_context(plan)
    every = slots_for_all(blueprint)
    plan = with_slots(plan, every, _slots(plan, every, config.expert_cache))
    plan = _gaps_of_more(_room_for_sequences(plan, every, config), device)
    if accelerator.is_accelerator(device):
        plan = _host_tier(plan, _records_nbytes(blueprint), config)
    left = ram_free() - plan.pinned_nbytes - plan.pageable_nbytes - (plan.total_nbytes if device.type == "cpu" else 0)
    direct = plan.slots < plan.experts and plan.file_nbytes > left
    plan = replace(plan, direct_reads=direct if config.file_reads == "auto" else config.file_reads == "direct")
    state = StateFolder.of(blueprint.checkpoint, config.state_folder)
    share, note = cpu_share(config.cpu_share, plan, blueprint.experts_modules, state)
    return replace(plan, cpu_share=share, cpu_share_note=note, predicted=predict(state, plan))


def _without_slots(
    blueprint: Blueprint, config: EngineConfig, draft_model: DraftModel | None, device: torch.device
) -> Plan:
    """Everything but the expert cache, which takes what is left, and what depends on its size."""
    drafts, budget = drafts_of(blueprint, config), budget_settings(config)
    free, kv, context = _device_free(device), measure_kv(blueprint), _context(blueprint, config)
    quantised = _quantised(blueprint)
    return Plan(
        model=blueprint.checkpoint.name,
        family=blueprint.config.model_type,
        device=str(device),
        dtype=str(blueprint.dtype).removeprefix("torch."),
        dtype_note=blueprint.dtype_note,
        threads=config.threads or cores(),
        context=context,
        layers=len(blueprint.experts_modules),
        head_layers=len(blueprint.experts_modules) - len(blueprint.pass_modules),
        experts=sum(moe.experts for moe in blueprint.experts_modules),
        top_k=_top_k(blueprint.config.get_text_config()),
        formats=blueprint.expert_formats,
        dense_format=blueprint.made_dense or "",
        record_nbytes=round(_records_nbytes(blueprint) / sum(moe.experts for moe in blueprint.experts_modules)),
        slot_nbytes=slots_for_all(blueprint)[-1].nbytes,
        slots=0,
        slot_classes=(),
        device_free=free,
        dense_nbytes=blueprint.dense_nbytes,
        batch=_max_sequences(config),
        kv=kv,
        kv_nbytes=kv.nbytes(context),
        draft_weights_nbytes=draft_model.weight_nbytes if draft_model else 0,
        draft_kv_nbytes=DRAFTED_FOR * draft_model.kv.nbytes(context) if draft_model else 0,
        kept_states_nbytes=_kept_states(kv, drafts, free),
        workspace_nbytes=_workspace(blueprint, config, device, context) + _gaps(kv, context, device),
        reserve_nbytes=_reserve(free, device, config),
        cache_nbytes=0,
        host_tier="file",
        pinned_nbytes=0,
        pageable_nbytes=0,
        file_nbytes=sum(extent.nbytes for source in blueprint.records.values() for extent in source.extents),
        direct_reads=False,
        prefill_chunk=_prefill_chunk(blueprint, config, device, context),
        link_gbps=config.link_gbps,
        speculation=drafts.describe(),
        # Where nothing drafts, no verification runs under a budget.
        lossy="; ".join(filter(None, [quantised, budget.describe() if budget and drafts.drafters else ""])),
        quantised=quantised,
        other_formats=_other_formats(blueprint),
        not_served=tuple(not_served(load_generation_defaults(blueprint))),
    )


def drafts_of(blueprint: Blueprint, config: EngineConfig) -> DraftSettings:
    """What drafts for `blueprint` under `config`; PlanError names what is wrong with the settings."""
    return draft_settings(config, head=blueprint.head is not None, no_head=blueprint.head_refusal)


def _kept_states(kv: KvSize, drafts: DraftSettings, free: int) -> int:
    """Bytes for the states of drafted tokens, as many as drafts have nodes, within a share of the `free` memory."""
    if not kv.state_nbytes or not drafts.drafters:
        return 0
    wanted = DRAFTED_FOR * (drafts.nodes + STATES_BESIDE_NODES)
    return min(wanted, int(free * KEPT_SHARE) // kv.state_nbytes) * kv.state_nbytes


def _reserve(free: int, device: torch.device, config: EngineConfig) -> int:
    """How many of the `free` bytes of `device` are left to other programs and to the device's libraries."""
    libraries = LIBRARY_NBYTES if accelerator.is_accelerator(device) else 0
    return libraries + max(config.reserve, int(free * config.reserve_share))


def _quantised(blueprint: Blueprint) -> str:
    """What of the weights is quantised as it is read, in words; empty for nothing."""
    of = [("experts", blueprint.made_experts), ("other matrices", blueprint.made_dense)]
    return ", ".join(f"{what} quantised to {name} by edgemoe" for what, name in of if name is not None)


def _other_formats(blueprint: Blueprint) -> tuple[tuple[str, int], ...]:
    """Bytes of all experts in each format that they could be quantised to; none where they are packed."""
    if not set(blueprint.expert_formats) <= FLOATS:
        return ()
    modules = blueprint.experts_modules
    return tuple((name, sum(moe.experts * moe.made_layout(name).nbytes for moe in modules)) for name in MADE)


def slots_for_all(blueprint: Blueprint) -> tuple[SlotClass, ...]:
    """A slot for every expert, the smallest slots first."""
    modules = blueprint.experts_modules
    return slot_classes([moe.layout.nbytes for moe in modules], [moe.experts for moe in modules])


def _records_nbytes(blueprint: Blueprint) -> int:
    """Bytes of all records."""
    return sum(moe.experts * moe.layout.nbytes for moe in blueprint.experts_modules)


def choose_device(name: str) -> torch.device:
    """The device called `name`; PlanError when there is none such."""
    if name == "auto":
        return torch.device(accelerator.TYPE, 0) if accelerator.available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise PlanError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N: choose one as device=") from None
    if device.type == "cpu":
        return device
    if not accelerator.is_accelerator(device):
        raise PlanError(f"device {name!r} is not supported: choose auto, cpu, cuda or cuda:N as device=")
    there = accelerator.count() if accelerator.available() else 0
    if (device.index or 0) >= there:
        raise PlanError(f"device {name!r} is not there ({there} CUDA devices): use device='cpu'")
    return torch.device(device.type, device.index or 0)


def _device_free(device: torch.device) -> int:
    return accelerator.free_nbytes(device) if accelerator.is_accelerator(device) else ram_free()


def _context(blueprint: Blueprint, config: EngineConfig) -> int:
    limit = blueprint.context_limit
    if config.context is None:
        return min(limit or config.default_context, config.default_context)
    if config.context < 2:
        raise PlanError(f"a context of {config.context} tokens holds no prompt and reply: give at least 2 as context=")
    if limit is not None and config.context > limit:
        raise PlanError(f"a context of {config.context} tokens exceeds the model's {limit}: lower context=")
    return config.context


def _workspace(blueprint: Blueprint, config: EngineConfig, device: torch.device, context: int) -> int:
    """Bytes beside weights, slots and KV caches: what passes compute with, or the loader."""
    if not accelerator.is_accelerator(device):
        # While the largest weight loads, the loader may hold it twice; later the same memory serves activations.
        return max(config.prefill_workspace, blueprint.largest_dense_nbytes)
    # A device gets weights from the host before there are slots and caches. Attention copies the keys and values that
    # several heads share, once for each; copies of a growing length leave gaps of about one more in the memory. A
    # packed matrix is widened as a whole where no kernel multiplies it.
    copies = 3 * context * _head_values(blueprint.config.get_text_config()) * blueprint.dtype.itemsize
    return config.prefill_workspace + copies + max((each.float_nbytes for each in blueprint.packed_modules), default=0)


def _gaps(kv: KvSize, context: int, device: torch.device) -> int:
    """Bytes that a device's allocator leaves unused beside the buffers of one KV cache of `context` tokens."""
    if not accelerator.is_accelerator(device):
        return 0
    buffers = [per_token * min(context, window or context) // 2 for per_token, window in kv.layers]
    return sum(2 * (accelerator.segment_nbytes(each) - each) for each in buffers)


def _gaps_of_more(plan: Plan, device: torch.device) -> Plan:
    """The plan with a part of the memory for more than one sequence left to the gaps beside their buffers."""
    one = plan.kv.nbytes(plan.context)
    more = plan.kv_nbytes - one
    gaps = more * _gaps(plan.kv, plan.context, device) // max(1, one + _gaps(plan.kv, plan.context, device))
    return replace(plan, kv_nbytes=plan.kv_nbytes - gaps, workspace_nbytes=plan.workspace_nbytes + gaps)


def _head_values(text: Any) -> int:
    """Values of a token's queries, with all heads."""
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.num_attention_heads * width)


def _scores(blueprint: Blueprint, device: torch.device, context: int) -> int:
    """Bytes that attention takes for each token of a chunk on a device.

    Its row of the mask, and of all heads' scores where the family knows no kernel that goes without them.
    """
    if not accelerator.is_accelerator(device):
        return 0
    itemsize, heads = blueprint.dtype.itemsize, blueprint.config.get_text_config().num_attention_heads
    held = 0 if blueprint.model_class._supports_sdpa else heads * (4 + 3 * itemsize)
    return context * (1 + itemsize + held)


def _prefill_chunk(blueprint: Blueprint, config: EngineConfig, device: torch.device, context: int) -> int:
    """As many tokens as the workspace holds: outputs of top-k experts, hidden states and one expert's inner values."""
    text = blueprint.config.get_text_config()
    token = 4 * text.hidden_size * (_top_k(text) + 6) + 4 * 4 * max(
        max(part.shape) for moe in blueprint.experts_modules for part in moe.layout.parts
    )
    token += _scores(blueprint, device, context)
    return max(32, min(config.prefill_chunk, config.prefill_workspace // int(token)))


def _top_k(text: Any) -> int:
    """Experts a token uses; the most of any layer where layers differ."""
    values = [getattr(text, name) for name in TOP_K if getattr(text, name, None) is not None]
    return max([1, *(int(value) for found in values for value in (found if isinstance(found, list) else [found]))])


def _shrink_context(plan: Plan) -> Plan:
    """Halves a context that nobody asked for until it leaves most of the memory to the experts."""
    context = plan.context
    while context > 1024 and plan.kv.nbytes(context) > plan.device_free // 8:
        context //= 2
    return replace(plan, context=context, kv_nbytes=plan.kv.nbytes(context))


def _max_sequences(config: EngineConfig) -> int:
    """The bound on sequences decoded together."""
    text = str(config.batch).strip().lower()
    if text == "auto":
        return config.max_batch
    if not text.isdecimal() or int(text) < 1:
        raise PlanError(f"a batch of {config.batch!r} is none: give a number of sequences from 1, or auto, as batch=")
    return int(text)


def _room_for_sequences(plan: Plan, every: tuple[SlotClass, ...], config: EngineConfig) -> Plan:
    """Room for more than one sequence, out of what is left.

    Where the cache takes whatever there is, slots are given up for it, `kv_share` of the memory at most and
    never the last one; with every expert resident nothing else wants the rest, of which half stays free.
    """
    left = plan.device_free - plan.reserve_nbytes - plan.total_nbytes
    more = (plan.batch - 1) * plan.kv.nbytes(plan.context)
    if plan.slots == plan.experts:
        return replace(plan, kv_nbytes=plan.kv_nbytes + min(more, left // 2))
    more = min(more, int(plan.device_free * config.kv_share))
    if str(config.expert_cache).strip().lower() != "auto":
        return replace(plan, kv_nbytes=plan.kv_nbytes + min(more, left // 2))
    room = left + plan.cache_nbytes
    plan = with_slots(plan, every, max(1, fitting_slots(every, room - more)))
    return replace(plan, kv_nbytes=plan.kv_nbytes + min(more, room - plan.cache_nbytes))


def with_slots(plan: Plan, every: tuple[SlotClass, ...], slots: int) -> Plan:
    """The plan with `slots` of the slots for `every` expert."""
    return with_classes(plan, limit_slots(every, slots))


def with_classes(plan: Plan, classes: tuple[SlotClass, ...]) -> Plan:
    """The plan with these slots."""
    slots = sum(each.count for each in classes)
    return replace(plan, slots=slots, slot_classes=classes, cache_nbytes=total_nbytes(classes))


def resized(plan: Plan, most: tuple[SlotClass, ...], asked: str | int) -> Plan:
    """The plan of a loaded model whose cache becomes `asked`, of the slots `most`, which have addresses.

    The bytes of its slots, and what else is free now, may be taken. Raises PlanError for a size that does not fit, and
    for fewer slots than there are sizes of slots.
    """
    bare = replace(plan, cache_nbytes=0, device_free=ram_free() + plan.total_nbytes)
    slots = _slots(bare, most, asked)
    if slots < len(most):
        raise PlanError(
            f"an expert cache of {slots} slots has none for some sizes of experts: give expert_cache={len(most)} or "
            "more"
        )
    return with_slots(plan, most, slots)


def _slots(plan: Plan, every: tuple[SlotClass, ...], asked: str | int) -> int:
    """Slots for `asked`, checked against the room that the rest leaves."""
    room = plan.device_free - plan.reserve_nbytes - plan.total_nbytes
    fitting = fitting_slots(every, room)
    if fitting < 1:
        short = format_bytes(plan.slot_nbytes - room)
        mend = "give a smaller context=" if plan.kv_nbytes > plan.slot_nbytes - room else "free that much memory"
        if plan.other_formats:
            name, nbytes = min(plan.other_formats, key=lambda format: format[1])
            mend += f", or quantise the experts (experts={name} takes {format_bytes(nbytes // plan.experts)} each)"
        raise PlanError(
            f"{plan.model} needs at least {format_bytes(plan.device_free - room + plan.slot_nbytes)} free on "
            f"{plan.device}, where {format_bytes(plan.device_free)} are free, {short} too little: {mend}"
        )
    wanted = _wanted_slots(plan, every, asked)
    if wanted is None:
        return min(plan.experts, fitting)
    slots = min(plan.experts, wanted)
    nbytes = total_nbytes(limit_slots(every, slots))
    if nbytes > room:
        raise PlanError(
            f"an expert cache of {slots} slots ({format_bytes(nbytes)}) does not fit {plan.device}, "
            f"where {format_bytes(room)} are left for it: give expert_cache={fitting} or less, or auto"
        )
    return slots


def _wanted_slots(plan: Plan, every: tuple[SlotClass, ...], asked: str | int) -> int | None:
    """The slots that `expert_cache` asks for; None for auto."""
    forms = 'bytes ("6GiB"), a share ("40%"), a number of slots ("96") or "auto"'
    text = str(asked).strip()
    if text.lower() == "auto":
        return None
    try:
        if text.lstrip("-").isdigit():
            slots = int(text)
        elif text.endswith("%"):
            slots = int(plan.experts * float(text[:-1]) / 100)
        else:
            slots = fitting_slots(every, parse_bytes(text))
    except (ValueError, OverflowError):
        raise PlanError(f"expert_cache={text!r} is none of {forms}: give one of these") from None
    if slots < 1:
        raise PlanError(
            f"expert_cache={text} holds no expert: one takes {format_bytes(plan.slot_nbytes)}: "
            f"give at least that, or 1 slot"
        )
    return slots


def _host_tier(plan: Plan, records: int, config: EngineConfig) -> Plan:
    """Where a device's `records` bytes of experts wait: page-locked RAM up to a cap, other RAM, or their files."""
    if config.host_tier not in HOST_TIERS:
        raise PlanError(f"host_tier {config.host_tier!r} is not one of {', '.join(HOST_TIERS)}: choose one of them")
    free = ram_free()
    staging = config.staging_records * plan.slot_nbytes
    room = free - max(config.reserve, int(free * config.reserve_share)) - staging
    if config.host_tier == "file" or (config.host_tier == "auto" and records > room):
        return replace(plan, pinned_nbytes=staging)
    pinned = min(records, max(0, int(free * config.pinned_share) - staging))
    if pinned == records:
        # All are copied from where they lie.
        return replace(plan, host_tier="pinned", pinned_nbytes=records)
    return replace(plan, host_tier="pageable", pinned_nbytes=pinned + staging, pageable_nbytes=records - pinned)
