"""What speculation learns of steps in which prompts run too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edgemoe.draft.proposal import Proposal, StepReport
from edgemoe.draft.speculation import MAX_PROMPT_TOKENS, Speculation
from edgemoe.draft.step_cost import REMEASURE_AFTER
from edgemoe.request.request import Request
from tests.support.checkpoints import Zoo, running
from tests.support.crowd import Crowd

REPEATED = [7, 8, 9, 10] * 6


@pytest.fixture
def crowd(zoo: Zoo) -> Iterator[Crowd]:
    with running(zoo("mixtral")) as own:
        yield Crowd(own, speculate="auto")


def report(sequences: int, seconds: float, *, drafted: int = 0, prompt: int = 0) -> StepReport:
    """A step for `sequences` that decode, the first of which verified `drafted` tokens, beside part of a prompt."""
    return StepReport({}, sequences, sequences + drafted + prompt, prompt, seconds, 0.0)


def measured(speculation: Speculation, sequences: int) -> None:
    """Plain steps of a second are known."""
    for _ in range(3):
        speculation.learn(Proposal(), report(sequences, 1.0))
    assert speculation._costs.of(sequences).seconds == 1.0


def test_the_tokens_of_a_short_prompt_tell_what_a_token_costs(crowd: Crowd) -> None:
    speculation = crowd.speculation
    measured(speculation, 2)
    for _ in range(200):
        speculation.learn(Proposal(), report(2, 1.8, drafted=4, prompt=2 * MAX_PROMPT_TOKENS))
    assert speculation._costs.of(2).token == pytest.approx(0.1, abs=0.01)
    assert speculation._costs.of(2).seconds == 1.0, "no such step is a plain one"


def test_those_of_a_long_one_tell_nothing(crowd: Crowd) -> None:
    speculation = crowd.speculation
    measured(speculation, 2)
    before = speculation._costs.of(2).token
    for _ in range(200):
        speculation.learn(Proposal(), report(2, 9.0, drafted=4, prompt=2 * MAX_PROMPT_TOKENS + 1))
    assert speculation._costs.of(2).token == before


def test_prompts_alone_are_no_step_to_learn_from(crowd: Crowd) -> None:
    crowd.speculation.learn(Proposal(), report(0, 1.0, prompt=9))
    assert [each.seconds for each in crowd.speculation._costs._steps.values()] == []


def told(crowd: Crowd, prompt: int) -> float:
    """The plain steps that a controller was told a step took, with a draft of 4 and part of a prompt in it."""
    speculation, asked = crowd.speculation, crowd.ask(REPEATED)
    measured(speculation, 1)
    heard: list[float | None] = []
    proposal = speculation.propose({asked: 8})

    def stepped(drafted: object, made: object, plain_steps: float | None) -> None:
        heard.append(plain_steps)

    speculation._controllers.stepped = stepped  # type: ignore[method-assign]
    speculation.learn(proposal, report(1, 2.5, drafted=4, prompt=prompt))
    assert heard[0] is not None
    return heard[0]


def test_what_a_prompt_took_is_not_laid_to_a_draft(crowd: Crowd) -> None:
    cost = crowd.speculation._costs.of(1)
    with_prompt = told(crowd, prompt=2)
    assert with_prompt == pytest.approx(2.5 - 2 * 0.35, abs=0.05)
    assert cost.token > 0


def test_a_plain_step_is_not_made_while_prompts_run(crowd: Crowd) -> None:
    """It would measure nothing, and the drafts would be lost."""
    speculation, asked = crowd.speculation, crowd.ask(REPEATED)
    measured(speculation, 1)
    for _ in range(REMEASURE_AFTER):
        speculation.learn(Proposal(), report(1, 1.01, drafted=2))
    assert drafts(speculation, asked, mixed=True) > 0
    assert drafts(speculation, asked, mixed=False) == 0
    assert drafts(speculation, asked, mixed=False) > 0, "asked again only after a while"


def drafts(speculation: Speculation, asked: Request, *, mixed: bool) -> int:
    return sum(tree.drafted for tree in speculation.propose({asked: 8}, mixed=mixed).trees.values())
