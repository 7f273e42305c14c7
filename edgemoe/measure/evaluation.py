"""What lossy settings cost: an engine as it is set, against an exact one, on the same text.

The text is given and not generated, so that both predict the same tokens. After each passage's prompt it is run
in passes of the most tokens that a verification has, as if each had been drafted and found right. These passes
keep to the engine's budget, where it has one, and what they leave in keys and values stays there for the rest of
the passage, as it does in a reply. A budget counts what all tokens of a verification want together: with fewer of
them less is dropped, and a step of one token drops nothing. So the figures are those of the longest drafts, always
accepted, and more than what a token of a reply loses on the average. Not so for the rule "path": every token of a
text is certain here, while in a reply one that was drafted as unlikely may be the one that is accepted. What becomes
of whole replies the score of the tasks says: these are generated, with drafts as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any

import torch

from edgemoe.checkpoint.blueprint import Blueprint, open_blueprint
from edgemoe.checkpoint.tokenizer import Vocabulary, load_tokenizer
from edgemoe.config import EngineConfig
from edgemoe.demo import DEMO_NAME
from edgemoe.demo.tasks import TASKS
from edgemoe.engine import Engine
from edgemoe.errors import RequestError
from edgemoe.measure.eval_texts import EvalText, built_in_texts, conversations, cut, limited
from edgemoe.measure.logits_file import LogitsFile
from edgemoe.measure.quality import EXACT, Quality, QualityMeter, TaskQuality
from edgemoe.measure.task_score import TaskScore, score_task
from edgemoe.measure.teacher_forcing import TeacherForcedScorer

TOKENS = 2048
"""Tokens that are predicted at most: the 99th percentile is then still made by twenty of them."""
QUESTIONS = 12
"""Questions of each of the shipped model's tasks: with the text, and both sides, about a minute on two cores."""
ROWS = 64
"""Tokens whose logits are compared at a time where they are compared with themselves."""

Text = str | Sequence[int]
"""A text, or its token ids."""
OnProgress = Callable[[str, int, int], None]
"""Called with what is under way, and how many tokens or tasks of how many are done."""


def evaluate(
    engine: Engine,
    texts: Sequence[Text] | None = None,
    *,
    tokens: int = TOKENS,
    questions: int = 0,
    on_progress: OnProgress | None = None,
) -> Quality:
    """What the settings of `engine` cost, against the same engine with nothing lossy.

    Of `texts` at most `tokens` are predicted; None is what `eval_texts_for` says. `questions` held-out questions of
    each of the shipped model's tasks are asked too, which takes a chat template. While the exact side is measured, the
    engine is exact for everybody. `on_progress` may raise to give up. Raises RequestError for texts of which
    nothing can be predicted, and PlanError where the temporary folder has no room for the logits.
    """
    with closing(Evaluation(eval_texts_for(engine, texts, tokens), questions)) as evaluation:
        evaluation.measure(engine, on_progress)
        return evaluation.against(engine, on_progress)


def eval_texts_for(engine: Engine, texts: Sequence[Text] | None = None, tokens: int = TOKENS) -> list[EvalText]:
    """What to measure `engine` on: `texts`, or the built-in ones, which mean nothing to the shipped model.

    That one gets the held-out conversations of its tasks. Raises RequestError when there is too little of it.
    """
    if texts is None and engine.plan.model == DEMO_NAME:
        return task_eval_texts(engine, tokens)
    reader = TeacherForcedScorer(engine)
    ids = [reader.tokens(text) for text in (built_in_texts() if texts is None else texts)]
    return _some(limited(cut(ids, engine.plan.context, reader.first_token), tokens))


def task_eval_texts(engine: Engine, tokens: int = TOKENS) -> list[EvalText]:
    """Held-out conversations of the shipped model's tasks, for it or one that was made of it.

    Raises RequestError where the model has no chat template, or no conversation fits the context.
    """
    reader = TeacherForcedScorer(engine)
    end = [] if reader.last_token is None else [reader.last_token]
    eval_texts = conversations(
        lambda user: engine.chat_prompt([{"role": "user", "content": user}]),
        lambda reply: [*reader.tokens(reply), *end],
        tokens,
    )
    return _some([eval_text for eval_text in eval_texts if len(eval_text.tokens) <= engine.plan.context])


def _some(eval_texts: list[EvalText]) -> list[EvalText]:
    if not eval_texts:
        raise RequestError(
            "there is nothing to predict: give a text of at least three tokens, a context= that it fits, "
            "and at least one token to predict (tokens=)"
        )
    return eval_texts


