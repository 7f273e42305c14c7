"""The settings of a batch's sequences, and how a step's time is shared by those that drafted in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from edgemoe.config import EngineConfig
from edgemoe.draft.controller import (
    LEAST_TRIAL,
    SHORTER,
    SHORTEST_REST,
    TEST,
    TRIAL,
    Controllers,
    PassTrials,
    Setting,
)
from edgemoe.draft.proposer import DraftPrice, DraftProposer
from edgemoe.draft.settings import draft_settings
from edgemoe.draft.step_cost import REMEASURE_AFTER, RETRY_AFTER, StepCost
from edgemoe.request.request import Request
from tests.support.checkpoints import Running, Zoo, random_ids, running
from tests.support.crowd import Crowd, new_request


@pytest.fixture
def own(zoo: Zoo) -> Iterator[Running]:
    with running(zoo("mixtral")) as own:
        yield own


def some_requests(count: int) -> list[Request]:
    """Requests that no model answers: controllers only tell them apart."""
    return [new_request(number, [5, 6, number]) for number in range(count)]


@pytest.fixture
def requests() -> list[Request]:
    return some_requests(3)


def controllers(width: int = 4, **settings: str | int) -> Controllers:
    return Controllers(draft_settings(EngineConfig(**settings)), width)  # type: ignore[arg-type]


def test_named_drafters_always_draft(requests: list[Request]) -> None:
    found = controllers(speculate="ngram", draft_depth=5)
    for _ in range(200):
        assert found.setting(requests[0]) == Setting(5, 4, passes=False)
        found.stepped({requests[0]: 5}, {requests[0]: 1}, 4.0)
    assert found.changes == 0


def test_a_sequence_that_loses_rests_and_the_others_go_on(requests: list[Request]) -> None:
    """Two share a step that takes half as long again: one gets three tokens out of it, one nothing."""
    found = controllers()
    good, bad, _ = requests
    resting = 0
    for _ in range(200):
        settings = {each: found.setting(each) for each in (good, bad)}
        assert settings[good] is not None
        resting += settings[bad] is None
        drafted = {each: 4 if setting else 0 for each, setting in settings.items()}
        found.stepped(drafted, {good: 3, bad: 1}, 1.5)
    assert resting > 100
    assert found.changes > 1


def test_everybody_waits_for_what_one_drafts(requests: list[Request]) -> None:
    """Half a step more for one of three is one and a half plain steps lost: two tokens are too few for it."""
    for tokens, pays in ((2, False), (4, True)):
        found = controllers()
        for _ in range(TEST + 1):
            for each in requests:
                found.setting(each)
            drafted = dict.fromkeys(requests, 0) | {requests[0]: 4}
            found.stepped(drafted, {requests[0]: tokens}, 1.5)
        controller = found._own[requests[0]]
        assert (max(controller._tried.values()) > 1) == pays
        assert max(controller._tried.values()) == pytest.approx(tokens / 2.5)


def test_the_next_sequence_begins_with_what_was_best(requests: list[Request]) -> None:
    found = controllers()
    first, second, _ = requests
    for _ in range(150):
        setting = found.setting(first)
        assert setting is not None
        cost = 1.1 if setting.depth <= 4 else 3.5
        found.stepped({first: setting.depth}, {first: 3}, cost)
    changes = found.changes
    best = found._own[first].best
    found.forget(first)
    assert best.depth <= 4
    assert found.setting(second) == best
    assert found.changes == changes


def test_only_chains_where_only_chains_can_be_verified(requests: list[Request]) -> None:
    setting = controllers(width=1).setting(requests[0])
    assert setting is not None
    assert setting.width == 1


def test_a_plain_step_is_due_after_many_with_drafts_and_again_where_none_could_be_made() -> None:
    plain = StepCost()
    for _ in range(5):
        plain.observe(1.0)
    for _ in range(REMEASURE_AFTER):
        assert not plain.is_due()
        plain.observe_extra(4, 1.5)
    assert plain.is_due()
    assert not plain.is_due(), "while prompts run there are no plain steps, and drafts get on"
    for _ in range(RETRY_AFTER):
        plain.observe_extra(4, 1.5)
    assert plain.is_due()
    plain.observe(1.0)
    for _ in range(REMEASURE_AFTER - 1):
        plain.observe_extra(4, 1.5)
        assert not plain.is_due()


def test_a_first_plain_step_that_was_disturbed_is_got_over() -> None:
    """Steps with more tokens take less than it: it cannot have been what a plain one takes."""
    plain = StepCost()
    for _ in range(2):
        plain.observe(3.0)
    for _ in range(40):
        plain.observe_extra(4, 0.9)
    assert plain.seconds < 1.2


def test_passes_that_found_nothing_to_draft_are_charged(own: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """They took their time: a drafter whose every token is refused is soon left out."""
    crowd = Crowd(own, speculate="auto+self")
    speculation = crowd.speculation
    monkeypatch.setattr(DraftPrice, "pays", lambda *arguments: False)
    monkeypatch.setattr(DraftProposer, "_round_pays", lambda *arguments: True)
    seen = []
    crowd.ask(random_ids(5), max_tokens=80)
    while crowd.scheduler.running or crowd.scheduler.waiting:
        crowd.step()
        seen += [controller.setting for controller in speculation._controllers._own.values()]
    assert any(setting is None or not setting.passes for setting in seen)


def test_a_breath_of_noise_is_not_many_steps_in_a_large_batch() -> None:
    many = some_requests(32)
    found = controllers()
    for _ in range(TEST + 1):
        for each in many:
            found.setting(each)
        found.stepped(dict.fromkeys(many, 0) | {many[0]: 4}, {many[0]: 1}, 0.9)
    assert max(found._own[many[0]]._tried.values()) == pytest.approx(1 / (1 - SHORTER))


def test_while_prompts_run_rests_go_on_and_nothing_is_judged(requests: list[Request]) -> None:
    found = controllers()
    first = requests[0]
    while found.setting(first) is not None:
        found.stepped({first: 4}, {first: 1}, 2.0)
    for _ in range(SHORTEST_REST):
        assert found.setting(first) is None
        found.stepped({first: 0}, {}, None)
    setting = found.setting(first)
    assert setting is not None
    for _ in range(10 * TEST):
        found.stepped({first: 4}, {first: 1}, None)
    assert found.setting(first) == setting


def test_who_comes_next_rests_as_long_as_it_had_come_to(requests: list[Request]) -> None:
    found = controllers()
    first, second, _ = requests
    for _ in range(100):
        found.setting(first)
        found.stepped({first: 4}, {first: 1}, 2.0)
    rest = found._own[first].rest
    assert rest > SHORTEST_REST
    found.forget(first)
    found.setting(second)
    assert found._own[second].rest == rest


def test_what_it_decides_is_told(own: Running) -> None:
    crowd = Crowd(own, speculate="auto")
    before = crowd.speculation.telemetry()
    assert "depth" in before["speculation_setting"]
    assert (before["speculation_changes"], before["utility"]) == (0, 1.0)
    crowd.reply(random_ids(3) * 10, max_tokens=60)
    after = crowd.speculation.telemetry()
    assert "depth" in after["speculation_setting"] or after["speculation_setting"].startswith("off")
    assert after["utility"] > 0


def test_a_batch_forgets_the_sequences_that_are_over(own: Running) -> None:
    crowd = Crowd(own, speculate="auto")
    for number in range(3):
        crowd.reply(random_ids(8, seed=number), max_tokens=20)
    assert crowd.speculation._controllers._own == {}


# --- passes over sequences -------------------------------------------------------------------------


def with_head(loads: bool) -> Controllers:
    return Controllers(draft_settings(EngineConfig(), head=True), 4, lambda: loads)


def replies(found: Controllers, count: int, cycle: Callable[[bool], tuple[int, float]], length: int = 20) -> list[bool]:
    """Short replies, one after the other: whether passes were run in each of their cycles.

    `cycle(passes)` gives a cycle's tokens and its time in plain steps.
    """
    allowed = []
    for request in some_requests(count):
        left = length
        while left > 0:
            setting = found.setting(request)
            passes = setting is not None and setting.passes
            tokens, took = (1, 1.0) if setting is None else cycle(passes)
            allowed.append(passes)
            found.stepped({request: 3 if setting else 0}, {request: tokens} if setting else {}, took)
            left -= tokens
        found.forget(request)
    return allowed


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


@pytest.mark.parametrize("loads", [False, True])
def test_passes_that_lose_are_tried_less_and_less(loads: bool) -> None:
    """Replies are shorter than a sequence's own test: each would pay for passes again."""
    found = with_head(loads)
    allowed = replies(found, 400, lambda passes: (2, 4.0) if passes else (2, 1.5))
    first, later = allowed[: len(allowed) // 8], allowed[len(allowed) // 2 :]
    assert 0 < share(later) < share(first) < 0.5
    assert share(later) < 0.02
    again = replies(found, 400, lambda passes: (4, 2.0) if passes else (2, 1.5))
    assert share(again[len(again) // 2 :]) > 0.7, "once they pay they come back"


def test_passes_have_to_gain_more_than_drafts_without_them() -> None:
    """Both beat plain steps."""
    for tokens, pays in ((3, False), (6, True)):
        allowed = replies(with_head(False), 200, lambda passes, tokens=tokens: (tokens, 2.0) if passes else (2, 1.0))  # type: ignore[misc]
        assert (share(allowed[len(allowed) // 2 :]) > 0.5) == pays


def test_where_experts_are_missing_passes_come_after_doing_without() -> None:
    assert replies(with_head(False), 1, lambda passes: (2, 1.0)) == [True] * 10
    allowed = replies(with_head(True), 4, lambda passes: (2, 1.0))
    assert allowed.index(True) == TRIAL // 2
    assert all(allowed[TRIAL // 2 :])


def test_a_trial_changes_the_settings_of_sequences_that_run(requests: list[Request]) -> None:
    found, (request, _, _) = with_head(True), requests
    seen = []
    for _ in range(TRIAL + 1):
        setting = found.setting(request)
        assert setting is not None
        seen.append(setting.passes)
        found.stepped({request: 3}, {request: 3 if setting.passes else 2}, 1.0)
    assert not seen[0]
    assert seen[-1]


def test_a_trial_that_loses_much_ends_early() -> None:
    """It is not over after `TRIAL` tokens, but as soon as it can tell."""
    for took, tokens in ((8.0, LEAST_TRIAL), (2.1, TRIAL)):
        trials = PassTrials(False)
        for _ in range(TRIAL):
            assert not trials.passes
            trials.observe(1, 1.0)
        tried = 0
        while trials.passes:
            trials.observe(2, took)
            tried += 2
        assert tried == tokens


def test_steps_whose_time_is_not_known_say_nothing_of_passes(requests: list[Request]) -> None:
    found = with_head(True)
    for _ in range(2 * TRIAL):
        setting = found.setting(requests[0])
        assert setting is not None
        assert not setting.passes
        found.stepped({requests[0]: 3}, {requests[0]: 2}, None)
