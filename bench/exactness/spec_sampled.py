"""`spec-sampled`: the distribution of the first tokens with drafts, over many seeds, against the exact one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.measurement import BaseSize, Measurement
from bench.support.zoo import make
from edgemoe import Engine, Sampling
from edgemoe.model.draft_tree import DraftTree
from edgemoe.quiet import quiet_transformers
from edgemoe.request.request import Request
from edgemoe.request.sampler import Sampler
from edgemoe.sampling import resolve

NAME = "spec-sampled"
BAR = "p > 0.001 for every setting, and a broken acceptance rule fails the same test"
LEAST_P = 0.001
VOCABULARY = 8
PROMPT = [3, 4, 5, 3, 4, 6, 3, 4]
"""With repetitions, so that n-grams draft from the start."""
LOOKED_AT = 3
"""Tokens of each reply whose joint distribution is tested; the second and third may come from a draft."""
TOKENS = 6
"""Tokens of each reply: with fewer there would be no room to draft the first ones."""
MIN_COUNT = 5
"""Runs that a cell of the test is expected to have; rarer ones are pooled."""
BATCH = 128
LIKELY = 0.2
"""The probability from which one of the broken rules takes a drafted token."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Runs of each setting, and every how many-th setting is tried with the rule as it is."""

    runs: int = 20_000
    every: int = 1


FULL, SMALL = Size(), Size(small=True, runs=300, every=4)


@dataclass(frozen=True)
class Setting:
    """What a reply is sampled with, what drafts it, and how many of the 16 experts may be resident."""

    sampling: dict[str, Any]
    speculate: str
    shape: str = "tree"
    slots: int = 4


SETTINGS = (
    Setting({"temperature": 1.0}, "self"),
    Setting({"temperature": 0.7}, "self"),
    Setting({"temperature": 1.0, "top_k": 5, "top_p": 0.9}, "self"),
    Setting({"temperature": 0.7, "min_p": 0.05}, "self", "chain"),
    Setting({"temperature": 1.0}, "ngram"),
    Setting({"temperature": 0.7, "top_k": 6, "top_p": 0.95, "min_p": 0.02}, "ngram"),
    Setting({"temperature": 1.0, "min_p": 0.1}, "ngram+self"),
    Setting({"temperature": 0.7, "repetition_penalty": 1.3}, "ngram+self"),
)

Choose = Callable[[Request, DraftTree, int, torch.Tensor], int]
"""The token after a node of a tree, given the logits there."""


def run(size: Size = FULL) -> Measurement:
    """Every setting with the acceptance rule as it is, then the first of each drafter with every broken one."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoint(Path(name))
        for place, setting in enumerate(SETTINGS[:: size.every]):
            # Other seeds each time: the same ones would be lucky or unlucky in all.
            rows.append(measured(folder, setting, range(place * size.runs, (place + 1) * size.runs)))
        for rule in BROKEN:
            rows += [measured(folder, setting, range(size.runs), rule) for setting in (SETTINGS[0], SETTINGS[4])]
    right = [row for row in rows if row["rule"] == "right"]
    wrong = [row for row in rows if row["rule"] != "right"]
    least, most = min(row["p"] for row in right), max(row["p"] for row in wrong)
    verified = all(row["accepted"] for row in rows)
    value = {"settings": len(right), "least_p": least, "broken_rules": len(wrong), "most_p_of_a_broken_rule": most}
    return Measurement(NAME, value, BAR, least > LEAST_P > most and verified, {"runs": size.runs, "rows": rows})


def measured(folder: Path, setting: Setting, seeds: range, rule: str = "right") -> dict[str, Any]:
    """A row of the table, which it prints: `setting` under the acceptance rule `rule`, a run for each of `seeds`."""
    expected = exact(folder, setting.sampling)
    with accepting(rule):
        counts, stats = sampled(folder, setting, seeds)
    p, cells = chi_square(counts, expected * len(seeds))
    found = {"p": p, "cells": cells, "drafted": stats["drafted"], "accepted": stats["accepted"]}
    how = ", ".join(f"{name} {value}" for name, value in setting.sampling.items())
    print(
        f"{setting.speculate:10} {setting.shape:5} {rule:13} p {p:<8.2g} {cells:3} cells, "
        f"accepted {found['accepted']} of {found['drafted']}; {how}",
        flush=True,
    )
    return {**asdict(setting), "rule": rule, "first_seed": seeds.start, **found}


def checkpoint(folder: Path) -> Path:
    """A tiny qwen3_moe whose next token is neither certain nor anybody's guess, and depends on its experts."""
    from transformers import AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": []}
    with quiet_transformers(), torch.no_grad():
        make("qwen3_moe", folder, **sizes)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, weights in model.named_parameters():
            if "down_proj" in name or "lm_head" in name:
                weights.mul_(4 if "down_proj" in name else 3)
        model.save_pretrained(folder)
    return folder


