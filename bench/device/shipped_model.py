"""The shipped model with every way of drafting and in a batch: the same tokens, and what `close` gives back."""

from __future__ import annotations

import gc
from typing import Any

from bench.device.section import Found, Target
from bench.device.timing import device_memory, kept
from bench.support.engine_parts import runner_of
from edgemoe import Engine, Sampling

PROMPT = "Write the numbers from one to twenty, one a line."
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"speculate": "off"},
    "ngram": {"speculate": "ngram"},
    "self": {"speculate": "self"},
    "ngram+self": {"speculate": "ngram+self"},
    "budget of all": {"speculate": "ngram", "budget": "100%"},
}
"""All exact, so that all say the same."""
SEQUENCES = 8


def measure(target: Target) -> Found:
    """Whether all ways give the same tokens, what one pass can do, and the card's memory around it."""
    tokens = 12 if target.small else 48
    before = device_memory()
    figures: dict[str, Any] = {}
    faults: list[str] = []
    expected: list[int] = []
    for name, how in WAYS.items():
        ids, figures[name] = _reply(target, how, tokens)
        expected = expected or ids
        figures[name]["same"] = ids == expected
        faults += _faults(name, figures[name])
    figures["batch same"] = _batch(target, tokens // 2) == [expected[: tokens // 2]] * SEQUENCES
    if not figures["batch same"]:
        faults.append(f"{SEQUENCES} sequences together do not say what one says alone")
    gc.collect()
    after = device_memory()
    figures["MiB before and after"] = [before, after]
    return Found(figures, faults + kept(before, after))


def _reply(target: Target, how: dict[str, Any], tokens: int) -> tuple[list[int], dict[str, Any]]:
    with _load(target, **how) as engine:
        reply = engine.generate(PROMPT, Sampling(temperature=0.0, max_tokens=tokens))
        runner = runner_of(engine)
        figures = {
            "packs": runner.packs,
            "verifies": runner.verifies,
            "refusal": runner.refusal if not runner.verifies else "",
            "tier": engine.plan.host_tier,
        }
        return list(reply.token_ids), figures


def _batch(target: Target, tokens: int) -> list[list[int]]:
    with _load(target, speculate="off", batch=SEQUENCES) as engine:
        request = PROMPT, Sampling(temperature=0.0, max_tokens=tokens)
        replies = [reply for _, reply in engine.generate_batch([request] * SEQUENCES)]
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return [list(reply.token_ids) for reply in replies if not isinstance(reply, Exception)]


def _load(target: Target, **how: Any) -> Engine:
    return Engine.load(device=target.device, expert_cache="50%", dtype="float32", state_folder="none", **how)


def _faults(name: str, figures: dict[str, Any]) -> list[str]:
    """What is wrong with one way; `packs` and `verifies` also say no where a try on the model raised something."""
    faults = []
    if not figures["same"]:
        faults.append(f"{name}: other tokens than without drafts")
    if not figures["packs"]:
        faults.append(f"{name}: sequences do not run packed in one pass")
    if figures["verifies"] != "tree":
        faults.append(f"{name}: a pass does not verify a tree: {figures['refusal']}")
    return faults
