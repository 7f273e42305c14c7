"""An engine that reads a given text where it would else write one: the same passes, with nothing drafted or drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from edgemoe.checkpoint.tokenizer import Vocabulary
from edgemoe.engine import Engine
from edgemoe.measure.eval_texts import EvalText
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.sequential_runner import PassInput


class TeacherForcedScorer:
    """Looks into one engine, as no other module does, and runs text through it in the shape of verifications.

    It takes the engine's lock for each pass, so that streams of other threads go on in between.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.vocabulary = Vocabulary(engine.plan.model, engine._tokenizer, engine._vocabulary)

    def tokens(self, text: str | Sequence[int]) -> list[int]:
        """The token ids of a text; RequestError where it is empty or has unknown ids, or there is no tokenizer."""
        return self.engine._tokens(text)

    @property
    def first_token(self) -> int | None:
        """What the tokenizer puts in front of a text, where it has a token for that."""
        return None if self.engine._tokenizer is None else self.engine._tokenizer.bos_token_id

    @property
    def last_token(self) -> int | None:
        """What ends a reply."""
        return None if self.engine._tokenizer is None else self.engine._tokenizer.eos_token_id

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """In the block the engine is exact, for all that is asked of it."""
        with self.engine._device:
            batch = self.engine._scheduler
            budget, batch.budget = batch.budget, None
        try:
            yield
        finally:
            with self.engine._device:
                batch.budget = budget

    def predictions(self, eval_text: EvalText) -> Iterator[torch.Tensor]:
        """The logits after each token of `eval_text` behind its prompt, but for the last, pass by pass.

        Each is float32 [tokens, vocabulary] on the CPU. Raises CheckpointError where a file cannot be read any more.
        """
        tokens = eval_text.tokens[:-1]
        cache = None
        while cache is None or cache.tokens < len(tokens):
            with self.engine._device:
                self.engine._loaded()
                try:
                    if cache is None:
                        cache = self._prompted(tokens, eval_text.prompt)
                    logits = self._pass(cache, tokens)
                except OSError as error:
                    raise self.engine._failure(error) from error
            yield logits

    def _prompted(self, tokens: Sequence[int], prompt: int) -> SequenceCache:
        """A past with room for all of `tokens`, which has the first `prompt` of them."""
        runner = self.engine._scheduler.runner
        cache = runner.start(len(tokens))
        size = self.engine.plan.prefill_chunk if runner.sequential.can_chunk(tokens) else prompt
        for start in range(0, prompt, size):
            runner.step(cache, tokens[start : min(start + size, prompt)])
        return cache

    def _pass(self, cache: SequenceCache, tokens: Sequence[int]) -> torch.Tensor:
        """As many of `tokens` behind `cache` as a verification has at most; one where there can be none."""
        batch, plan = self.engine._scheduler, self.engine.plan
        most = 1
        if batch.runner.verifies:
            turn = batch.runner.max_depth(cache.tokens)
            most += min(batch.speculation.max_nodes, plan.prefill_chunk - 1, *([] if turn is None else [turn]))
        item = PassInput(cache, tokens[cache.tokens : cache.tokens + most], every=True, verifies=most > 1)
        with self._budgeted(item):
            logits = batch.runner.run([item])[0]
        self.engine._loaded().predictor.end_cycle()
        return logits

    def _budgeted(self, item: PassInput) -> AbstractContextManager[None]:
        """The block in which a pass runs: under the engine's budget, where it has one and would verify drafts.

        The tokens are those of the text, so that all of them would be accepted: the probability of each path is 1.
        """
        batch = self.engine._scheduler
        if batch.budget is None or not item.verifies or not batch.speculation.active:
            return nullcontext()
        return batch.budget.restricting([item], [[1.0] * len(item.tokens)])
