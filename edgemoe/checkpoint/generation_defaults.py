"""What a checkpoint says about generation: its `generation_config.json`, checked, and what of it is not served."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgemoe.checkpoint.blueprint import Blueprint
from edgemoe.checkpoint.foreign.generation_values import check_generation, check_generation_file
from edgemoe.errors import CheckpointError, told_as
from edgemoe.quiet import quiet_transformers

_ANYTHING: Callable[[Any], bool] = bool
NOT_SERVED: dict[str, Callable[[Any], bool]] = {
    "num_beams": lambda value: value != 1,
    "num_beam_groups": lambda value: value != 1,
    "diversity_penalty": _ANYTHING,
    "constraints": _ANYTHING,
    "force_words_ids": _ANYTHING,
    "penalty_alpha": _ANYTHING,
    "guidance_scale": lambda value: value != 1,
    "dola_layers": _ANYTHING,
    "token_healing": _ANYTHING,
    "encoder_repetition_penalty": lambda value: value != 1,
    "encoder_no_repeat_ngram_size": _ANYTHING,
    "presence_penalty": _ANYTHING,
    "frequency_penalty": _ANYTHING,
}
"""Fields that change a reply and that are not done, each with the test of whether its value asks for anything.

The last two are no fields of transformers: `generate` leaves them out as well, and a request may give them.
"""


def load_generation_defaults(blueprint: Blueprint) -> Any:
    """The checkpoint's `generation_config.json` as a GenerationConfig; without one, what its configuration implies.

    Raises CheckpointError if the file cannot be read.
    """
    from transformers import GenerationConfig

    file = _file(blueprint)
    with quiet_transformers():
        if os.path.lexists(file) and blueprint.checkpoint.gguf is None:
            check_generation_file(file)
            with told_as(
                lambda why: CheckpointError(f"{file} cannot be read ({why}): fetch it again, or remove it"),
                of_files=True,
            ):
                return GenerationConfig.from_pretrained(file.parent, local_files_only=True)
        implied = GenerationConfig.from_model_config(blueprint.config)
    check_generation(implied.to_dict(), generation_source(blueprint))
    return implied


def generation_source(blueprint: Blueprint) -> str:
    """What the generation defaults come from, for messages."""
    file = _file(blueprint)
    return str(file if file.exists() else blueprint.checkpoint.folder / "config.json")


def _file(blueprint: Blueprint) -> Path:
    return blueprint.checkpoint.folder / "generation_config.json"


def not_served(defaults: Any) -> list[str]:
    """The fields of `defaults`, a GenerationConfig, that ask for something that is not done, as "name=value"."""
    found = []
    for name, asks in NOT_SERVED.items():
        value = getattr(defaults, name, None)
        if value is not None and asks(value):
            found.append(f"{name}={value!r}")
    return found
