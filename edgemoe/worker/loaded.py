"""What an engine runs: an opened checkpoint with its texts, its plan, its runtime and the loop of its steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgemoe.cache.accelerator import is_accelerator
from edgemoe.cache.slot_classes import SlotClass
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
from edgemoe.errors import PlanError, reason
from edgemoe.model.model_runner import ModelRunner
from edgemoe.plan.memory_keeper import MemoryKeeper
from edgemoe.plan.plan import Plan
from edgemoe.planner import drafts_of, make_plan, resized, slots_for_all, with_classes, with_slots
from edgemoe.request.reply_text import ReplyTexts
from edgemoe.request.sampler import check_defaults
from edgemoe.results import Progress
from edgemoe.runtime import Runtime, Transports
from edgemoe.scheduler.batch_size import BatchSize
from edgemoe.scheduler.kv_budget import KvBudget
from edgemoe.scheduler.scheduler import Scheduler
from edgemoe.scheduler.step_loop import StepLoop
from edgemoe.scheduler.step_runner import StepRunner
from edgemoe.sizes import parse_bytes

LOG = logging.getLogger("edgemoe")


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
    def of(cls, blueprint: Blueprint, context: int) -> Texts:
        """For prompts of at most `context` tokens.

        Raises CheckpointError for a tokenizer, a chat template or generation settings that cannot be used.
        """
        checkpoint, vocabulary = blueprint.checkpoint, blueprint.config.get_text_config().vocab_size
        tokenizer = load_tokenizer(checkpoint)
        template = ChatTemplate(tokenizer, checkpoint.name, context)
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
        transports: Transports | None = None,
    ) -> None:
        """Raises CheckpointError or PlanError before any weight is read."""
        drafts = drafts_of(blueprint, config)
        draft_model = draft_model_for(blueprint, config)
        self.plan: Plan = make_plan(blueprint, config, draft_model)
        """What is in memory now."""
        every = slots_for_all(blueprint)
        self._most = every if len(every) == len(self.plan.slot_classes) else self.plan.slot_classes
        """The slots that have addresses: fewer than all where there are fewer sizes of slots than of experts."""
        self._keeper = _memory_keeper(self.plan, config)
        self.texts = Texts.of(blueprint, self.plan.context)
        self.runtime = Runtime(blueprint, self.plan, config, on_progress, transports)
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

    @property
    def tends_memory(self) -> bool:
        """Whether `tend` does anything."""
        return self._keeper is not None

    def tend(self) -> None:
        """Shrinks or grows the expert cache as other programs take and give memory. To be called between steps.

        Where the system refuses, it says so in the log, and the cache keeps the size that it has then.
        """
        if self._keeper is None:
            return
        slots = self._keeper.wanted(self.plan.slots)
        if slots == self.plan.slots:
            return
        try:
            self._resize(with_slots(self.plan, self._most, slots))
        except (OSError, MemoryError) as error:
            self._keeper = None
            LOG.warning("the expert cache keeps its %d slots, whatever is free (%s)", self.plan.slots, reason(error))

    def resize(self, expert_cache: str | int) -> Plan:
        """Makes the expert cache `expert_cache`, and returns the new plan. To be called between steps.

        Raises PlanError for a size that does not fit, and where experts are cached on an accelerator.
        """
        if is_accelerator(self.plan.device):
            raise PlanError(
                f"the cache on {self.plan.device} keeps its size: load the model again, with another expert_cache="
            )
        plan = resized(self.plan, self._most, expert_cache)
        self._resize(plan)
        # What was asked for by name is kept.
        self._keeper = self._keeper and self._keeper.with_planned(plan.slots)
        return plan

    def _resize(self, plan: Plan) -> None:
        try:
            self.runtime.resize(plan.slot_classes)
        finally:
            # A wait for the link may have been left.
            regions = self.runtime.cache.pool.regions
            used = tuple(SlotClass(region.slot_nbytes, region.count) for region in regions)
            self.plan = with_classes(self.plan, used)

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


def _memory_keeper(plan: Plan, config: EngineConfig) -> MemoryKeeper | None:
    """What keeps memory free for others; None where nothing does. PlanError for a size that is none."""
    text = str(config.keep_free).strip().lower()
    if text == "auto":
        keep_free = plan.reserve_nbytes // 2 if str(config.expert_cache).strip().lower() == "auto" else 0
    elif text == "off":
        keep_free = 0
    else:
        try:
            keep_free = int(text) if text.isdecimal() else parse_bytes(text)
        except ValueError:
            raise PlanError(f'keep_free={config.keep_free!r} is none of bytes ("2GiB"), "auto" and "off"') from None
    if not keep_free or is_accelerator(plan.device):
        return None
    return MemoryKeeper(keep_free, plan.slots, len(plan.slot_classes), plan.slot_nbytes)
