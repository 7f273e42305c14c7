"""`quality`: what quantised experts of the shipped model cost, against the same model in bf16."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import loaded
from bench.support.packed_models import gguf_of
from edgemoe import Engine
from edgemoe.demo import demo_folder
from edgemoe.demo.tasks import TASKS
from edgemoe.measure.evaluation import Evaluation, task_eval_texts
from edgemoe.measure.task_score import score_task

NAME = "quality"
BAR = "int8: score unchanged, mean KL <= 1e-3; 4 bits: at most one point of 100 less"
JUDGED = ("nf4", "int4", "Q4 (GGUF)")
"""The variants of four bits that the bar is about; fp4 is measured beside them."""
OPTIONS: dict[str, Any] = {"model": None, "expert_cache": "100%", "context": 1024}


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """What is compared, tokens that are predicted, and questions of each of the nine tasks."""

    made: tuple[str, ...] = ("int8", "nf4", "int4", "fp4")
    tokens: int = 2048
    questions: int = 12


FULL, SMALL = Size(), Size(small=True, made=("int8",), tokens=16, questions=1)


def run(size: Size = FULL) -> Measurement:
    """Held-out conversations, teacher-forced, and held-out questions, each format against bf16."""
    source = demo_folder()
    # As in llama.cpp's Q4_K_M, down projections have a bit more; rows of 96 fit no block of 256 values.
    q4 = gguf_of(source, "Q4", "Q4_1", "Q5_0", ffn_down_exps="Q5_1")
    variants: dict[str, dict[str, Any]] = {name: {"experts": name} for name in size.made}
    variants["Q4 (GGUF)"] = q4
    with loaded(**OPTIONS) as exact:
        exact_score = _score(exact, size)
    figures = {name: _quality(settings, exact_score, size) for name, settings in variants.items()}
    eight, worst = figures["int8"], min(figures[name]["points"] for name in JUDGED if name in figures)
    ok = eight["points"] >= 0 and eight["kl_mean"] <= 1e-3 and worst >= -1
    return Measurement(NAME, figures, BAR, ok)


def _quality(settings: dict[str, Any], exact_score: float, size: Size) -> dict[str, Any]:
    with loaded(**OPTIONS | settings) as engine:
        evaluation = Evaluation(task_eval_texts(engine, size.tokens))
        evaluation.measure(engine)
        score = _score(engine, size)
    with closing(evaluation), loaded(**OPTIONS) as exact:
        found = evaluation.against(exact)
    return {
        "kl_mean": found.kl_mean,
        "kl_99": found.kl_99,
        "agreement": found.agreement,
        "perplexity": found.perplexity,
        "exact_perplexity": found.exact_perplexity,
        "score": score,
        "points": score - exact_score,
    }


def _score(engine: Engine, size: Size) -> float:
    """Right replies to held-out questions of every task, of 100."""
    scores = [score_task(engine, task, size.questions) for task in TASKS]
    return 100 * sum(each.right for each in scores) / sum(each.asked for each in scores)
