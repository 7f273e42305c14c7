"""The values of a configuration, checked before a model is built of them: types, ranges, and what goes together.

transformers builds what a configuration says, however large, and tells of a wrong value only where it fails over it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from edgemoe.checkpoint.foreign.foreign_json import MAX_DEPTH, is_deeper
from edgemoe.errors import CheckpointError
from edgemoe.values import shown, whole_number

MAX_NUMBER = 1 << 53
"""Magnitude of any number: what a float holds exactly."""
MAX_LAYERS = 4096
"""A skeleton of so many layers takes some seconds; published models have fewer than 200."""
MAX_EXPERTS = 1 << 16
MAX_SIZE = 1 << 26
"""Sides of matrices and vocabularies. The largest published vocabulary has 2^20 tokens."""
MAX_CONTEXT = 1 << 40
"""Tokens of a context, which a few families give without a limit."""
LAYERS = re.compile(
    r"^(num_hidden_layers|n_layers?|num_layers|num_nextn_predict_layers|mtp_num_\w*layers|num_mtp_\w+)$"
)
EXPERTS = re.compile(
    r"^(num_\w*experts|n_\w*experts|moe_num_experts|num_experts_per_tok\w*|moe_top_?k|top_k_experts|n_group|topk_group)$"
)
SIZES = re.compile(
    r"^(\w*hidden_size|\w*intermediate_size|vocab_size|\w*head_dim|\w*attention_heads|\w*key_value_heads|n_embd|d_model"
    r"|\w*lora_rank|\w*_kernel_dim|n_heads?|ffn_\w*size)$"
)
CONTEXTS = re.compile(r"^(\w*max_position_embeddings|sliding_window\w*|attention_chunk_size|max_sequence_length)$")
POSITIVE = re.compile(
    r"^(hidden_size|vocab_size|num_attention_heads|num_key_value_heads|num_hidden_layers|n_embd|d_model|n_heads?)$"
)
"""Sizes without which there is no model; others may be 0 where a family leaves a part out."""
ACTIVATIONS = re.compile(r"^(hidden_act|hidden_activation|activation_function|\w+_hidden_act)$")
TOKENS = re.compile(r"^(bos|eos|pad|decoder_start)_token_id$")
NO_LIMIT = (-1,)
"""What some fields of a context say for "no limit"."""


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError, with the field and its value, for what no model can be built of.

    `config` is what a config.json or a GGUF file's metadata say, `source` its name for messages. Fields that are not
    known here are held to be numbers of a sane magnitude, wherever they are numbers.
    """
    if is_deeper(dict(config), MAX_DEPTH):
        raise CheckpointError(f"{source} is nested deeper than {MAX_DEPTH} levels: fetch the checkpoint again")
    for path, name, value in _fields(config, ""):
        why = _fault(name, value)
        if why:
            raise CheckpointError(f"{source}: {path} is {shown(value)}, and must be {why}: fetch the checkpoint again")
    _check_family_names(config, source)
    for each in _parts(config):
        _check_together(each, source)


def check_layers(config: Mapping[str, Any], names: Iterable[str], source: str) -> None:
    """Raises CheckpointError where `config` has more layers than the tensors `names` can belong to.

    Without it, building the model takes as long as the number says.
    """
    declared = [value for _, name, value in _fields(config, "") if LAYERS.match(name) and isinstance(value, int)]
    most = max(declared, default=0)
    if most <= MAX_LAYERS >> 6:
        return
    highest = max((int(number) for name in names for number in re.findall(r"\.(\d{1,6})(?=\.)", name)), default=-1)
    if most > highest + 1:
        raise CheckpointError(
            f"{source}: num_hidden_layers is {most}, and the files have tensors of {highest + 1} layers at most: "
            "fetch the checkpoint again"
        )


