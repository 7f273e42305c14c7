"""Checkpoints of real shapes whose files have no data: holes, which read as zeros and take no space on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bench.support.zoo import config

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}


def make_sparse(family: str, folder: Path, **overrides: Any) -> Path:
    """Writes the configuration of `family` with `overrides`, and a file with all of its tensors in bf16, all zeros.

    The tensors have the names and shapes that transformers saves. Returns `folder`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    auto: Any = AutoModelForCausalLM
    chosen = config(family, **overrides)
    with torch.device("meta"):
        model = auto.from_config(chosen, dtype=torch.bfloat16)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in revert_weight_conversion(model, state).items():
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    written = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    chosen.dtype = torch.bfloat16
    chosen.architectures = [type(model).__name__]
    chosen.save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)
    return folder
