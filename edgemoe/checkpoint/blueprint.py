"""Checks a checkpoint against its family and locates its experts, before any weight is read.

transformers builds the model on the meta device, and its own loader then fills it with tensors that have shapes but no
data. Missing, surplus and misshapen tensors are found before anything is loaded.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from edgemoe.cache import accelerator
from edgemoe.cache.record import ExpertId
from edgemoe.cache.safetensors_store import RecordSource
from edgemoe.checkpoint.checkpoint import WEIGHT_DTYPES, Checkpoint, open_checkpoint
from edgemoe.checkpoint.default_dtype import DefaultDtype
from edgemoe.checkpoint.draft_head import FoundHead, HeadShape, attach_head, find_head, of_head
from edgemoe.checkpoint.expert_sources import ExpertSources
from edgemoe.checkpoint.experts_module import ExpertsModule, require_experts_modules
from edgemoe.checkpoint.foreign.config_values import ask_for_logits_alone, check_layers, faulty_field
from edgemoe.checkpoint.packed.packed_modules import PackedModule, find_packed_modules
from edgemoe.checkpoint.renaming import Renaming
from edgemoe.checkpoint.rope_context import context_limit
from edgemoe.config import EngineConfig, choices_of
from edgemoe.demo import DEMO_NAME, demo_folder
from edgemoe.errors import CheckpointError, reason, told_as
from edgemoe.formats.stacked_format import StackedFormat
from edgemoe.quiet import quiet_transformers

NO_BF16 = "the checkpoint is in bfloat16, which this device cannot multiply (dtype=)"
"""Why a checkpoint runs in float16."""
QUANTISED_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Blueprint:
    """A checkpoint that edgemoe can run: checked against its family's model, with all experts located."""

    checkpoint: Checkpoint
    config: Any
    """The transformers configuration."""
    model_class: Any
    dtype: torch.dtype
    """The dtype of the computation; expert records are converted to it as they are read."""
    experts_modules: tuple[ExpertsModule, ...]
    records: Mapping[ExpertId, RecordSource]
    dense_keys: tuple[str, ...]
    """The checkpoint's tensors that are loaded into the model: all but the experts'."""
    dense_nbytes: int
    """Bytes of all weights and buffers but the experts', in the dtypes that the model keeps them in."""
    largest_dense_nbytes: int
    """Bytes of the largest of them; loading may hold it twice."""
    made_experts: str | None = None
    """The format of `formats.made` that the experts' float matrices are quantised to as they are read, if any."""
    made_dense: str | None = None
    """The same of the other linear layers."""
    packed_modules: tuple[PackedModule, ...] = ()
    """The layers outside of the experts whose weights stay packed."""
    dtype_note: str = ""
    """Why the dtype is not the one of the checkpoint although none was asked for; empty where it is."""
    head: HeadShape | None = None
    """The checkpoint's own draft head, where it has one and it is asked for. Its experts modules are the last ones."""
    head_refusal: str = ""
    """Why a head that the checkpoint has is not used; empty where it has none, or it is used."""

    @property
    def pass_modules(self) -> tuple[ExpertsModule, ...]:
        """The experts modules of the model's own passes: all but those of the head, which come last."""
        return tuple(moe for moe in self.experts_modules if not of_head(moe.name))

    @property
    def expert_formats(self) -> tuple[str, ...]:
        """The names of the formats that the experts' matrices are stored in, most of them first."""
        counts: Counter[str] = Counter()
        for moe in self.experts_modules:
            for kind in moe.formats.values():
                counts.update(each.name for each in (kind.formats if isinstance(kind, StackedFormat) else (kind,)))
        return tuple(name for name, _ in counts.most_common())

    @property
    def context_limit(self) -> int | None:
        """The longest sequence that the configuration allows, in tokens; None without a limit."""
        return context_limit(self.config.get_text_config())


