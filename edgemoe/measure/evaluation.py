"""The loss of lossy settings: an engine with its settings against an exact one, on the same text.

The text is given and not generated, so that both sides predict the same tokens. After its prompt, an eval text runs in
passes of the longest verification, as if all of its tokens had been drafted and accepted. These passes keep to the
engine's budget, if it has one. Their errors stay in the keys and values for the rest of the text, as in a reply.

A budget limits the experts of all tokens of a verification together. Shorter verifications drop fewer experts, and a
step of one token drops none. The figures therefore hold for the longest drafts, always accepted: they are an upper
bound of the mean loss per token of a reply. The rule "path" is the exception. Here every token has probability 1,
while a reply may accept a token that was drafted as unlikely.

The scores of the tasks measure whole replies, which are generated with the engine's own drafts.
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
from edgemoe.measure.eval_texts import EvalText, built_in_texts, conversations, limited, split_texts
from edgemoe.measure.logits_file import LogitsFile
from edgemoe.measure.quality import EXACT, Quality, QualityMeter, TaskQuality
from edgemoe.measure.task_score import TaskScore, score_task
from edgemoe.measure.teacher_forcing import TeacherForcedScorer

TOKENS = 2048
"""Default number of predicted tokens: twenty of them are above the 99th percentile."""
QUESTIONS = 12
"""Default number of questions per task of the shipped model; with the text, both sides take a minute on two cores."""
ROWS = 64
"""Tokens per comparison of stored logits with themselves."""

Text = str | Sequence[int]
"""A text, or its token ids."""
OnProgress = Callable[[str, int, int], None]
"""Called with the name of the current stage, the tokens or tasks done, and their total."""


def evaluate(
    engine: Engine,
    texts: Sequence[Text] | None = None,
    *,
    tokens: int = TOKENS,
    questions: int = 0,
    on_progress: OnProgress | None = None,
) -> Quality:
    """The loss of the settings of `engine` against the same engine with exact settings.

    Predicts at most `tokens` tokens of `texts`; None takes the default of `eval_texts_for`. `questions` is the number
    of held-out questions to ask of each of the shipped model's tasks, for which the model needs a chat template.
    While the exact side is measured, the engine is exact for all of its requests. `on_progress` may raise to give up.

    Raises RequestError for texts that are too short to predict anything and for an engine with quantised weights, which
    cannot be exact (see `Evaluation` for two engines), and PlanError if the temporary folder is too small for the
    logits.
    """
    if engine.plan.quantised:
        raise RequestError(
            f"{engine.plan.model} has its {engine.plan.quantised} and cannot be compared with itself: measure it, "
            "close it, and compare with an engine with experts='native' and dense='native' (as Evaluation does)"
        )
    with closing(Evaluation(eval_texts_for(engine, texts, tokens), questions)) as evaluation:
        evaluation.measure(engine, on_progress)
        return evaluation.against(engine, on_progress)


def eval_texts_for(engine: Engine, texts: Sequence[Text] | None = None, tokens: int = TOKENS) -> list[EvalText]:
    """The eval texts for `engine`: those of `texts`, with at most `tokens` predicted tokens in all.

    Without `texts`, the shipped model gets held-out conversations of its tasks, and any other model the built-in
    texts. Raises RequestError for texts that are too short to predict anything.
    """
    if texts is None and engine.plan.model == DEMO_NAME:
        return task_eval_texts(engine, tokens)
    scorer = TeacherForcedScorer(engine)
    ids = [scorer.tokens(text) for text in (built_in_texts() if texts is None else texts)]
    return _require_text(limited(split_texts(ids, engine.plan.context, scorer.bos_token), tokens))


def task_eval_texts(engine: Engine, tokens: int = TOKENS) -> list[EvalText]:
    """Held-out conversations of the shipped model's tasks, for it or a model made of it.

    Raises RequestError if the model has no chat template, or no conversation fits the context.
    """
    scorer = TeacherForcedScorer(engine)
    end = [] if scorer.eos_token is None else [scorer.eos_token]
    eval_texts = conversations(
        lambda user: engine.chat_prompt([{"role": "user", "content": user}]),
        lambda reply: [*scorer.tokens(reply), *end],
        tokens,
    )
    return _require_text([eval_text for eval_text in eval_texts if len(eval_text.tokens) <= engine.plan.context])


def _require_text(eval_texts: list[EvalText]) -> list[EvalText]:
    if not eval_texts:
        raise RequestError(
            "there is nothing to predict: give a text of at least three tokens, a context= that it fits, "
            "and at least one token to predict (tokens=)"
        )
    return eval_texts


def check_comparable(model: Any, against: Any, *, offline: bool = EngineConfig.offline) -> None:
    """Raises CheckpointError if two checkpoints, by name or folder, have different vocabularies. Loads neither."""
    one = open_blueprint(model, offline=offline)
    other = open_blueprint(against, offline=offline, setting="against")
    _vocabulary(one).check_same(_vocabulary(other))


def _vocabulary(blueprint: Blueprint) -> Vocabulary:
    checkpoint = blueprint.checkpoint
    return Vocabulary(checkpoint.name, load_tokenizer(checkpoint), blueprint.config.get_text_config().vocab_size)


class Evaluation:
    """Measures one engine, then compares it with a reference, which may be loaded only then.

    The measured engine runs all text before the reference does. A budget may depend on the resident experts, which
    so far only the engine's own passes have changed.
    """

    def __init__(self, eval_texts: Sequence[EvalText], questions: int = 0) -> None:
        """`questions` is the number of questions per task, as in `evaluate`."""
        self._eval_texts = eval_texts
        self._questions = questions
        self._on_progress: OnProgress = _ignore
        self._total = sum(eval_text.predicted for eval_text in eval_texts)
        self._scorer: TeacherForcedScorer | None = None
        self._logits: LogitsFile | None = None
        self._scores: list[TaskScore] = []

    def measure(self, engine: Engine, on_progress: OnProgress | None = None) -> None:
        """Runs `engine` with its settings. Call it once."""
        assert self._scorer is None, "an evaluation is of one engine"
        self._on_progress = on_progress or _ignore
        self._scorer = TeacherForcedScorer(engine)
        self._logits = LogitsFile(self._scorer.vocabulary.size, self._total)
        done = 0
        for eval_text in self._eval_texts:
            for logits in self._scorer.predictions(eval_text):
                self._logits.append(logits)
                done += len(logits)
                self._on_progress(f"text, {_how(engine.plan.lossy)}", done, self._total)
        self._scores = self._score(engine, _how(engine.plan.lossy))

    def against(self, reference: Engine, on_progress: OnProgress | None = None) -> Quality:
        """Compares with `reference`, which is exact meanwhile and may be the measured engine. Call it once.

        Raises CheckpointError if `reference` has another vocabulary.
        """
        assert self._scorer is not None, "measure an engine first"
        self._on_progress = on_progress or _ignore
        measured, scorer = self._scorer, TeacherForcedScorer(reference)
        measured.vocabulary.check_same(scorer.vocabulary)
        lossy = measured.engine.plan.lossy
        # What was quantised as it was read is compared with the same checkpoint as it is published.
        published = bool(measured.engine.plan.quantised) and scorer.vocabulary.model == measured.vocabulary.model
        same = reference is measured.engine or published
        # The logits of an exact engine are compared with themselves.
        again = bool(lossy) or reference is not measured.engine
        with scorer.exactly() if again else nullcontext():
            meter = self._compare(scorer if again else None)
            scores = self._score(reference, "exact") if again else self._scores
        return Quality(
            model=measured.vocabulary.model,
            lossy=lossy,
            against=EXACT if same else scorer.vocabulary.model,
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
        """Deletes the temporary file. Idempotent."""
        if self._logits is not None:
            self._logits.close()

    def _compare(self, scorer: TeacherForcedScorer | None) -> QualityMeter:
        """Compares the stored logits with the predictions of `scorer`; with None, with themselves."""
        assert self._logits is not None
        self._logits.rewind()
        meter = QualityMeter()
        for eval_text in self._eval_texts:
            following = torch.tensor(eval_text.tokens[eval_text.prompt + 1 :])
            done = 0
            for exact in self._stored(eval_text.predicted) if scorer is None else scorer.predictions(eval_text):
                found = exact if scorer is None else self._logits.take(len(exact))
                meter.add(exact, found, following[done : done + len(exact)])
                done += len(exact)
                self._on_progress("text, compared" if scorer is None else "text, exact", meter.tokens, self._total)
        return meter

    def _stored(self, tokens: int) -> Iterator[torch.Tensor]:
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
    """The progress callback where none was given."""
