"""The controller of one sequence, told what cycles gave and cost by a world that is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgemoe.draft.controller import (
    HOLD,
    IDLE,
    LONGEST_REST,
    SHORTEST_REST,
    TEST,
    Setting,
    Tally,
    UtilityController,
    utility,
)

MOST = Setting(8, 4, passes=False)
World = Callable[[Setting], tuple[int, float]]
"""Tokens and cost, in plain steps, of a cycle under a setting."""


def drive(controller: UtilityController, world: World, steps: int) -> list[Setting | None]:
    """The settings of so many steps."""
    seen = []
    for _ in range(steps):
        setting = controller.setting
        seen.append(setting)
        if setting is None:
            controller.passed()
        else:
            controller.observe(setting.depth, *world(setting))
    return seen


def deep_pays(setting: Setting) -> tuple[int, float]:
    return 1 + setting.depth, 1 + 0.2 * setting.depth


def nothing_pays(setting: Setting) -> tuple[int, float]:
    return 1, 1 + 0.3 * setting.depth


def test_utility_is_tokens_over_plain_steps() -> None:
    assert utility(3.0, 1.5) == 2.0
    tally = Tally()
    assert tally.utility == 1.0
    for tokens, cost in ((4, 2.0), (1, 2.0), (4, 2.0)):
        tally.add(tokens, cost)
    assert tally.utility == pytest.approx(1.5, rel=0.05)


def test_old_cycles_fade() -> None:
    tally = Tally()
    for _ in range(400):
        tally.add(1, 2.0)
    for _ in range(100):
        tally.add(4, 2.0)
    assert tally.utility > 1.85
    assert tally.cycles < 33


def test_where_deep_drafts_pay_it_stays_deep_and_never_rests() -> None:
    controller = UtilityController(MOST, MOST)
    seen = drive(controller, deep_pays, 300)
    assert None not in seen
    assert sum(setting is not None and setting.depth == 8 for setting in seen[100:]) > 0.8 * 200
    assert controller.utility == pytest.approx(9 / 2.6, rel=0.01)
    assert controller.best.depth == 8


def test_where_only_short_drafts_pay_it_climbs_down_to_them() -> None:
    def world(setting: Setting) -> tuple[int, float]:
        return (2, 1.2) if setting.depth <= 2 else (2, 1.0 + 0.3 * setting.depth)

    controller = UtilityController(MOST, MOST)
    seen = drive(controller, world, 400)
    late = [setting for setting in seen[200:] if setting is not None]
    assert sum(setting.depth <= 2 for setting in late) > 0.6 * len(late)
    assert controller.best.depth <= 2


def test_where_chains_pay_and_trees_do_not_it_finds_chains() -> None:
    def world(setting: Setting) -> tuple[int, float]:
        return (3, 1.5) if setting.width == 1 else (3, 2.8)

    controller = UtilityController(MOST, MOST)
    drive(controller, world, 300)
    assert controller.best.width == 1


def test_a_drafter_that_runs_passes_is_left_out_where_it_does_not_pay() -> None:
    most = Setting(8, 4, passes=True)

    def world(setting: Setting) -> tuple[int, float]:
        return (3, 2.9) if setting.passes else (2, 1.2)

    controller = UtilityController(most, most)
    drive(controller, world, 400)
    assert not controller.best.passes


def test_where_nothing_pays_it_rests_ever_longer_and_always_comes_back() -> None:
    controller = UtilityController(MOST, MOST)
    seen = drive(controller, nothing_pays, 3000)
    rests, length = [], 0
    for setting in seen:
        if setting is None:
            length += 1
        elif length:
            rests.append(length)
            length = 0
    assert rests[0] == SHORTEST_REST
    assert rests[1] == 2 * SHORTEST_REST
    assert max(rests) == LONGEST_REST
    assert rests == sorted(rests)
    drafted = sum(setting is not None for setting in seen[1000:])
    assert drafted < 0.15 * 2000, "tests cost little by then"
    assert controller.describe() in ("off: it did not pay", str(controller.setting))


def test_what_begins_to_pay_is_found_again_and_rests_are_short_again() -> None:
    controller = UtilityController(MOST, MOST)
    drive(controller, nothing_pays, 700)
    seen = drive(controller, deep_pays, LONGEST_REST + 60)
    assert None not in seen[LONGEST_REST + 4 * TEST :]
    after = drive(controller, nothing_pays, HOLD + 20 * TEST + SHORTEST_REST)
    first = after.index(None)
    assert after[first : first + SHORTEST_REST] == [None] * SHORTEST_REST
    assert after[first + SHORTEST_REST] is not None


def test_a_change_of_the_text_is_noticed_within_sixty_cycles() -> None:
    for before in range(40, 140, 7):
        controller = UtilityController(MOST, MOST)
        drive(controller, deep_pays, before)
        changes = controller.changes
        assert None in drive(controller, nothing_pays, 60)
        assert controller.changes > changes


def test_the_first_cycle_of_a_setting_is_not_counted() -> None:
    """It pays for the change: kernels that run for the first time, experts that are not there yet."""
    controller = UtilityController(MOST, MOST)
    controller.observe(8, 1, 100.0)
    assert controller.utility == 1.0
    drive(controller, deep_pays, 2)
    assert controller.utility == pytest.approx(9 / 2.6)


def test_steps_without_anything_to_draft_tell_nothing_and_are_told_of() -> None:
    controller = UtilityController(MOST, MOST)
    for _ in range(IDLE):
        assert controller.describe() == "trees of depth 8"
        controller.observe(0, 1, 5.0)
    assert controller.describe() == "trees of depth 8, of which nothing is worth it now"
    assert (controller.utility, controller.changes) == (1.0, 0)
    controller.observe(3, 1, 1.0)
    assert controller.describe() == "trees of depth 8"


def test_no_setting_goes_beyond_the_bounds() -> None:
    most = Setting(5, 1, passes=False)
    controller = UtilityController(most, most)
    for world in (deep_pays, nothing_pays, lambda setting: (1 + setting.depth % 3, 1.5)):
        for setting in drive(controller, world, 500):
            assert setting is None or (1 <= setting.depth <= 5 and setting.width == 1 and not setting.passes)