def open_blueprint(
    model: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    *,
    offline: bool = False,
    setting: str = "model",
    model_config: str | os.PathLike[str] | None = None,
    experts: str = "native",
    dense: str = "native",
    bf16: bool = True,
    head: bool = False,
) -> Blueprint:
    """The blueprint of `model`: a checkpoint's folder, a GGUF file, a Hugging Face id, or None for the shipped model.

    `model_config` is where a GGUF file's configuration comes from, if not from the file. `experts`, `dense`, `bf16` and
    `head` are those of `read_blueprint`. Raises CheckpointError as `open_checkpoint` and `read_blueprint` do.
    """
    if model is None:
        demo = open_checkpoint(demo_folder(), name=DEMO_NAME)
        return read_blueprint(demo, dtype, experts, dense, bf16=bf16, head=head)
    checkpoint = open_checkpoint(model, offline=offline, setting=setting, check=check_family, model_config=model_config)
    return read_blueprint(checkpoint, dtype, experts, dense, bf16=bf16, head=head)


def blueprint_for(model: str | os.PathLike[str] | None, config: EngineConfig) -> Blueprint:
    """The blueprint of `model` under the settings in `config`. Raises as `open_blueprint` does."""
    return open_blueprint(
        model,
        config.dtype,
        offline=config.offline,
        model_config=config.model_config,
        experts=config.experts,
        dense=config.dense,
        bf16=_multiplies_bf16(config.device),
        head=config.drafts_with_head,
    )


def _multiplies_bf16(device: str) -> bool:
    """Whether the device that the setting `device` means does; True where it means none that is there."""
    name = accelerator.TYPE if device == "auto" else device
    try:
        meant = torch.device(name)
    except RuntimeError:
        return True
    there = accelerator.is_accelerator(meant) and (meant.index or 0) < accelerator.count()
    return not there or accelerator.multiplies_bf16(meant)


def read_blueprint(
    checkpoint: Checkpoint,
    dtype: str = "auto",
    experts: str = "native",
    dense: str = "native",
    *,
    quick: bool = False,
    bf16: bool = True,
    head: bool = False,
) -> Blueprint:
    """Checks `checkpoint` against its family and locates every expert. Reads no weight.

    `dtype` is "auto" (the dtype that most weights are stored in), "bfloat16", "float16" or "float32"; `experts` and
    `dense` are "native" or a format of `formats.made`. `quick` leaves out the shapes of the experts, since a large
    checkpoint has tens of thousands, and is not for running it. Without `bf16`, for a device that cannot multiply
    bfloat16, "auto" is float16 in its place. With `head` the checkpoint's own draft head is part of the model, where it
    has one that can be. Raises CheckpointError with the reason why the checkpoint cannot be run.
    """
    made, made_dense = _made("experts", experts), _made("dense", dense)
    config, model_class = _family(checkpoint)
    found = find_head(checkpoint, config.get_text_config(), wanted=head)
    chosen, note = _dtype_for_device(_dtype(checkpoint, dtype), bf16=bf16 or dtype != "auto")
    reader = _Reader(config, model_class, chosen, made, made_dense, quick)
    check_layers(checkpoint.config, checkpoint.weights, _source(checkpoint))
    if found.shape is None:
        return replace(reader.read(found), dtype_note=note, head_refusal=found.refusal)
    try:
        return replace(reader.read(found), dtype_note=note)
    except CheckpointError as error:
        # The model runs without the head, if it is the head that does not fit.
        bare = find_head(checkpoint, config.get_text_config(), wanted=False)
        return replace(reader.read(bare), dtype_note=note, head_refusal=reason(error))


class _Reader(NamedTuple):
    """What a checkpoint is checked against."""

    config: Any
    model_class: Any
    dtype: torch.dtype
    made: str | None
    made_dense: str | None
    quick: bool

    def read(self, found: FoundHead) -> Blueprint:
        """The blueprint of a checkpoint; raises as `read_blueprint`, with a head the reason alone."""
        checkpoint = found.checkpoint
        with quiet_transformers(), _told_of_family(checkpoint, self.config, head=found.shape is not None):
            model = build_skeleton(self.model_class, self.config, self.dtype, found.shape)
            experts_modules = require_experts_modules(model, self.config, checkpoint.name)
            renaming = Renaming(model, _mapping(model))
            sources = ExpertSources(checkpoint, model, experts_modules, renaming, self.made)
            experts_modules = sources.modules
            outside = {key: weight for key, weight in checkpoint.weights.items() if key not in sources.keys}
            counts = {moe.experts for moe in experts_modules}
            packed = find_packed_modules(model, outside, renaming, self.made_dense, counts)
            stacked = {f"{moe.name}.{name}" for moe in experts_modules for name in moe.shapes} if self.quick else set()
            _dry_run(checkpoint, model, self.dtype, sources.keys if self.quick else frozenset(), stacked)
            records = sources.records()
            # A new skeleton, since the dry run uses the first one up.
            skeleton = build_skeleton(self.model_class, self.config, self.dtype, found.shape)
            sizes = _dense_sizes(skeleton, experts_modules, packed)
        return Blueprint(
            checkpoint,
            self.config,
            self.model_class,
            self.dtype,
            tuple(experts_modules),
            records,
            tuple(outside),
            sum(sizes),
            max([*sizes, *(each.float_nbytes for each in packed)]),
            self.made,
            self.made_dense,
            tuple(packed),
            head=found.shape,
        )