def faulty_field(config: Mapping[str, Any], why: str) -> str:
    """The field of `config` whose text is the error `why`, as a message begins with it; empty where there is none."""
    wanted = why.strip("'\"")
    for path, _, value in _fields(config, ""):
        if isinstance(value, str) and value == wanted:
            return f"{path} is "
    return ""


def _fault(name: str, value: Any) -> str:
    """What the field `name` must be, where `value` is not; else an empty text."""
    if ACTIVATIONS.match(name):
        return "" if value is None or isinstance(value, (str, Mapping)) else "the name of a function"
    if TOKENS.match(name):
        numbers = value if isinstance(value, list) else [value]
        return "" if all(each is None or _whole(each, -1, MAX_SIZE) for each in numbers) else "the id of a token"
    for names, limit in ((LAYERS, MAX_LAYERS), (EXPERTS, MAX_EXPERTS), (SIZES, MAX_SIZE), (CONTEXTS, MAX_CONTEXT)):
        if names.match(name):
            return _whole_fault(name, value, limit)
    numbers = value if isinstance(value, list) else [value]
    if all(_sane(each) for each in numbers):
        return ""
    return f"a number of at most {MAX_NUMBER} in magnitude"


def _whole_fault(name: str, value: Any, limit: int) -> str:
    least = 1 if POSITIVE.match(name) else 0
    # Some families have one number for each layer.
    values = value if isinstance(value, list) else [value]
    allowed = NO_LIMIT if CONTEXTS.match(name) else ()
    if all(each is None or each in allowed or _whole(each, least, limit) for each in values):
        return ""
    return f"an integer from {least} to {limit}"


def _whole(value: Any, least: int, most: int) -> bool:
    read = whole_number(value)
    return read is not None and least <= read <= most


def _sane(value: Any) -> bool:
    """Whether a value of any kind is no number, or one that can be computed with; infinity is a published limit."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    return abs(value) <= MAX_NUMBER or (isinstance(value, float) and math.isinf(value))


def _check_family_names(config: Mapping[str, Any], source: str) -> None:
    for part in _parts(config):
        family = part.get("model_type")
        if family is not None and not isinstance(family, str):
            raise CheckpointError(
                f"{source}: model_type is {shown(family)}, and must be the name of a family: fetch the checkpoint again"
            )


def _check_together(config: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError for two fields that contradict each other."""
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if type(heads) is int and type(groups) is int and heads % groups:
        raise CheckpointError(
            f"{source}: num_key_value_heads is {groups}, which does not divide the {heads} of num_attention_heads: "
            "fetch the checkpoint again"
        )
    chosen = config.get("num_experts_per_tok")
    counts = [config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    experts = max((count for count in counts if type(count) is int), default=None)
    if type(chosen) is int and experts and not 1 <= chosen <= experts:
        raise CheckpointError(
            f"{source}: num_experts_per_tok is {chosen}, and must be from 1 to the number of experts, {experts}: "
            "fetch the checkpoint again"
        )


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configuration, and those of its parts, such as `text_config`."""
    yield config
    for name, value in config.items():
        if name.endswith("_config") and isinstance(value, Mapping):
            yield from _parts(value)


def _fields(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, str, Any]]:
    """Every field with its path and its name; of objects and lists, those in them."""
    for name, value in config.items():
        here = f"{path}{name}"
        if isinstance(value, Mapping):
            yield from _fields(value, f"{here}.")
        elif isinstance(value, list) and any(isinstance(each, (Mapping, list)) for each in value):
            yield from _fields({f"{place}": each for place, each in enumerate(value)}, f"{here}.")
        else:
            yield here, str(name), value


def ask_for_logits_alone(config: Any) -> None:
    """Takes back what a transformers configuration has a pass return beside its logits, or in another form.

    The routers' logits are for the loss of a training, and are not kept here.
    """
    for each in (config, *(getattr(config, name) for name in config.sub_configs)):
        if each is not None:
            each.return_dict = True
            if hasattr(each, "output_router_logits"):
                each.output_router_logits = False
