"""What an engine runs: an opened checkpoint with its texts, its plan, its runtime and the loop of its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgemoe.cache.accelerator import is_accelerator
from edgemoe.checkpoint.blueprint import Blueprint
from edgemoe.checkpoint.chat_template import ChatTemplate
from edgemoe.checkpoint.checkpoint import Checkpoint
from edgemoe.checkpoint.generation_defaults import generation_source, load_generation_defaults
from edgemoe.checkpoint.tokenizer import load_tokenizer
from edgemoe.config import EngineConfig
from edgemoe.draft.draft_model import DraftModel
from edgemoe.draft.expert_budget import expert_budget_for
from edgemoe.draft.settings import DraftSettings
from edgemoe.drafters import speculation_for
from edgemoe.model.model_runner import ModelRunner
from edgemoe.plan.plan import Plan
from edgemoe.planner import drafts_of, make_plan
from edgemoe.request.reply_text import ReplyTexts
from edgemoe.request.sampler import check_defaults
from edgemoe.results import Progress
from edgemoe.runtime import Runtime
from edgemoe.scheduler.batch_size import BatchSize
from edgemoe.scheduler.kv_budget import KvBudget
from edgemoe.scheduler.scheduler import Scheduler
from edgemoe.scheduler.step_loop import StepLoop
from edgemoe.scheduler.step_runner import StepRunner


@dataclass(frozen=True)
class Texts:
    """What makes token ids of a prompt and a text of a reply. Needs no weights, and stays after the engine's end."""

    checkpoint: Checkpoint
    tokenizer: Any
    """transformers'; None without tokenizer files."""
    template: ChatTemplate
    replies: ReplyTexts
    defaults: Any
    """The checkpoint's `GenerationConfig`."""
    vocabulary: int
    """Number of ids that the model predicts."""

    @classmethod
    def of(cls, blueprint: Blueprint) -> Texts:
        """Raises CheckpointError for a tokenizer or generation settings that cannot be used."""
        checkpoint, vocabulary = blueprint.checkpoint, blueprint.config.get_text_config().vocab_size
        tokenizer = load_tokenizer(checkpoint)
        template = ChatTemplate(tokenizer, checkpoint.name)
        defaults = load_generation_defaults(blueprint)
        check_defaults(defaults, generation_source(blueprint), vocabulary)
        return cls(checkpoint, tokenizer, template, ReplyTexts(tokenizer, template), defaults, vocabulary)


class Loaded:
    """A model in memory. Used by one thread at a time."""

    def __init__(
        self,
        blueprint: Blueprint,
        config: EngineConfig,
        on_progress: Callable[[Progress], None],
    ) -> None:
        """Raises CheckpointError or PlanError before any weight is read."""
        drafts = drafts_of(blueprint, config)
        draft_model = draft_model_for(blueprint, config)
        self.plan: Plan = make_plan(blueprint, config, draft_model)
        self.texts = Texts.of(blueprint)
        self.runtime = Runtime(blueprint, self.plan, config, on_progress)
        try:
            self.loop = self._new_loop(config, drafts, draft_model)
        except BaseException:
            self.runtime.close()
            raise

    def _new_loop(self, config: EngineConfig, drafts: DraftSettings, draft_model: DraftModel | None) -> StepLoop:
        """The scheduler, the drafter and the runner of the steps."""
        plan, runtime = self.plan, self.runtime
        runner = ModelRunner(runtime.runner())
        speculation = speculation_for(drafts, runner, runtime, plan, draft_model)
        scheduler = Scheduler(
            runner,
            KvBudget(plan.kv, plan.kv_nbytes, at_once=is_accelerator(plan.device)),
            plan.prefill_chunk,
            BatchSize(plan.batch, automatic=str(config.batch).strip().lower() == "auto"),
            config.patience,
            max_draft_nodes=speculation.max_nodes if speculation.active else 0,
            max_drafted=runner.rows_within(plan.workspace_nbytes),
            max_states=plan.kept_states,
        )
        budget = expert_budget_for(config, runtime.layers, runtime.cache)
        return StepLoop(scheduler, speculation, StepRunner(runner, runtime.cache.counters, budget))

    def close(self) -> None:
        """Ends the threads and gives files and memory back. Idempotent."""
        try:
            self.loop.close()
        finally:
            self.runtime.close()


def draft_model_for(blueprint: Blueprint, config: EngineConfig) -> DraftModel | None:
    """The checkpoint that drafts for `blueprint`, where the settings ask for one."""
    if "model" not in drafts_of(blueprint, config).drafters or config.draft_model is None:
        return None
    return DraftModel(config.draft_model, blueprint, offline=config.offline)
