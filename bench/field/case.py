"""A situation from a public report, and what is needed to try it: tiny checkpoints, replies, commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bench.support.byte_tokenizer import with_tokenizer
from bench.support.zoo import make
from edgemoe import Engine, Sampling

PROMPT = (5, 60, 70, 80)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZOOS_ENDS = ("<1>", "<2>")
"""The ids that the zoo's configurations begin and end a text with."""


@dataclass(frozen=True)
class Case:
    """One situation. `check` is given an empty folder; it returns what is wrong, or an empty text."""

    report: str
    """`owner/repository#number` of the report, or several."""
    name: str
    check: Callable[[Path], str]


def same(found: object, right: object) -> str:
    """What is wrong with `found`, where it should be `right`."""
    return "" if found == right else f"{found!r}, not {right!r}"


def holds(text: str, *parts: str) -> str:
    """What `text` lacks of `parts`."""
    missing = [part for part in parts if part not in text]
    return f"{text!r} lacks {missing}" if missing else ""


# --- checkpoints ---------------------------------------------------------------------------------------


def tiny(folder: Path, family: str = "qwen3_moe", **config: Any) -> Path:
    """A random checkpoint with a tokenizer whose tokens are bytes."""
    return with_tokenizer(make(family, folder, **config))


def edit(file: Path, **changes: Any) -> None:
    """Changes fields of a JSON file, which is made where there is none."""
    data = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(data | changes))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def words_tokenizer(
    words: Sequence[str], special: Sequence[str], *, added: Sequence[str] = (), template: str = CHATML, eos: str = ""
) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are whole words, joined without spaces; `added` are tokens that are not special."""
    own = list(dict.fromkeys(["<pad>", *ZOOS_ENDS, *special, *added, *words]))
    vocabulary = {word: number for number, word in enumerate([*own, *(f"w{n}" for n in range(256 - len(own)))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    made.add_tokens([AddedToken(token, special=False) for token in added])
    made.pre_tokenizer = pre_tokenizers.Split("|||", "removed")
    made.decoder = decoders.Fuse()
    ends = {"eos_token": eos} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, pad_token="<pad>", **ends)


def speaking(folder: Path, tokenizer: PreTrainedTokenizerFast, said: Sequence[str], family: str = "qwen3_moe") -> Path:
    """A checkpoint that says `said[1:]` after `said[0]`, greedily. No word may come twice, but the last."""
    make(family, folder)
    tokenizer.save_pretrained(folder)
    vocabulary = tokenizer.get_vocab()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "o_proj" in name or "down_proj" in name:
                tensors[name].zero_()
        generator = torch.Generator().manual_seed(1)
        embeddings = torch.nn.functional.normalize(torch.randn(256, 64, generator=generator), dim=1)
        head = torch.zeros(256, 64)
        for word, following in zip(said, said[1:], strict=False):
            head[vocabulary[following]] += 50 * embeddings[vocabulary[word]]
        tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = embeddings, head

    weights(folder, change)
    return folder


# --- replies -------------------------------------------------------------------------------------------


def reply(folder: Path, prompt: Any = PROMPT, tokens: int = 8, *, sampling: Any = None, **load: Any) -> list[int]:
    """The ids of a greedy reply."""
    with Engine.load(folder, state_folder="none", device="cpu", **load) as engine:
        settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": tokens} | (sampling or {})
        return list(engine.generate(list(prompt), Sampling(**settings)).token_ids)


def reference(folder: Path, prompt: Sequence[int] = PROMPT, tokens: int = 8, **settings: Any) -> list[int]:
    """The ids of transformers' greedy reply."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    settings = {"max_new_tokens": tokens, "do_sample": False} | settings
    return list(model.generate(torch.tensor([list(prompt)]), **settings)[0, len(prompt) :].tolist())


def choice(folder: Path, messages: Sequence[Mapping[str, Any]], *, variables: Any = None, **settings: Any) -> Any:
    """The choice of the completion that answers a conversation greedily; `variables` are the template's."""
    with Engine.load(folder, state_folder="none", device="cpu") as engine:
        sampling = Sampling(**{"temperature": 0.0, "max_tokens": 20} | settings)
        return engine.chat(list(messages), sampling, variables)["choices"][0]


# --- commands ------------------------------------------------------------------------------------------


def edgemoe(
    arguments: Sequence[str | Path],
    *,
    stdin: str = "",
    shell: str = "",
    before: str = "",
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """The command with `arguments`; `shell` is what follows it on a shell's command line, such as `2>&-`.

    `before` comes before it there, in a namespace of its own where it mounts something.
    """
    command = [sys.executable, "-c", "import sys; from edgemoe.cli.main import main; sys.exit(main())"]
    command += [str(each) for each in arguments]
    if shell or before:
        command = ["bash", "-c", f'set -o pipefail; {before}"$@" {shell}', "bash", *command]
    if "mount" in before:
        command = ["unshare", "--mount", *command]
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=180.0,
        env=os.environ | {"EDGEMOE_STATE_FOLDER": "none"} | environment,
    )


def sound(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """What is wrong with how a command ended: its exit code, or a traceback."""
    if "Traceback" in done.stderr + done.stdout:
        return done.stderr[-400:] + done.stdout[-400:]
    return same(done.returncode, code) and f"exit {done.returncode}: {done.stderr[-300:]}"
