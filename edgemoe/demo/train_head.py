"""Trains the shipped model's multi-token-prediction head: `python -m edgemoe.demo.train_head OUT [--tokens N]`.

OUT holds a copy of the shipped checkpoint, and gets the head's tensors, named `mtp.*` as in Qwen3-Next. The model stays
as it is: the head learns to predict the model's own next tokens, from the model's last hidden state and the token
chosen there. Its output takes the place of the hidden state for the next draft, with the same weights, so one layer
drafts several tokens. The text is that of `edgemoe.demo.train`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeRMSNorm,
    load_balancing_loss_func,
)

from edgemoe.demo.train import IGNORED, PHASES, WEIGHTS, dialogues, learning_rate, windows

PREFIX = "mtp."
"""Prefix of the head's tensors in the checkpoint."""
DEPTH_WEIGHTS = (1.0, 0.8, 0.6)
"""Weight in the loss of the first draft, of the second, and so on."""
DEPTHS = len(DEPTH_WEIGHTS)
BALANCE_WEIGHT = 0.01
"""Weight in the loss of the even use of experts."""
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


class Head(nn.Module):
    """One decoder layer that drafts tokens from a hidden state and the token after it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = Qwen3MoeRMSNorm(width, eps)
        self.pre_fc_norm_hidden = Qwen3MoeRMSNorm(width, eps)
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([Qwen3MoeDecoderLayer(config, layer_idx=0)])
        self.norm = Qwen3MoeRMSNorm(width, eps)

    def forward(
        self, hidden: torch.Tensor, embedded: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> list[torch.Tensor]:
        """The outputs at every depth, each [batch, rows, width], that the model's `lm_head` makes into logits.

        `hidden` [batch, rows, width] is the model's hidden state of every row's token, after its last norm. `embedded`
        [batch, rows + DEPTHS - 1, width] are the embeddings of the tokens from the second row's on, and `cos` and `sin`
        [1, rows + DEPTHS - 1, head_dim] the rotary embeddings of their positions.
        """
        rows = hidden.shape[1]
        cache, outputs = DynamicCache(), []
        for depth in range(DEPTHS):
            part = slice(depth, depth + rows)
            parts = [self.pre_fc_norm_embedding(embedded[:, part]), self.pre_fc_norm_hidden(hidden)]
            mixed = self.layers[0](
                self.fc(torch.cat(parts, -1)),
                attention_mask=draft_mask(rows, depth),
                position_embeddings=(cos[:, part], sin[:, part]),
                past_key_values=cache,
            )
            hidden = self.norm(mixed)
            outputs.append(hidden)
        return outputs


def draft_mask(rows: int, depth: int) -> torch.Tensor:
    """What a row at `depth` (from 0) attends to, as an additive mask [1, 1, rows, rows * (depth + 1)].

    These are the rows up to its own at depth 0, where the tokens are the text's, and its own row at other depths.
    """
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    own = torch.eye(rows, dtype=torch.bool)
    seen = torch.cat([causal] + [own] * depth, -1)
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]


def new_head(model: Qwen3MoeForCausalLM, seed: int = 0) -> Head:
    """An untrained head: random matrices, and the model's last norm. It learns faster than from a copied layer."""
    torch.manual_seed(seed)
    head = Head(model.config)
    for matrix in head.layers.parameters():
        if matrix.dim() > 1:
            nn.init.normal_(matrix, std=model.config.initializer_range)
    nn.init.normal_(head.fc.weight, std=head.fc.in_features**-0.5)
    head.norm.load_state_dict(model.model.norm.state_dict())
    return head


