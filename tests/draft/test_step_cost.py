"""The cost of extra tokens in a step, also when some measurements are disturbed."""

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
    assert plain.seconds == pytest.approx(3.0, rel=0.1), "the average follows a change"


def test_a_disturbed_step_counts_little() -> None:
    plain = after_plain(1.0, steps=40)
    plain.observe(1000.0)
    assert plain.seconds == pytest.approx(1 + (OUTLIER_RATIO - 1) / 32)
    plain = after_plain(1.0, steps=40)
    plain.observe(0.0)
    assert plain.seconds == pytest.approx(1 - (1 - 1 / OUTLIER_RATIO) / 32)


@pytest.mark.parametrize("each", [0.0, 0.05, 0.7])
def test_the_cost_of_a_token_is_measured(each: float) -> None:
    """From steps with few and with many extra tokens among plain ones, whatever the prior."""
    draw, plain = random.Random(2), after_plain(1.0)
    for _ in range(60):
        tokens = draw.randint(1, 16)
        plain.observe_extra(tokens, 1.0 + each * tokens)
        plain.observe(1.0)
    assert plain.token == pytest.approx(each, abs=0.05)


def test_the_prior_regains_weight_while_nothing_is_measured() -> None:
    plain = after_plain(1.0)
    for _ in range(20):
        plain.observe_extra(8, 1.0)
    assert plain.token < 0.1
    measured = plain.token
    for _ in range(2000):
        plain.observe(1.0)
    assert measured < plain.token == pytest.approx(PRIOR_TOKEN_COST, rel=0.05)


def test_the_effect_of_a_disturbed_step_on_a_tokens_cost_is_bounded() -> None:
    plain, disturbed = after_plain(1.0), after_plain(1.0)
    plain.observe_extra(4, 1 + 4 * OUTLIER_RATIO)
    disturbed.observe_extra(4, 1000.0)
    assert disturbed.token == pytest.approx(plain.token)
    quick = after_plain(1.0)
    quick.observe_extra(4, 0.1)
    assert 0 < quick.token < PRIOR_TOKEN_COST, "extra tokens that speed a step up cost nothing, not less"


def test_a_tokens_waits_for_the_link_are_separated() -> None:
    plain = StepCost()
    for _ in range(21):
        plain.observe(1.0, waited=0.6)
    assert plain.computing == pytest.approx(0.4 * PRIOR_TOKEN_COST), "the prior waits in the proportion of plain steps"
    for _ in range(200):
        plain.observe_extra(8, 1 + 8 * 0.3, waited=0.6 + 8 * 0.25)
        plain.observe(1.0, waited=0.6)
    assert plain.token == pytest.approx(0.3, abs=0.02)
    assert plain.computing == pytest.approx(0.05, abs=0.02)
    plain.observe_extra(8, 1.0, waited=50.0)
    assert 0 < plain.computing < plain.token, "no wait is longer than its step"


def test_numbers_of_sequences_have_costs_of_their_own() -> None:
    cost = CycleCost()
    for _ in range(3):
        cost.observe_step(1, 1, 1.0)
        cost.observe_step(6, 6, 3.0)
    assert (cost.of(1).seconds, cost.of(6).seconds) == (1.0, 3.0)
    assert cost.of(16) is cost.of(18)
    assert len({id(cost.of(sequences)) for sequences in (1, 2, 4, 7, 8, 16, 31)}) == 7
    assert cost.of(2).seconds == 0.0


def test_steps_with_drafts_measure_the_tokens_beyond_one_per_sequence() -> None:
    cost = CycleCost()
    cost.observe_step(2, 30, 9.0)
    assert cost.of(2).token == 0.0, "nothing to compare with yet"
    for _ in range(3):
        cost.observe_step(2, 2, 1.0)
    for _ in range(100):
        cost.observe_step(2, 12, 2.0)
    assert cost.of(2).token == pytest.approx(0.1, abs=0.03)
    assert cost.of(2).seconds == 1.0


