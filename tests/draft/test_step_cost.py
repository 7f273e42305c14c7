"""What more tokens in a step cost, from steps of which some are disturbed."""

from __future__ import annotations

import random

import pytest

from edgemoe.draft.proposer import MARGIN
from edgemoe.draft.step_cost import OUTLIER_RATIO, PRIOR_SHARING, PRIOR_TOKEN_COST, REMEASURE_AFTER, CycleCost, StepCost


def after_plain(seconds: float, steps: int = 20) -> StepCost:
    plain = StepCost()
    for _ in range(steps + 1):
        plain.observe(seconds)
    return plain


def costs_after_plain(sequences: int, seconds: float) -> CycleCost:
    costs = CycleCost()
    for _ in range(3):
        costs.observe_step(sequences, sequences, seconds)
    return costs


def test_nothing_is_known_before_the_second_step() -> None:
    plain = StepCost()
    assert (plain.seconds, plain.token) == (0.0, 0.0)
    plain.observe(100.0)
    assert plain.seconds == 0.0, "the first one is a warm-up"
    plain.observe(2.0)
    assert plain.seconds == 2.0
    assert plain.token == pytest.approx(2.0 * PRIOR_TOKEN_COST)


def test_a_plain_step_is_an_average() -> None:
    draw, plain = random.Random(1), StepCost()
    for _ in range(400):
        plain.observe(draw.uniform(0.9, 1.1))
    assert plain.seconds == pytest.approx(1.0, rel=0.05)
    for _ in range(100):
        plain.observe(draw.uniform(2.9, 3.1))
    assert plain.seconds == pytest.approx(3.0, rel=0.1), "it follows what has changed"


def test_a_disturbed_step_counts_little() -> None:
    plain = after_plain(1.0, steps=40)
    plain.observe(1000.0)
    assert plain.seconds == pytest.approx(1 + (OUTLIER_RATIO - 1) / 32)
    plain = after_plain(1.0, steps=40)
    plain.observe(0.0)
    assert plain.seconds == pytest.approx(1 - (1 - 1 / OUTLIER_RATIO) / 32)


@pytest.mark.parametrize("each", [0.0, 0.05, 0.7])
def test_the_cost_of_a_token_is_measured(each: float) -> None:
    """From steps with few and with many more tokens, beside plain ones, whatever was guessed at first."""
    draw, plain = random.Random(2), after_plain(1.0)
    for _ in range(60):
        tokens = draw.randint(1, 16)
        plain.observe_extra(tokens, 1.0 + each * tokens)
        plain.observe(1.0)
    assert plain.token == pytest.approx(each, abs=0.05)


def test_the_guess_comes_back_where_nothing_is_measured() -> None:
    plain = after_plain(1.0)
    for _ in range(20):
        plain.observe_extra(8, 1.0)
    assert plain.token < 0.1
    measured = plain.token
    for _ in range(2000):
        plain.observe(1.0)
    assert measured < plain.token == pytest.approx(PRIOR_TOKEN_COST, rel=0.05)


def test_what_a_disturbed_step_makes_of_a_token_is_bounded() -> None:
    plain, disturbed = after_plain(1.0), after_plain(1.0)
    plain.observe_extra(4, 1 + 4 * OUTLIER_RATIO)
    disturbed.observe_extra(4, 1000.0)
    assert disturbed.token == pytest.approx(plain.token)
    quick = after_plain(1.0)
    quick.observe_extra(4, 0.1)
    assert 0 < quick.token < PRIOR_TOKEN_COST, "a step that was faster with more tokens makes them free, not cheaper"


def test_what_a_token_waits_for_the_link_is_told_apart() -> None:
    plain = StepCost()
    for _ in range(21):
        plain.observe(1.0, waited=0.6)
    assert plain.computing == pytest.approx(0.4 * PRIOR_TOKEN_COST), "the guess is taken to wait as plain steps do"
    for _ in range(200):
        plain.observe_extra(8, 1 + 8 * 0.3, waited=0.6 + 8 * 0.25)
        plain.observe(1.0, waited=0.6)
    assert plain.token == pytest.approx(0.3, abs=0.02)
    assert plain.computing == pytest.approx(0.05, abs=0.02)
    plain.observe_extra(8, 1.0, waited=50.0)
    assert 0 < plain.computing < plain.token, "nothing waits for longer than it takes"


def test_many_sequences_have_prices_of_their_own() -> None:
    cost = CycleCost()
    for _ in range(3):
        cost.observe_step(1, 1, 1.0)
        cost.observe_step(6, 6, 3.0)
    assert (cost.of(1).seconds, cost.of(6).seconds) == (1.0, 3.0)
    assert cost.of(16) is cost.of(18)
    assert len({id(cost.of(sequences)) for sequences in (1, 2, 4, 7, 8, 16, 31)}) == 7
    assert cost.of(2).seconds == 0.0


