"""What lossy settings cost: an engine as it is set, against an exact one, on the same text.

The text is given and not generated, so that both predict the same tokens. After each passage's prompt it is run
in passes of the most tokens that a verification has, as if each had been drafted and found right. These passes
keep to the engine's budget, where it has one, and what they leave in keys and values stays there for the rest of
the passage, as it does in a reply. A budget counts what all tokens of a verification want together: with fewer of
them less is dropped, and a step of one token drops nothing. So the figures are those of the longest drafts, always
accepted; replies lose less, and how much less the score of the tasks shows, whose replies are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch

from edgemoe.blueprint import open_blueprint
from edgemoe.config import EngineConfig
from edgemoe.decoder import Work
from edgemoe.demo import DEMO_NAME
from edgemoe.demo.score import TaskScore, score_task
from edgemoe.demo.tasks import TASKS
from edgemoe.engine import Engine
from edgemoe.errors import CheckpointError, RequestError
from edgemoe.logits_file import LogitsFile
from edgemoe.passages import Passage, built_in_texts, conversations, cut, limited
from edgemoe.quality import EXACT, Quality, QualityMeter, TaskQuality
from edgemoe.tokenizing import load_tokenizer

TOKENS = 2048
"""Tokens that are predicted at most: the 99th percentile is then still made by twenty of them."""
QUESTIONS = 20
"""Questions of each of the shipped model's tasks; with both engines about a minute."""

OnProgress = Callable[[str, int, int], None]
"""Called with what is under way, and how many of how many tokens or questions of it are done."""


def evaluate(
    engine: Engine,
    texts: Sequence[str | Sequence[int]] | None = None,
    *,
    tokens: int = TOKENS,
    questions: int = 0,
    on_progress: OnProgress | None = None,
) -> Quality:
    """What the settings of `engine` cost, against the same engine with nothing lossy.

    `texts` are plain texts or token ids, of which at most `tokens` are predicted; None is what `passages_for` says.
    `questions` held-out questions of each task of the shipped model are answered, which takes a chat template.
    `on_progress` may raise to give up. Raises RequestError for texts that nothing can be predicted of, and PlanError
    where the temporary folder has no room for the logits.
    """
    with closing(Evaluation(passages_for(engine, texts, tokens), questions, on_progress)) as evaluation:
        evaluation.measure(engine)
        return evaluation.against(engine)


def passages_for(
    engine: Engine, texts: Sequence[str | Sequence[int]] | None = None, tokens: int = TOKENS
) -> list[Passage]:
    """What to measure `engine` on: `texts`, or the built-in ones, which mean nothing to the shipped model.

    That one gets the held-out conversations of its tasks. Raises RequestError when there are no three tokens in it.
    """
    if texts is None and engine.plan.model == DEMO_NAME:
        return task_passages(engine, tokens)
    ids = [engine._tokens(text) for text in (built_in_texts() if texts is None else texts)]
    passages = limited(cut(ids, engine.plan.context, _first_token(engine)), tokens)
    if not passages:
        raise RequestError(
            "nothing can be predicted: give a text of three tokens or more, and a context (--ctx-size) and a number "
            "of tokens (--tokens) to match"
        )
    return passages


def task_passages(engine: Engine, tokens: int = TOKENS) -> list[Passage]:
    """Held-out conversations of the shipped model's tasks, for it or a model made of it. RequestError as for a chat."""
    end = [] if engine._tokenizer is None else [engine._tokenizer.eos_token_id]
    passages = conversations(
        lambda user: engine.chat_prompt([{"role": "user", "content": user}]),
        lambda reply: [*engine._tokens(reply), *end],
        tokens,
    )
    return [passage for passage in passages if len(passage.tokens) <= engine.plan.context]


def check_vocabulary(model: Any, against: Any, *, offline: bool = EngineConfig.offline) -> None:
    """Reads two checkpoints without loading them. CheckpointError when their predictions cannot be compared."""
    one, other = (open_blueprint(name, offline=offline) for name in (model, against))
    _check_tokens(
        (one.checkpoint.name, load_tokenizer(one.checkpoint), one.config.get_text_config().vocab_size),
        (other.checkpoint.name, load_tokenizer(other.checkpoint), other.config.get_text_config().vocab_size),
    )


class Evaluation:
    """The measurement of one engine, and then of what it is compared with; both need not be loaded at a time.

    The engine that is measured comes first and is run through all of the text before the other is, so that what is
    resident is what its own passes made so: a budget may depend on that.
    """

    def __init__(self, passages: Sequence[Passage], questions: int = 0, on_progress: OnProgress | None = None) -> None:
        """`questions` are asked of each documented task; see `evaluate`."""
        self._passages = passages
        self._questions = questions
        self._on_progress = on_progress or _ignore
        self._total = sum(passage.predicted for passage in passages)
        self._measured: Engine | None = None
        self._logits: LogitsFile | None = None
        self._scores: list[TaskScore] = []

    def measure(self, engine: Engine) -> None:
        """Runs `engine` as it is set. Once; `close` gives back what it keeps in the temporary folder."""
        assert self._measured is None, "an evaluation is of one engine"
        self._measured = engine
        self._lossy, self._identity = engine.plan.lossy, _identity(engine)
        self._logits = LogitsFile(engine._vocabulary, self._total)
        done = 0
        for passage in self._passages:
            for logits in predictions(engine, passage):
                self._logits.append(logits)
                done += len(logits)
                self._on_progress(f"predicting with {engine.plan.model}", done, self._total)
        self._scores = self._score(engine)

    def against(self, reference: Engine) -> Quality:
        """Runs `reference` with nothing lossy, which may be the engine that was measured. After `measure`, once.

        Raises CheckpointError when it has another vocabulary.
        """
        assert self._measured is not None
        assert self._logits is not None
        same = reference is self._measured
        _check_tokens(self._identity, _identity(reference))
        meter = QualityMeter()
        self._logits.rewind()
        with _exact(reference):
            for passage in self._passages:
                self._compare(passage, reference, meter, again=bool(self._lossy) or not same)
            # An engine that is exact has answered already.
            scores = self._score(reference) if self._lossy or not same else self._scores
        return Quality(
            model=self._identity[0],
            lossy=self._lossy,
            against=EXACT if same else reference.plan.model,
            tokens=meter.tokens,
            perplexity=meter.perplexity,
            exact_perplexity=meter.exact_perplexity,
            kl_mean=meter.divergence,
            kl_99=meter.divergence_99,
            agreement=meter.agreement,
            tasks=tuple(
                TaskQuality(own.task.name, own.asked, own.right, exact.right)
                for own, exact in zip(self._scores, scores, strict=True)
            ),
        )

    def close(self) -> None:
        """Gives the temporary file back. Idempotent."""
        if self._logits is not None:
            self._logits.close()