def exact(folder: Path, settings: dict[str, Any]) -> torch.Tensor:
    """The probability of every beginning of a reply, float64 with a dimension of the vocabulary for each token.

    From the logits that transformers itself gives after every one of its prefixes.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settled = resolve(Sampling(**settings), GenerationConfig(), 1, 1)
    processors: Any = Sampler(settled, len(PROMPT), VOCABULARY).processors
    joint = torch.ones(1, dtype=torch.float64)
    prefixes = torch.tensor([PROMPT])
    for _ in range(LOOKED_AT):
        with torch.inference_mode():
            scores = processors(prefixes, model(prefixes).logits[:, -1])
        joint = (joint[:, None] * scores.double().softmax(-1)).flatten()
        following = torch.arange(VOCABULARY).repeat(len(prefixes))[:, None]
        prefixes = torch.cat([prefixes.repeat_interleave(VOCABULARY, dim=0), following], dim=1)
    return joint.reshape([VOCABULARY] * LOOKED_AT)


def sampled(folder: Path, setting: Setting, seeds: range) -> tuple[torch.Tensor, dict[str, Any]]:
    """How often each beginning came over `seeds`, and the engine's totals."""
    counts = torch.zeros([VOCABULARY] * LOOKED_AT, dtype=torch.float64)
    settings = {"max_tokens": TOKENS, "ignore_eos": True, **setting.sampling}
    with Engine.load(
        folder,
        device="cpu",
        threads=1,
        state_folder="none",
        batch=BATCH,
        expert_cache=setting.slots,
        speculate=setting.speculate,
        draft_shape=setting.shape,
    ) as engine:
        for _, reply in engine.generate_batch((PROMPT, Sampling(seed=seed, **settings)) for seed in seeds):
            if isinstance(reply, Exception):
                raise reply
            counts[reply.token_ids[:LOOKED_AT]] += 1
        return counts, vars(engine.stats)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """How likely counts that are as far from `expected` or farther are by chance, and the cells that this is told by.

    Cells with less than `MIN_COUNT` expected are pooled. What cannot come at all, and did, is never by chance.
    """
    counts, expected = counts.flatten(), expected.flatten()
    if counts[expected == 0].any():
        return 0.0, 0
    order = expected.argsort()
    counts, expected = counts[order], expected[order]
    # The rarest go together, at least until they are expected often enough.
    pooled = max(int((expected < MIN_COUNT).sum()), int((expected.cumsum(0) < MIN_COUNT).sum()) + 1)
    counts = torch.cat([counts[:pooled].sum()[None], counts[pooled:]])
    expected = torch.cat([expected[:pooled].sum()[None], expected[pooled:]])
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2)), len(counts)


# --- broken acceptance rules ---------------------------------------------------------------------


def first_child(request: Request, tree: DraftTree, node: int, logits: torch.Tensor) -> int:
    """Takes what was drafted first, whatever is drawn."""
    drawn, children = request._draw(logits), tree.children(node)
    assert drawn is not None
    return tree.tokens[children[0]] if children else drawn


def likely_child(request: Request, tree: DraftTree, node: int, logits: torch.Tensor) -> int:
    """Takes what was drafted first where the model finds it likely, too, as lossy speculation does."""
    drawn, children = request._draw(logits), tree.children(node)
    assert drawn is not None
    if not children:
        return drawn
    first = tree.tokens[children[0]]
    return first if float(logits.softmax(-1)[first]) > LIKELY else drawn


BROKEN: dict[str, Choose] = {"first child": first_child, "likely child": likely_child}


@contextmanager
def accepting(rule: str) -> Iterator[None]:
    """In the block drafts are accepted by `rule`, one of `BROKEN`, or "right": by the one that there is."""
    kept = Request.verify
    if rule != "right":
        setattr(Request, "verify", _verifying(BROKEN[rule]))  # noqa: B010
    try:
        yield
    finally:
        setattr(Request, "verify", kept)  # noqa: B010


def _verifying(choose: Choose) -> Callable[[Request, DraftTree, torch.Tensor], list[int]]:
    """`Request.verify` with the tokens that `choose` gives."""

    def verify(request: Request, tree: DraftTree, logits: torch.Tensor) -> list[int]:
        node, kept = 0, [0]
        while True:
            token = choose(request, tree, node, logits[node])
            request._append(token, logits[node])
            child = tree.child(node, token)
            if child is None or request.finished:
                return kept
            kept.append(child)
            node = child

    return verify