def check_comparable(model: Any, against: Any, *, offline: bool = EngineConfig.offline) -> None:
    """Looks at two checkpoints, names or folders, without loading them; CheckpointError for other vocabularies."""
    one = open_blueprint(model, offline=offline)
    other = open_blueprint(against, offline=offline, setting="against")
    _vocabulary(one).check_same(_vocabulary(other))


def _vocabulary(blueprint: Blueprint) -> Vocabulary:
    checkpoint = blueprint.checkpoint
    return Vocabulary(checkpoint.name, load_tokenizer(checkpoint), blueprint.config.get_text_config().vocab_size)


class Evaluation:
    """The measurement of one engine, and then of what it is compared with, which need not be loaded before.

    The engine that is measured runs through all of the text before the other does, so that what is resident is what
    its own passes made so: a budget may depend on that.
    """

    def __init__(self, eval_texts: Sequence[EvalText], questions: int = 0) -> None:
        """`questions` are asked of each documented task; see `evaluate`."""
        self._passages = eval_texts
        self._questions = questions
        self._on_progress: OnProgress = _ignore
        self._total = sum(eval_text.predicted for eval_text in eval_texts)
        self._reader: TeacherForcedScorer | None = None
        self._logits: LogitsFile | None = None
        self._scores: list[TaskScore] = []

    def measure(self, engine: Engine, on_progress: OnProgress | None = None) -> None:
        """Runs `engine` as it is set, once."""
        assert self._reader is None, "an evaluation is of one engine"
        self._on_progress = on_progress or _ignore
        self._reader = TeacherForcedScorer(engine)
        self._logits = LogitsFile(self._reader.vocabulary.size, self._total)
        done = 0
        for eval_text in self._passages:
            for logits in self._reader.predictions(eval_text):
                self._logits.append(logits)
                done += len(logits)
                self._on_progress(f"text, {_how(engine.plan.lossy)}", done, self._total)
        self._scores = self._score(engine, _how(engine.plan.lossy))

    def against(self, reference: Engine, on_progress: OnProgress | None = None) -> Quality:
        """Compares with `reference` while nothing of it is lossy; it may be the engine that was measured. Once.

        Raises CheckpointError when it has another vocabulary.
        """
        assert self._reader is not None, "measure an engine first"
        self._on_progress = on_progress or _ignore
        measured, reader = self._reader, TeacherForcedScorer(reference)
        measured.vocabulary.check_same(reader.vocabulary)
        lossy, same = measured.engine.plan.lossy, reference is measured.engine
        # An engine that is exact has answered already: it is compared with itself.
        again = bool(lossy) or not same
        with reader.exactly() if again else nullcontext():
            meter = self._compare(reader if again else None)
            scores = self._score(reference, "exact") if again else self._scores
        return Quality(
            model=measured.vocabulary.model,
            lossy=lossy,
            against=EXACT if same else reader.vocabulary.model,
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

    def _compare(self, reader: TeacherForcedScorer | None) -> QualityMeter:
        """Sets `reader`'s predictions beside those kept; without one these beside themselves."""
        assert self._logits is not None
        self._logits.rewind()
        meter = QualityMeter()
        for eval_text in self._passages:
            following = torch.tensor(eval_text.tokens[eval_text.prompt + 1 :])
            done = 0
            for exact in self._kept(eval_text.predicted) if reader is None else reader.predictions(eval_text):
                found = exact if reader is None else self._logits.take(len(exact))
                meter.add(exact, found, following[done : done + len(exact)])
                done += len(exact)
                self._on_progress("text, compared" if reader is None else "text, exact", meter.tokens, self._total)
        return meter

    def _kept(self, tokens: int) -> Iterator[torch.Tensor]:
        assert self._logits is not None
        for start in range(0, tokens, ROWS):
            yield self._logits.take(min(ROWS, tokens - start))

    def _score(self, engine: Engine, how: str) -> list[TaskScore]:
        scores: list[TaskScore] = []
        for task in TASKS if self._questions else ():
            scores.append(score_task(engine, task, self._questions))
            self._on_progress(f"tasks, {how}", len(scores), len(TASKS))
        return scores


def _how(lossy: str) -> str:
    return "lossy" if lossy else "exact"


def _ignore(what: str, done: int, total: int) -> None:
    """The progress callback of those who gave none."""