def test_drafting_passes_are_measured_separately() -> None:
    """From plain steps, and by the number of sequences."""
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
    """The passes made in `steps` steps for a gain of 1 s each, when they take `seconds` and took 50 s before."""
    cost, made = CycleCost(), 0
    for _ in range(2):
        cost.observe_draft(1, 50.0)
    for _ in range(steps):
        if cost.draft_pays(1, 1.0):
            made += 1
            cost.observe_draft(1, seconds)
    return made


def test_drafting_passes_that_do_not_pay_are_retried_now_and_then() -> None:
    """The measured passes may have been disturbed. Passes that never pay cost two per `REMEASURE_AFTER` steps."""
    assert drafting_passes_made(10 * REMEASURE_AFTER, 0.5) > 8 * REMEASURE_AFTER
    assert 15 <= drafting_passes_made(10 * REMEASURE_AFTER, 50.0) <= 20


def test_a_profile_is_the_prior_of_a_tokens_cost() -> None:
    """For each number of sequences, until the cost is measured."""
    costs = CycleCost(lambda sequences: 0.3 / sequences**2)
    for sequences in (1, 4):
        plain = costs.of(sequences)
        for _ in range(3):
            costs.observe_step(sequences, sequences, 2.0)
        assert plain.token == pytest.approx(0.3 / sequences**2 * 2.0)
    for _ in range(400):
        costs.observe_step(1, 2, 2.0 + 1.5)
    assert costs.of(1).token == pytest.approx(1.5, rel=0.15)


def test_a_profiles_prior_is_capped_so_that_drafts_are_made_and_measured() -> None:
    costs = CycleCost(lambda sequences: 5.0)
    for sequences in (1, 4):
        for _ in range(3):
            costs.observe_step(sequences, sequences, 1.0)
        worth = costs.of(sequences).seconds / sequences
        assert MARGIN * costs.of(sequences).token < 0.9 * worth


def test_the_prior_falls_with_the_number_of_sequences() -> None:
    """By more than the step's time per sequence: a step of many sequences needs most experts anyway."""
    costs = CycleCost()
    for sequences in (1, 2, 32):
        for _ in range(2):
            costs.observe_step(sequences, sequences, 1.0)
    assert costs.of(1).token == pytest.approx(PRIOR_TOKEN_COST)
    shares = [sequences * costs.of(sequences).token for sequences in (1, 2, 32)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(PRIOR_TOKEN_COST / 32**PRIOR_SHARING)


def test_the_cost_for_a_similar_number_of_sequences_is_borrowed_until_measured() -> None:
    costs = costs_after_plain(32, 2.0)
    for _ in range(200):
        costs.observe_step(32, 96, 3.0)
    near, far = costs.of(27), costs.of(16)
    assert (near.seconds, far.seconds) == (2.0, 0.0)
    assert near.token == pytest.approx(costs.of(32).token, rel=0.02)
    assert near.is_due(), "a plain step of its own is due at once"
    assert not near.is_due(), "and then again only after a while"
    costs.observe_step(27, 27, 1.5)
    assert near.seconds == 1.5
    assert costs.of(32).seconds == 2.0


def test_twice_as_many_sequences_borrow_nothing() -> None:
    costs = costs_after_plain(1, 1.0)
    assert costs.of(2).seconds == 0.0


def test_a_borrowed_cost_is_not_lent() -> None:
    """Otherwise a step of four sequences would soon serve for thirty-two."""
    costs = costs_after_plain(4, 1.0)
    assert [costs.of(sequences).seconds for sequences in (5, 6, 7, 8)] == [1.0, 0.0, 0.0, 0.0]


def test_the_first_own_measurement_replaces_the_borrowed_one() -> None:
    costs = costs_after_plain(32, 1.0)
    costs.of(27)
    costs.observe_step(27, 27, 5.0)
    assert costs.of(27).seconds == 5.0


def test_one_fast_step_changes_a_borrowed_cost_little() -> None:
    costs = costs_after_plain(32, 1.0)
    costs.of(27)
    costs.observe_step(27, 40, 0.5)
    assert costs.of(27).seconds > 0.95