def draft(model: Qwen3MoeForCausalLM, head: Head, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Drafts from every token of `ids` [batch, length], with the text's tokens in place of the drafts before.

    Returns the head's outputs at every depth, each [batch, length - DEPTHS - 1, width], and the model's own logits
    [batch, length, vocabulary]. Row i at depth d (from 0) stands for the logits after token i + d + 1.
    """
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
        embedded = model.model.embed_tokens(ids[:, 1:])
        cos, sin = model.model.rotary_emb(embedded, torch.arange(1, ids.shape[1])[None])
    outputs = head(hidden[:, : ids.shape[1] - DEPTHS - 1], embedded, cos, sin)
    return outputs, logits


def distil(
    model: Qwen3MoeForCausalLM, outputs: list[torch.Tensor], logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, list[float]]:
    """The cross-entropy to the model's probabilities, weighted over depths, where replies have tokens.

    `outputs` and `logits` are those of `draft`, and `labels` [batch, length] those of the text. Also returns how often
    the head's best token is the model's, for every depth.
    """
    loss, agreed = torch.zeros(()), []
    rows = outputs[0].shape[1]
    for depth, (output, weight) in enumerate(zip(outputs, DEPTH_WEIGHTS, strict=True)):
        replied = labels[:, depth + 2 : depth + 2 + rows] != IGNORED
        target = logits[:, depth + 1 : depth + 1 + rows][replied]
        guess = model.lm_head(output[replied])
        loss = loss + weight * functional.cross_entropy(guess, target.softmax(-1))
        agreed.append(float((guess.argmax(-1) == target.argmax(-1)).float().mean()))
    return loss, agreed


def step(
    model: Qwen3MoeForCausalLM, head: Head, optimizer: torch.optim.Optimizer, batch: torch.Tensor
) -> tuple[float, list[float]]:
    """One optimiser step on a batch [2, rows, length]. Returns the loss, and the agreement at every depth."""
    routed: list[torch.Tensor] = []
    gate = head.layers[0].get_submodule("mlp.gate")
    handle = gate.register_forward_hook(lambda _module, _inputs, result: routed.append(result[0]))
    outputs, logits = draft(model, head, batch[0])
    handle.remove()
    loss, agreed = distil(model, outputs, logits, batch[1])
    config, logits_of_gates = model.config, cast(Any, tuple(routed))
    balance = load_balancing_loss_func(logits_of_gates, config.num_experts, config.num_experts_per_tok)
    (loss + BALANCE_WEIGHT * balance).backward()
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), agreed


def save_head(head: Head, out: Path) -> None:
    """Writes the head as bf16 into the checkpoint in `out`, whose other tensors stay as they are."""
    path = out / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(PREFIX)}  # noqa: SIM118
    for name, tensor in head.state_dict().items():
        rounded = tensor.to(torch.bfloat16)
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[PREFIX + name] = rounded.contiguous()
            continue
        stem, part = name.rsplit(".", 1)
        names = EXPERT_PARTS[:2] if part == "gate_up_proj" else EXPERT_PARTS[2:]
        for index, expert in enumerate(rounded):
            for piece, rows in zip(names, expert.chunk(len(names)), strict=True):
                tensors[f"{PREFIX}{stem}.{index}.{piece}.weight"] = rows.clone()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(path)
    config = json.loads((out / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_head(model: Qwen3MoeForCausalLM, out: Path) -> Head:
    """The head of the checkpoint in `out`, in float32."""
    with safe_open(out / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
        tensors = {name[len(PREFIX) :]: file.get_tensor(name).float() for name in names}
    stem = "layers.0.mlp.experts"
    stacks = []
    for piece in EXPERT_PARTS:
        parts = [tensors.pop(f"{stem}.{index}.{piece}.weight") for index in range(model.config.num_experts)]
        stacks.append(torch.stack(parts))
    tensors[f"{stem}.gate_up_proj"] = torch.cat(stacks[:2], 1)
    tensors[f"{stem}.down_proj"] = stacks[2]
    head = Head(model.config)
    head.load_state_dict(tensors)
    return head


def load_model(out: Path) -> Qwen3MoeForCausalLM:
    """The frozen model of the checkpoint in `out`, in float32."""
    model: Qwen3MoeForCausalLM = Qwen3MoeForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.set_experts_implementation("eager")
    model.requires_grad_(False)
    model.eval()
    return model


def train(
    out: Path, tokens: int, tokens_per_step: int = 2048, seen: int = 0, peak: float = 2.5e-3, seed: int = 0
) -> None:
    """Trains the head of the checkpoint in `out` up to `tokens` tokens in all, and saves it there.

    `seen` above 0 continues the training of the head in `out` after that many tokens: the learning rate goes on from
    there, with new text and a new optimiser. `peak` is the highest learning rate.
    """
    model = load_model(out)
    head = load_head(model, out) if seen else new_head(model, seed)
    head.train()
    decayed = [p for p in head.parameters() if p.dim() > 1]
    others = [p for p in head.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    source = dialogues(PreTrainedTokenizerFast.from_pretrained(out), seed + seen, WEIGHTS)
    started, first, steps = time.monotonic(), seen, 0
    for phase in PHASES:
        batches = windows(source, phase.length, max(1, tokens_per_step // phase.length))
        while seen < phase.share * tokens:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(seen / tokens, peak)
            batch = next(batches)
            loss, agreed = step(model, head, optimizer, batch)
            seen += batch[0].numel()
            steps += 1
            if steps % 25 == 0:
                speed = (seen - first) / (time.monotonic() - started)
                shares = " ".join(f"{share:.3f}" for share in agreed)
                sys.stderr.write(f"{seen:>10} tokens  loss {loss:.4f}  agreed {shares}  {speed:.0f} tokens/s\n")
                sys.stderr.flush()
            if steps % 200 == 0:
                save_head(head, out)
    save_head(head, out)


def main() -> None:
    """The command line of the trainer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=3_400_000)
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--seen", type=int, default=0, help="continue training the head in OUT after so many tokens")
    parser.add_argument("--peak", type=float, default=2.5e-3, help="the highest learning rate")
    arguments = parser.parse_args()
    train(arguments.out, arguments.tokens, arguments.tokens_per_step, arguments.seen, arguments.peak)


if __name__ == "__main__":
    main()
