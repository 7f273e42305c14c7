"""llama.cpp's own converter on a tiny checkpoint, in a process of its own: `SOURCE CHECKPOINT OUT TYPE`.

It knows a tokenizer by the hash of what it makes of a text, and that of the zoo's checkpoints is none that it knows: it
is told that they split texts as GPT-2 does.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

WITHOUT_DRAFTS = ("qwen3_5", "qwen3_next")
"""Families whose configuration has layers that draft, and whose tiny checkpoints have none."""


def main(source: Path, checkpoint: Path, out: Path, kind: str) -> None:
    """Converts `checkpoint`, whose config.json is given what the converter looks for, to `out`: f32 or bf16."""
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    text_model: Any = importlib.import_module("conversion.base").TextModel
    text_model.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    text_model._set_vocab_glm = lambda self: self._set_vocab_gpt2()
    arguments = [str(checkpoint), "--outfile", str(out), "--outtype", kind]
    file = checkpoint / "config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    if config["model_type"].startswith(WITHOUT_DRAFTS):
        config["mtp_num_hidden_layers"] = 0
        arguments.append("--no-mtp")
    if config["model_type"] == "minimax_m2":
        # transformers writes it as a share of the width.
        config["rotary_dim"] = int(config["head_dim"] * config["rope_parameters"].get("partial_rotary_factor", 1))
    file.write_text(json.dumps(config))
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
