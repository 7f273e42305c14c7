"""Passes as graphs: which families' are captured, and whether they give the tokens of plain passes and of the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.device.processes import in_processes
from bench.device.section import Found, SkippedError, Target
from bench.support.engine_parts import runner_of
from edgemoe import Engine, Sampling
from edgemoe.kernels.triton.availability import missing
from edgemoe.quiet import quiet_transformers

FAMILIES = (
    "qwen3_moe", "gpt_oss", "mixtral", "glm4_moe", "gemma4_text", "deepseek_v3", "qwen2_moe", "olmoe", "minimax_m2",
    "phimoe",
)  # fmt: skip
"""Popular ones, with every kind of attention that a kernel computes."""
MUST = frozenset({"qwen3_moe", "gpt_oss", "mixtral", "glm4_moe", "gemma4_text"})
"""Families whose passes have to be captured; the others may say why they are not."""
PROCESSES = 10
TIMEOUT = 75.0
PROMPTS = 3
TOKENS, SMALL_TOKENS = 24, 4
SMALLER: dict[str, Any] = {"num_hidden_layers": 2}
"""Of a dry run: the interpreter is slow."""
RULE = "reselect"
"""Of the self-drafts: one that asks the host nothing."""


def measure(target: Target) -> Found:
    """By family: why its passes are not captured, the graphs that were made, and which tokens are the same."""
    if reason := missing():
        raise SkippedError(reason)
    families = FAMILIES[:1] if target.small else FAMILIES
    found = in_processes(__name__, target, families, PROCESSES, TIMEOUT)
    faults = [f"{family}: {fault}" for family, each in found.items() for fault in _faults(family, each)]
    return Found(dict(found), faults + [f"{family} was not reached" for family in families if family not in found])


def _faults(family: str, each: dict[str, Any]) -> list[str]:
    if "error" in each:
        return [each["error"]]
    faults = [f"other tokens {which}" for which, same in each["same"].items() if not same]
    if each["refusal"] and family in MUST:
        faults.append(f"its passes are not captured: {each['refusal']}")
    if each["draft_refusals"]:
        faults.append(f"drafts are not captured: {each['draft_refusals']}")
    if not each["refusal"] and not (each["graphs"] and each["draft_graphs"]):
        faults.append(f"no pass was replayed: graphs of {each['graphs']} tokens, {each['draft_graphs']} in drafts")
    return faults


def found(family: str, device: str, small: bool) -> dict[str, Any]:
    """One family, in float32, with half of its experts in slots; a dry run takes the CPU for a card."""
    count, prompts = (SMALL_TOKENS, 1) if small else (TOKENS, PROMPTS)
    from bench.support.zoo import make

    with tempfile.TemporaryDirectory(prefix="edgemoe-graphs-") as name:
        folder = Path(name) / family
        with quiet_transformers():
            make(family, folder, **(SMALLER if small else {}))
        asked = [_prompt(number) for number in range(prompts)]
        with _loaded(folder, "cpu", speculate="off") as engine:
            right = [_reply(engine, prompt, count) for prompt in asked]
        with _card(device):
            return _on_card(folder, device, asked, right, count)


def _on_card(
    folder: Path, device: str, prompts: Sequence[list[int]], right: list[list[int]], count: int
) -> dict[str, Any]:
    with _loaded(folder, device, speculate="off") as engine:
        replayed = [_reply(engine, prompt, count) for prompt in prompts]
        runner = runner_of(engine)
        refusal, graphs = runner.graph_refusal, _graphs(engine)
    with _without_graphs(), _loaded(folder, device, speculate="off") as engine:
        plain = [_reply(engine, prompt, count) for prompt in prompts]
    with _loaded(folder, device, speculate="self", draft_rule=RULE) as engine:
        drafted = [_reply(engine, prompt, count) for prompt in prompts[:1]]
        drafts, draft_refusals = _graphs(engine), _refusals(engine)
    same = {
        "than the CPU": replayed == right,
        "with graphs than without": replayed == plain,
        "with self-drafts": drafted == plain[:1],
    }
    if len(prompts) > 1:
        with _loaded(folder, device, speculate="off", batch=len(prompts)) as engine:
            same["of several sequences together"] = _together(engine, prompts, count) == plain
    return {
        "same": same,
        "refusal": refusal,
        "graphs": [tokens for tokens, rule in graphs if not rule],
        "draft_graphs": [tokens for tokens, kind in drafts if kind == RULE],
        "draft_refusals": draft_refusals,
        "packs": runner.packs,
        "verifies": runner.verifies,
    }


def _prompt(number: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return [int(each) for each in torch.randint(3, 250, (11 + 3 * number,), generator=generator)]


@contextmanager
def _loaded(folder: Path, device: str, *, batch: int = 1, **settings: Any) -> Iterator[Engine]:
    common: dict[str, Any] = {
        "dtype": "float32",
        "expert_cache": "50%",
        "context": 256,
        "threads": 1,
        "state_folder": "none",
    }
    with Engine.load(folder, device=device, batch=batch, **common, **settings) as engine:
        yield engine


def _reply(engine: Engine, prompt: list[int], count: int) -> list[int]:
    return list(engine.generate(prompt, _sampling(count)).token_ids)


def _together(engine: Engine, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    replies = []
    for _, reply in engine.generate_batch([(prompt, _sampling(count)) for prompt in prompts]):
        if isinstance(reply, Exception):
            raise reply
        replies.append(list(reply.token_ids))
    return replies


def _sampling(count: int) -> Sampling:
    return Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)


def _graphs(engine: Engine) -> list[tuple[int, str]]:
    """Tokens of each graph that was captured, and the rule of a draft, "whole" with all experts, or nothing."""
    graphs = runner_of(engine)._graphs
    return [] if graphs is None else sorted(graphs._graphs)


def _refusals(engine: Engine) -> dict[str, str]:
    """Why drafts are not captured, by their rule."""
    graphs = runner_of(engine)._graphs
    return {} if graphs is None else dict(graphs._refusals)


@contextmanager
def _without_graphs() -> Iterator[None]:
    """In the block, engines are loaded that run every pass as PyTorch does, with the kernels of experts."""
    with mock.patch("edgemoe.runtime.Runtime._device_passes", return_value=None):
        yield


@contextmanager
def _card(device: str) -> Iterator[None]:
    """In the block `device` is a card: where it is the CPU, for a dry run, a stand-in."""
    with ExitStack() as stack:
        if not device.startswith("cuda"):
            import pytest

            from bench.support.no_card.quick_interpreter import quick_interpreter
            from tests.support import pretend_card

            stack.enter_context(quick_interpreter())
            pretend_card.install(stack.enter_context(pytest.MonkeyPatch.context()))
        yield
