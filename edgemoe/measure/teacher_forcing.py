"""Teacher forcing: runs an engine over given text, in the passes of a generation but without drafts or sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch

from edgemoe.checkpoint.tokenizer import Vocabulary
from edgemoe.draft.expert_budget import ExpertBudget
from edgemoe.engine import Engine
from edgemoe.measure.eval_texts import EvalText
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.sequential_runner import PassInput
from edgemoe.scheduler.step_loop import StepLoop


class TeacherForcedScorer:
    """Runs given text through one engine, in passes of the shape of verifications, by the engine's internal seam.

    Passes run between two steps, so streams of other threads go on between them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.vocabulary = Vocabulary(engine.plan.model, engine._texts.tokenizer, engine._texts.vocabulary)

    def tokens(self, text: str | Sequence[int]) -> list[int]:
        """The token ids of `text`. Raises RequestError for empty texts, unknown ids, and a missing tokenizer."""
        return self.engine.tokenize(text)

    @property
    def bos_token(self) -> int | None:
        """The tokenizer's beginning-of-sequence token; None without one."""
        return None if self.engine._texts.tokenizer is None else self.engine._texts.tokenizer.bos_token_id

    @property
    def eos_token(self) -> int | None:
        """The tokenizer's end-of-sequence token, which ends a reply; None without one."""
        return None if self.engine._texts.tokenizer is None else self.engine._texts.tokenizer.eos_token_id

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """In the block the engine is exact, for all its requests."""
        budget = self.engine._between_steps(partial(_put_budget, None))
        try:
            yield
        finally:
            self.engine._between_steps(partial(_put_budget, budget))

    def predictions(self, eval_text: EvalText) -> Iterator[torch.Tensor]:
        """The logits after each token of `eval_text` from the end of its prompt to the last but one, pass by pass.

        Each is float32 [tokens, vocabulary] on the CPU. Raises CheckpointError if a file cannot be read any more.
        """
        tokens = eval_text.tokens[:-1]
        cache: SequenceCache | None = None
        while cache is None or cache.tokens < len(tokens):
            cache, logits = self.engine._between_steps(partial(self._next, cache, eval_text))
            yield logits

    def _next(
        self, cache: SequenceCache | None, eval_text: EvalText, loop: StepLoop
    ) -> tuple[SequenceCache, torch.Tensor]:
        """The next pass over `eval_text`, the first one without a `cache`: its KV cache and its logits."""
        tokens = eval_text.tokens[:-1]
        if cache is None:
            cache = self._prefilled(loop.runner.model, tokens, eval_text.prompt)
        return cache, self._pass(loop, cache, tokens)

    def _prefilled(self, model: ModelRunner, tokens: Sequence[int], prompt: int) -> SequenceCache:
        """A KV cache with the capacity for all of `tokens` that holds the first `prompt` of them."""
        cache = model.start(len(tokens))
        size = self.engine.plan.prefill_chunk if model.can_chunk else prompt
        for start in range(0, prompt, size):
            model.step(cache, tokens[start : min(start + size, prompt)])
        return cache

    def _pass(self, loop: StepLoop, cache: SequenceCache, tokens: Sequence[int]) -> torch.Tensor:
        """The logits of the next tokens, as many as the longest verification has; one where there can be none."""
        model, most = loop.runner.model, 1
        if model.verifies:
            depth = model.max_depth(cache.tokens)
            most += min(
                loop.speculation.max_nodes, self.engine.plan.prefill_chunk - 1, *([] if depth is None else [depth])
            )
        item = PassInput(cache, tokens[cache.tokens : cache.tokens + most], every=True, verifies=most > 1)
        with self._restricted(loop, item):
            logits = model.run([item])[0]
        loop.speculation.abandon()
        return logits

    def _restricted(self, loop: StepLoop, item: PassInput) -> AbstractContextManager[None]:
        """The context in which a pass runs: under the engine's budget, where it has one and would verify drafts.

        The tokens are those of the text, so all of them would be accepted: the probability of each path is 1.
        """
        budget = loop.runner.budget
        if budget is None or not item.verifies or not loop.speculation.active:
            return nullcontext()
        return budget.restricting([item], [[1.0] * len(item.tokens)])


def _put_budget(budget: ExpertBudget | None, loop: StepLoop) -> ExpertBudget | None:
    """Replaces the budget on experts of verifications, and returns the one before."""
    before, loop.runner.budget = loop.runner.budget, budget
    return before
