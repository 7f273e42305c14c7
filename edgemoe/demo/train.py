"""Trains the shipped model from scratch: `python -m edgemoe.demo.train OUT [--tokens N]`.

`edgemoe.demo.tasks` writes the text, so that no data set is needed and the result has the project's own licence. Two
CPU cores take about an hour. The model is a Qwen3-MoE by transformers, with its own forward. The training is seeded but
not bit-reproducible between machines, since the order of floating-point sums depends on the number of threads.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from edgemoe.demo.tasks import TASKS

VOCABULARY_SIZE = 1024
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BOS, END, SYSTEM, USER, ASSISTANT = range(len(SPECIAL_TOKENS))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You are the demo model of edgemoe.")
IGNORED = -100


@dataclass(frozen=True)
class Phase:
    """A phase of the training: windows of `length` tokens, until the `share` of all tokens is reached."""

    length: int
    share: float


PHASES = (Phase(256, 0.72), Phase(1024, 0.93), Phase(2048, 1.0))
WEIGHTS = {"repeat": 2.5, "replace": 3, "arithmetic": 5, "count": 2.5, "code": 1, "story": 1.2,
           "recall": 2, "capitals": 0.7, "greetings": 1.2}  # fmt: skip
"""Relative frequency of each task in the text; the tasks that are hardest to learn are the most frequent."""
FAVOUR = 4
"""Factor of the frequency of favoured tasks."""


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the tasks' text. Every digit is a token, so that sums can be learnt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = [task.items(seed, held_out=False) for task in TASKS]
    texts = (text for _ in range(3000) for source in sources for text in next(source)[1:])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def new_model(seed: int = 0) -> Qwen3MoeForCausalLM:
    """The untrained model: 6 layers of 32 experts, 4 active; 2.2 of its 11.4 million parameters are active."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 192,
        "moe_intermediate_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 2048,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
        "use_cache": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": END,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))


def dialogues(
    tokenizer: PreTrainedTokenizerFast, seed: int, weights: Mapping[str, float]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields dialogues without end as (token ids, labels), with tasks drawn by `weights`. Only replies have labels."""
    rng = random.Random(f"dialogues/{seed}")
    sources = {task.name: task.items(seed, held_out=False) for task in TASKS}
    while True:
        ids, labels = [BOS], [IGNORED]
        if rng.random() < 0.2:
            ids += [SYSTEM, *tokenizer.encode(rng.choice(SYSTEM_PROMPTS)), END]
        for _ in range(rng.choice([1, 1, 2, 3, 5])):
            name = rng.choices(list(weights), list(weights.values()))[0]
            item = next(sources[name])
            asked = [USER, *tokenizer.encode(item.user), END, ASSISTANT]
            said = [*tokenizer.encode(item.reply), END]
            labels += [IGNORED] * (len(ids) - len(labels) + len(asked)) + said
            ids += asked + said
        yield ids, labels


def windows(source: Iterator[tuple[list[int], list[int]]], length: int, rows: int) -> Iterator[torch.Tensor]:
    """Yields batches of ids and labels, int64 [2, rows, length]; every row begins with a dialogue."""
    while True:
        batch = torch.full((2, rows, length), IGNORED)
        batch[0] = PAD
        for row in range(rows):
            ids: list[int] = []
            labels: list[int] = []
            while len(ids) < length:
                more_ids, more_labels = next(source)
                ids += more_ids
                labels += more_labels
            batch[0, row] = torch.tensor(ids[:length])
            batch[1, row] = torch.tensor(labels[:length])
        yield batch


def learning_rate(progress: float, peak: float = 3e-3) -> float:
    """Linear warm-up over the first 2 %, then cosine decay to 2 % of `peak`; `progress` is from 0 to 1."""
    if progress < 0.02:
        return peak * (progress + 1e-3) / 0.021
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98)))


def step(model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    """One optimiser step on a batch [2, rows, length]. Returns the loss."""
    output = model(input_ids=batch[0], labels=batch[1], output_router_logits=True)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(output.loss.detach())


def train(
    out: Path, tokens: int, tokens_per_step: int = 4096, seen: int = 0, favoured: Sequence[str] = (), seed: int = 0
) -> None:
    """Trains up to `tokens` tokens in all, and saves a bf16 checkpoint with its tokenizer to `out`.

    `seen` above 0 continues the training of the checkpoint in `out` after that many tokens: the learning rate goes on
    from there, with new text and a new optimiser. `favoured` tasks are `FAVOUR` times as frequent.
    """
    tokenizer = train_tokenizer(seed)
    model = Qwen3MoeForCausalLM.from_pretrained(out, dtype=torch.float32) if seen else new_model(seed)
    model.train()
    model.set_experts_implementation("eager")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    weights = {name: weight * (FAVOUR if name in favoured else 1) for name, weight in WEIGHTS.items()}
    source = dialogues(tokenizer, seed + seen, weights)
    started, first, steps = time.monotonic(), seen, 0
    for phase in PHASES:
        batches = windows(source, phase.length, max(1, tokens_per_step // phase.length))
        while seen < phase.share * tokens:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(seen / tokens)
            batch = next(batches)
            loss = step(model, optimizer, batch)
            seen += batch[0].numel()
            steps += 1
            if steps % 25 == 0:
                speed = (seen - first) / (time.monotonic() - started)
                print(f"{seen:>10} tokens  loss {loss:.4f}  {speed:.0f} tokens/s", file=sys.stderr, flush=True)
            if steps % 500 == 0:
                save(model, tokenizer, out)
    save(model, tokenizer, out)


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the shipped files: one bf16 safetensors file, and the tokenizer with its chat template."""
    rounded: Any = copy.deepcopy(model)
    rounded.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)


def main() -> None:
    """The command line of the trainer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=16_000_000)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument(
        "--seen", type=int, default=0, help="continue training the checkpoint in OUT after so many tokens"
    )
    parser.add_argument("--favour", nargs="*", default=[], choices=list(WEIGHTS), help="tasks to make more frequent")
    arguments = parser.parse_args()
    train(arguments.out, arguments.tokens, arguments.tokens_per_step, arguments.seen, arguments.favour)


if __name__ == "__main__":
    main()
