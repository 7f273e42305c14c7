"""Evaluations of engines, compared with other ways to compute the same figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from bench.support.engine_parts import runner_of
from edgemoe import CheckpointError, EdgeMoEError, Engine, RequestError
from edgemoe.measure.eval_texts import EvalText
from edgemoe.measure.evaluation import Evaluation, check_comparable, eval_texts_for, evaluate, task_eval_texts
from edgemoe.measure.task_score import score
from edgemoe.measure.teacher_forcing import TeacherForcedScorer
from tests.support.checkpoints import Zoo, random_ids, reference

TEXT = "A budget drops what few tokens want; what it costs is seen in the logits, and only there. " * 3
NODES = 4


@pytest.fixture(scope="module")
def exact(talker: Path) -> Iterator[Engine]:
    with Engine.load(talker, threads=1, draft_nodes=NODES) as engine:
        yield engine


@pytest.fixture(scope="module")
def lossy(talker: Path) -> Iterator[Engine]:
    """With a budget of 2 of 8 experts for 5 tokens, each of which chooses 2."""
    with Engine.load(talker, threads=1, draft_nodes=NODES, budget=2, budget_rule="sum") as engine:
        yield engine


def logits(engine: Engine, eval_text: EvalText) -> torch.Tensor:
    return torch.cat(list(TeacherForcedScorer(engine).predictions(eval_text)))


def expected_perplexity(folder: Path, eval_texts: list[EvalText]) -> float:
    """By transformers' own forward, with every text in one pass."""
    model, nats, tokens = reference(folder), 0.0, 0
    for eval_text in eval_texts:
        ids = torch.tensor([list(eval_text.tokens)])
        with torch.inference_mode():
            after = model(ids).logits[0, eval_text.prompt : -1].double().log_softmax(-1)
        nats -= float(after.gather(-1, ids[0, eval_text.prompt + 1 :, None]).sum())
        tokens += eval_text.predicted
    return math.exp(nats / tokens)


def test_an_exact_engine_loses_nothing_and_has_the_perplexity_of_transformers(exact: Engine, talker: Path) -> None:
    quality = evaluate(exact, [TEXT, random_ids(40)], tokens=150)
    assert quality.tokens == 150
    assert (quality.kl_mean, quality.kl_99, quality.agreement) == (0.0, 0.0, 1.0)
    assert (quality.lossy, quality.against, quality.tasks) == ("", "exact", ())
    expected = expected_perplexity(talker, eval_texts_for(exact, [TEXT, random_ids(40)], 150))
    assert quality.perplexity == quality.exact_perplexity == pytest.approx(expected, rel=1e-3)


def test_a_budget_for_all_experts_costs_nothing_to_the_bit(talker: Path) -> None:
    with Engine.load(talker, threads=1, draft_nodes=NODES, budget=8, budget_rule="sum") as engine:
        assert engine.plan.lossy
        quality = evaluate(engine, [TEXT], tokens=120)
    assert quality.lossy == engine.plan.lossy
    assert (quality.kl_mean, quality.kl_99, quality.agreement) == (0.0, 0.0, 1.0)
    assert quality.perplexity == quality.exact_perplexity


def test_a_small_budget_costs_something(lossy: Engine, exact: Engine) -> None:
    quality = evaluate(lossy, [TEXT], tokens=120)
    assert 0 < quality.kl_mean < quality.kl_99
    assert 0 < quality.agreement < 1
    plain = evaluate(exact, [TEXT], tokens=120)
    assert quality.exact_perplexity == pytest.approx(plain.perplexity, rel=1e-6)
    assert quality.perplexity != quality.exact_perplexity
    assert lossy._loop.runner.budget is not None, "the engine is lossy again"


def test_errors_of_a_lossy_pass_stay_in_the_kv_cache(lossy: Engine) -> None:
    eval_text = EvalText(random_ids(8 + 2 * (NODES + 1) + 1), 8)
    whole = logits(lossy, eval_text)
    reader = TeacherForcedScorer(lossy)
    passes = reader.predictions(eval_text)
    with reader.exactly():
        first = next(passes)
    second = next(passes)
    assert len(first) == len(second) == NODES + 1
    assert not torch.equal(whole[: NODES + 1], first)
    assert not torch.equal(whole[NODES + 1 :], second)


def test_prompts_are_exact_and_so_are_steps_of_one_token(lossy: Engine, exact: Engine) -> None:
    """The one token after the prompt is alone in its pass, and its logits depend on the prompt's keys and values."""
    eval_text = EvalText(random_ids(30), 28)
    assert eval_text.predicted == 1
    found, expected = logits(lossy, eval_text), logits(exact, eval_text)
    assert (found - expected).abs().max() <= 1e-5


def test_without_a_drafter_no_budget_is_used(talker: Path) -> None:
    with Engine.load(talker, threads=1, budget=2, budget_rule="sum", speculate="off") as engine:
        quality = evaluate(engine, [TEXT], tokens=60)
    assert (quality.kl_mean, quality.agreement) == (0.0, 1.0)


def test_a_family_that_verifies_nothing_is_read_token_by_token(zoo: Zoo) -> None:
    folder = zoo("qwen3_next")
    texts = [random_ids(60)]
    with Engine.load(folder, threads=1, budget=1, budget_rule="sum") as engine:
        # No tested family is such a one.
        runner_of(engine).verifies = ""
        assert [len(each) for each in TeacherForcedScorer(engine).predictions(EvalText(texts[0], 56))] == [1, 1, 1]
        quality = evaluate(engine, texts)
        assert quality.kl_mean == 0.0
        expected = expected_perplexity(folder, eval_texts_for(engine, texts))
    assert quality.perplexity == pytest.approx(expected, rel=1e-3)