def test_steps_with_drafts_price_the_tokens_beyond_one_each() -> None:
    cost = CycleCost()
    cost.observe_step(2, 30, 9.0)
    assert cost.of(2).token == 0.0, "nothing to compare with yet"
    for _ in range(3):
        cost.observe_step(2, 2, 1.0)
    for _ in range(100):
        cost.observe_step(2, 12, 2.0)
    assert cost.of(2).token == pytest.approx(0.1, abs=0.03)
    assert cost.of(2).seconds == 1.0


def test_drafting_passes_are_timed_apart() -> None:
    """From plain steps, and those for few sequences from those for many."""
    cost = CycleCost()
    assert cost.draft_pays(1, 0.0), "nothing was measured yet"
    for seconds in (50.0, 0.5, 0.5):
        cost.observe_draft(1, seconds)
    assert (cost.draft_pays(1, 0.5), cost.draft_pays(1, 0.49)) == (True, False)
    for _ in range(3):
        cost.observe_draft(32, 4.0)
    assert (cost.draft_pays(32, 3.9), cost.draft_pays(35, 3.9), cost.draft_pays(1, 0.5)) == (False, False, True)
    assert cost.of(1).seconds == 0.0


def drafting_passes_made(steps: int, seconds: float) -> int:
    """How many a gain of a second is worth in so many steps, where they take `seconds`, and took 50 before."""
    cost, made = CycleCost(), 0
    for _ in range(2):
        cost.observe_draft(1, 50.0)
    for _ in range(steps):
        if cost.draft_pays(1, 1.0):
            made += 1
            cost.observe_draft(1, seconds)
    return made


def test_drafting_passes_that_seem_too_dear_are_tried_again_now_and_then() -> None:
    """One slow pass may be what made them dear; and if they are, that costs two in so many steps."""
    assert drafting_passes_made(10 * REMEASURE_AFTER, 0.5) > 8 * REMEASURE_AFTER
    assert 15 <= drafting_passes_made(10 * REMEASURE_AFTER, 50.0) <= 20


def test_a_profile_tells_what_a_token_costs_before_it_is_measured() -> None:
    """For each number of sequences; what is measured takes its place."""
    costs = CycleCost(lambda sequences: 0.3 / sequences**2)
    for sequences in (1, 4):
        plain = costs.of(sequences)
        for _ in range(3):
            costs.observe_step(sequences, sequences, 2.0)
        assert plain.token == pytest.approx(0.3 / sequences**2 * 2.0)
    for _ in range(400):
        costs.observe_step(1, 2, 2.0 + 1.5)
    assert costs.of(1).token == pytest.approx(1.5, rel=0.15)


def test_no_profile_is_so_sure_that_nothing_is_ever_drafted_and_measured() -> None:
    costs = CycleCost(lambda sequences: 5.0)
    for sequences in (1, 4):
        for _ in range(3):
            costs.observe_step(sequences, sequences, 1.0)
        worth = costs.of(sequences).seconds / sequences
        assert MARGIN * costs.of(sequences).token < 0.9 * worth


def test_before_it_is_measured_a_token_costs_less_the_more_sequences_there_are() -> None:
    """Less than a share of the step's time for each of them, since most of its experts are wanted anyway."""
    costs = CycleCost()
    for sequences in (1, 2, 32):
        for _ in range(2):
            costs.observe_step(sequences, sequences, 1.0)
    assert costs.of(1).token == pytest.approx(PRIOR_TOKEN_COST)
    shares = [sequences * costs.of(sequences).token for sequences in (1, 2, 32)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(PRIOR_TOKEN_COST / 32**PRIOR_SHARING)


def test_steps_for_nearly_as_many_sequences_tell_until_there_is_one_of_its_own() -> None:
    costs = costs_after_plain(32, 2.0)
    for _ in range(200):
        costs.observe_step(32, 96, 3.0)
    near, far = costs.of(27), costs.of(16)
    assert (near.seconds, far.seconds) == (2.0, 0.0)
    assert near.token == pytest.approx(costs.of(32).token, rel=0.02)
    assert near.is_due(), "one of its own is wanted at once"
    assert not near.is_due(), "and then again only after a while"
    costs.observe_step(27, 27, 1.5)
    assert near.seconds == 1.5
    assert costs.of(32).seconds == 2.0


def test_few_sequences_tell_nothing_of_twice_as_many() -> None:
    costs = costs_after_plain(1, 1.0)
    assert costs.of(2).seconds == 0.0


def test_what_was_borrowed_is_not_lent() -> None:
    """Else a step of four sequences would soon stand for one of thirty-two."""
    costs = costs_after_plain(4, 1.0)
    assert [costs.of(sequences).seconds for sequences in (5, 6, 7, 8)] == [1.0, 0.0, 0.0, 0.0]


def test_the_first_measurement_of_its_own_counts_in_full_however_far_off_the_borrowed_one_was() -> None:
    costs = costs_after_plain(32, 1.0)
    costs.of(27)
    costs.observe_step(27, 27, 5.0)
    assert costs.of(27).seconds == 5.0


def test_one_quick_step_does_not_change_much_of_what_was_borrowed() -> None:
    costs = costs_after_plain(32, 1.0)
    costs.of(27)
    costs.observe_step(27, 40, 0.5)
    assert costs.of(27).seconds > 0.95
