"""`inflated-demo`: the widened shipped model says what the shipped one says."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from bench.measurement import BaseSize, Measurement
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from edgemoe import Engine, Sampling
from edgemoe.demo.tasks import HELD_OUT_SEED, TASKS

NAME = "inflated-demo"
BAR = "the same tokens; experts of >= 6 MB, 2 to 8 GB in all"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How wide the experts become, and the questions of each task."""

    factor: int = FACTOR
    questions: int = 2


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, questions=1)


def run(size: Size = FULL) -> Measurement:
    """The same held-out questions to both, greedily, in bf16."""
    folder = inflated(size.factor)
    settings = Sampling(temperature=0, max_tokens=200)
    asked = [item.user for task in TASKS for item in islice(task.items(HELD_OUT_SEED, held_out=True), size.questions)]
    replies = []
    for model in (None, folder):
        with Engine.load(model, device="cpu") as engine:
            messages = ([{"role": "user", "content": user}] for user in asked)
            replies.append([engine.generate(engine.chat_prompt(each), settings).token_ids for each in messages])
            plan = engine.plan
    different = [user for user, plain, wide in zip(asked, *replies, strict=True) if plain != wide]
    value = {"questions": len(asked), "different": len(different)}
    sizes = {"expert_mb": plan.record_nbytes / 1e6, "all_experts_gb": plan.file_nbytes / 1e9}
    heavy = sizes["expert_mb"] >= 6 and 2 <= sizes["all_experts_gb"] <= 8
    return Measurement(NAME, value, BAR, not different and heavy, sizes | {"different": different})
