"""`quality`: what quantised experts of the shipped model cost, against the same model in bf16."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import loaded
from bench.support.packed_models import gguf_of
from edgemoe.demo import demo_folder
from edgemoe.measure.evaluation import Evaluation, task_eval_texts

NAME = "quality"
BAR = "int8: score unchanged, mean KL <= 1e-3; 4 bits: at most one point of 100 less"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Tokens that are predicted, and questions of each of the nine tasks."""

    tokens: int = 2048
    questions: int = 12


FULL, SMALL = Size(), Size(small=True, tokens=64, questions=1)


def run(size: Size = FULL) -> Measurement:
    """Held-out conversations, teacher-forced, and held-out questions, each format against bf16."""
    source = demo_folder()
    # As in llama.cpp's Q4_K_M, down projections have a bit more; rows of 96 fit no block of 256 values.
    q4 = gguf_of(source, "Q4", "Q4_1", "Q5_0", ffn_down_exps="Q5_1")
    variants: dict[str, dict[str, Any]] = {name: {"experts": name} for name in ("int8", "nf4", "int4", "fp4")}
    variants["Q4 (GGUF)"] = q4
    figures = {name: _quality(settings, size) for name, settings in variants.items()}
    eight, worst = figures["int8"], min(figures[name]["points"] for name in ("nf4", "int4", "Q4 (GGUF)"))
    ok = eight["points"] >= 0 and eight["kl_mean"] <= 1e-3 and worst >= -1
    return Measurement(NAME, figures, BAR, ok)


def _quality(settings: dict[str, Any], size: Size) -> dict[str, Any]:
    options: dict[str, Any] = {"model": None, "expert_cache": "100%", "context": 1024}
    with loaded(**options | settings) as engine:
        evaluation = Evaluation(task_eval_texts(engine, size.tokens), size.questions)
        evaluation.measure(engine)
    with closing(evaluation), loaded(**options) as exact:
        found = evaluation.against(exact)
    asked = sum(task.asked for task in found.tasks)
    right, exact_right = sum(task.right for task in found.tasks), sum(task.exact_right for task in found.tasks)
    return {
        "kl_mean": found.kl_mean,
        "kl_99": found.kl_99,
        "agreement": found.agreement,
        "perplexity": found.perplexity,
        "exact_perplexity": found.exact_perplexity,
        "score": 100 * right / max(asked, 1),
        "points": 100 * (right - exact_right) / max(asked, 1),
    }