def _made(setting: str, name: str) -> str | None:
    """The format that `setting` asks to quantise to; None for "native". Raises CheckpointError for no format."""
    choices = choices_of(setting)
    if name not in choices:
        raise CheckpointError(f"{setting} {name!r} is not one of {', '.join(choices)}: choose one as {setting}=")
    return None if name == "native" else name


def check_family(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the configuration of `checkpoint`, whose weights are not there yet, can be run."""
    config, model_class = _family(checkpoint)
    with quiet_transformers(), _told_of_family(checkpoint, config):
        require_experts_modules(build_skeleton(model_class, config, torch.bfloat16), config, checkpoint.name)


def _told_of_family(checkpoint: Checkpoint, config: Any, *, head: bool = False) -> AbstractContextManager[None]:
    """Raises what transformers raises over a configuration as a CheckpointError with the value that it fails at.

    With a `head`, which it may be the fault of, the message is the reason alone.
    """

    def told(why: str) -> CheckpointError:
        if head:
            return CheckpointError(why)
        named = faulty_field(config.to_dict(), why)
        return CheckpointError(
            f"{_source(checkpoint)} does not describe a {config.model_type} model ({named}{why}): fetch it again"
        )

    return told_as(told)


def _source(checkpoint: Checkpoint) -> str:
    """Where the configuration comes from, for messages."""
    return checkpoint.name if checkpoint.gguf is not None else str(checkpoint.folder / "config.json")


def build_skeleton(model_class: Any, config: Any, dtype: torch.dtype, head: HeadShape | None = None) -> Any:
    """The model, and the `head` that it is to have, with every tensor on the meta device."""
    with torch.device("meta"), DefaultDtype(dtype):
        # Given the dtype, transformers would make it that of all of the process's threads meanwhile.
        model = model_class._from_config(config, dtype=torch.get_default_dtype())
        for each in (config, *(getattr(config, name) for name in config.sub_configs)):
            if each is not None:
                each.dtype = dtype
        if head is not None:
            attach_head(model, head, dtype)
    return model.eval()


def load_config(model: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The configuration with which transformers' loader fills `model` on `device`."""
    from transformers.modeling_utils import LoadStateDictConfig

    return LoadStateDictConfig(
        device_map={"": torch.device(device)},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=_mapping(model),
    )


def _mapping(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping: list[Any] = get_model_conversion_mapping(model)
    return mapping


def _family(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The checkpoint's configuration, and its family's class of causal language models."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    family = checkpoint.config["model_type"]
    if family not in CONFIG_MAPPING:
        if "auto_map" in checkpoint.config:
            raise CheckpointError(
                f"{checkpoint.name} ({family}) needs code from its own folder, which edgemoe never runs: "
                "use a family that transformers itself has"
            )
        raise CheckpointError(f"{checkpoint.name} is of the family {family}, unknown to this transformers: upgrade it")
    invalid = f"{_source(checkpoint)} is not a valid {family} configuration"
    with quiet_transformers(), told_as(lambda why: CheckpointError(f"{invalid}: {why}: fetch it again"), of_files=True):
        if checkpoint.gguf is not None:
            config = CONFIG_MAPPING[family].from_dict(dict(checkpoint.config))
        else:
            config = CONFIG_MAPPING[family].from_pretrained(checkpoint.folder)
    # What it says of the weights in the files concerns the checkpoint alone: the model is built of float tensors.
    vars(config).pop("quantization_config", None)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{checkpoint.name} is of the family {family}, which is no causal language model: edgemoe cannot run it"
        )
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(model_class, "config_class", None) is config.sub_configs.get("text_config"):
        # A multimodal checkpoint: only its text model is run, as by transformers' auto class.
        config = config.get_text_config()
    ask_for_logits_alone(config)
    return config, model_class


def _dtype(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """The dtype of the computation; "auto" is the dtype of most bytes of the checkpoint's weights."""
    weights = {key: entry for key, entry in checkpoint.tensors.items() if entry.dtype.is_floating_point}
    unusable = [key for key, entry in weights.items() if entry.dtype not in WEIGHT_DTYPES]
    # Quantised weights are 8- to 32-bit integers; some families have tables and counters of 64-bit ones.
    integers = [key for key, entry in checkpoint.tensors.items() if entry.dtype in QUANTISED_DTYPES]
    for key in unusable + integers:
        stored_as = checkpoint.tensors[key].dtype
        raise CheckpointError(
            f"{checkpoint.name}: {key} is stored as {stored_as}: only bf16, fp16 and fp32 weights are supported"
        )
    if not weights and not checkpoint.packed:
        raise CheckpointError(f"{checkpoint.name} has no floating-point weights: fetch it again")
    names = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    said = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    if dtype == "auto" and checkpoint.packed and said in names:
        return names[said]
    if dtype != "auto":
        if dtype not in names:
            raise CheckpointError(f"dtype {dtype!r} is not one of auto, {', '.join(names)}: choose one as dtype=")
        return names[dtype]
    stored: Counter[torch.dtype] = Counter()
    for entry in weights.values():
        stored[entry.dtype] += entry.nbytes
    return stored.most_common(1)[0][0] if stored else torch.bfloat16


def _dtype_for_device(dtype: torch.dtype, *, bf16: bool) -> tuple[torch.dtype, str]:
    """What to compute in on a device that multiplies bfloat16, or does not, and why if it is not `dtype`."""
    return (torch.float16, NO_BF16) if dtype is torch.bfloat16 and not bf16 else (dtype, "")


def _dry_run(
    checkpoint: Checkpoint, model: Any, dtype: torch.dtype, left_out: frozenset[str], parameters: set[str]
) -> None:
    """Loads shapes without data into `model`, which is of no use afterwards. Raises CheckpointError unless all fit.

    The tensors `left_out` are not looked at, nor are the `parameters` that they make up.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    # Packed weights are floats to transformers.
    dtypes = dict.fromkeys(checkpoint.packed, dtype) | {key: each.dtype for key, each in checkpoint.tensors.items()}
    shapes = {
        key: torch.empty(weight.shape, dtype=dtypes[key], device="meta")
        for key, weight in checkpoint.weights.items()
        if key not in left_out
    }
    info, _ = convert_and_load_state_dict_in_model(model, shapes, load_config(model, dtype, "meta"), None)
    info.missing_keys -= parameters | set(model.all_tied_weights_keys)
    model._adjust_missing_and_unexpected_keys(info)
    faults = [
        ("lacks", sorted(info.missing_keys)),
        ("has the unknown tensor", sorted(info.unexpected_keys)),
        ("has a tensor that cannot be converted,", sorted(info.conversion_errors)),
    ]
    for verb, keys in faults:
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(
                f"{checkpoint.name} does not match its family {model.config.model_type}: "
                f"it {verb} {keys[0]}{more}: fetch it again"
            )
    for key, found, expected in sorted(info.mismatched_keys):
        raise CheckpointError(
            f"{checkpoint.name} does not match its configuration: {key} is {list(found)} "
            f"and should be {list(expected)}: fetch it again"
        )


def _dense_sizes(skeleton: Any, experts_modules: Sequence[ExpertsModule], packed: Sequence[PackedModule]) -> list[int]:
    """Bytes of each weight and buffer but the experts'; tied weights count once."""
    experts = {f"{moe.name}.{name}" for moe in experts_modules for name in moe.shapes}
    elsewhere = experts | set(skeleton.all_tied_weights_keys) | {f"{each.name}.weight" for each in packed}
    tensors = [*skeleton.named_parameters(), *skeleton.named_buffers()]
    kept = [value for name, value in tensors if name not in elsewhere]
    sizes = [math.prod(value.shape) * value.dtype.itemsize for value in kept]
    return sizes + [each.nbytes for each in packed]