def test_all_of_the_measured_side_comes_first(lossy: Engine) -> None:
    """Loads of the reference would change a budget that depends on residency."""
    told: list[str] = []
    evaluate(lossy, [TEXT, TEXT[7:]], tokens=150, on_progress=lambda what, done, total: told.append(what))
    passes = len(told) // 2
    assert passes > 20
    assert told == ["text, lossy"] * passes + ["text, exact"] * passes


def test_progress_reaches_its_total(exact: Engine) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    evaluate(exact, [TEXT], tokens=50, on_progress=lambda what, *of: told.setdefault(what, []).append(of))
    assert list(told) == ["text, exact", "text, compared"]
    for each in told.values():
        assert each[-1] == (50, 50)
        assert each == sorted(each)


def test_the_progress_callback_may_raise(lossy: Engine) -> None:
    def give_up(what: str, done: int, total: int) -> None:
        if what == "text, exact":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(lossy, [TEXT], tokens=50, on_progress=give_up)
    assert lossy._loop.runner.budget is not None
    assert evaluate(lossy, [TEXT], tokens=50).kl_mean > 0


def test_an_engine_that_is_closed_meanwhile_says_so(talker: Path) -> None:
    with Engine.load(talker, threads=1) as engine, pytest.raises(EdgeMoEError, match="the engine is closed"):
        evaluate(engine, [TEXT], on_progress=lambda *of: engine.close())


# --- another checkpoint --------------------------------------------------------------------------


def test_another_checkpoint_as_the_reference(talker: Path, exact: Engine, lossy: Engine) -> None:
    """The same weights in another dtype; the measured engine is closed before the reference runs."""
    eval_texts = eval_texts_for(exact, [TEXT], 100)
    with closing(Evaluation(eval_texts)) as evaluation:
        with Engine.load(talker, threads=1, dtype="bfloat16") as engine:
            evaluation.measure(engine)
        quality = evaluation.against(exact)
    assert quality.against == exact.plan.model
    assert quality.lossy == ""
    assert 0 < quality.kl_mean < 1e-2
    assert quality.agreement > 0.8
    assert quality.exact_perplexity == pytest.approx(expected_perplexity(talker, eval_texts), rel=1e-3)
    # A reference is exact whatever its settings.
    with closing(Evaluation(eval_texts)) as evaluation:
        evaluation.measure(exact)
        assert evaluation.against(lossy).kl_mean < 1e-9


def test_another_vocabulary_is_refused_by_name(exact: Engine, talker: Path, zoo: Zoo) -> None:
    with pytest.raises(CheckpointError, match=r"edgemoe-demo has another vocabulary than .*against="):
        check_comparable(talker, None)
    check_comparable(talker, talker)
    check_comparable(None, None)
    # The vocabulary of a checkpoint without a tokenizer is its number of ids.
    check_comparable(zoo("mixtral"), zoo("qwen3_moe"))
    with pytest.raises(CheckpointError, match="has another vocabulary than"):
        check_comparable(zoo("mixtral"), zoo("mixtral", vocab_size=264))
    with Engine.load(threads=1) as demo, closing(Evaluation(eval_texts_for(exact, [TEXT], 20))) as evaluation:
        evaluation.measure(exact)
        with pytest.raises(CheckpointError, match="edgemoe-demo has another vocabulary"):
            evaluation.against(demo)


# --- texts ---------------------------------------------------------------------------------------


def test_without_texts_the_built_in_ones_are_read(exact: Engine) -> None:
    kinds = eval_texts_for(exact, tokens=8000)
    assert sum(eval_text.predicted for eval_text in kinds) > 4000
    assert bytes(token - 3 for token in kinds[0].tokens[:13]) == b'"""A small le'


def test_the_shipped_model_gets_its_tasks_as_text_and_as_questions() -> None:
    with Engine.load(threads=1) as demo:
        assert eval_texts_for(demo, tokens=300) == task_eval_texts(demo, 300)
        quality = evaluate(demo, tokens=300, questions=1)
        assert quality.tokens == 300
        assert quality.perplexity < 1.2, "it was trained for these"
        right = [each.right for each in score(demo, 1)]
    assert [(each.asked, each.right, each.exact_right) for each in quality.tasks] == [(1, each, each) for each in right]


def test_the_tasks_are_asked_with_the_budget_and_without() -> None:
    """A budget of one expert garbles verifications, and so replies; the exact side answers as an exact engine does."""
    with Engine.load(threads=1, budget=1, budget_rule="sum", speculate="ngram") as demo:
        quality = evaluate(demo, tokens=60, questions=1)
    with Engine.load(threads=1) as demo:
        exact = evaluate(demo, tokens=60, questions=1)
    assert [each.exact_right for each in quality.tasks] == [each.right for each in exact.tasks]
    assert sum(each.right for each in quality.tasks) < sum(each.exact_right for each in quality.tasks)


@pytest.mark.parametrize("texts", [[], ["a"], [[5, 6]]])
def test_too_little_text_is_refused(texts: list[str], exact: Engine) -> None:
    with pytest.raises(RequestError, match="nothing to predict: give a text of at least three tokens"):
        evaluate(exact, texts)


def test_texts_need_a_tokenizer_and_token_ids_do_not(zoo: Zoo) -> None:
    with Engine.load(zoo("mixtral"), threads=1) as engine:
        with pytest.raises(RequestError, match="no tokenizer files"):
            evaluate(engine)
        with pytest.raises(RequestError, match="no chat template"):
            task_eval_texts(engine)
        assert evaluate(engine, [random_ids(30)]).agreement == 1.0
