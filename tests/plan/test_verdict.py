from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgemoe.plan.profile import Profile
from edgemoe.plan.verdict import verdict
from tests.support.profiles import CARD, known_profile


def changed(share: float = 1.0, link: float = 4e9, **times: Any) -> Profile:
    """The known machine with other times, and with slots for a share of the experts."""
    made = known_profile()
    points = [replace(point, cache_share=min(point.cache_share, share)) for point in made.points]
    model = replace(made.model, times=replace(made.model.times, **times), speed=replace(made.model.speed, link=link))
    return replace(made, points=tuple(points), model=model)


def test_drafts_that_pay_with_few_sequences() -> None:
    made = changed(bulk_from=0, knee=0.3, base=2.0)
    gain = max(each.speedup for each in made.model.outlook(1, 1.0, 0.7, range(1, 9)).drafts)
    found = verdict(made)
    assert found.drafts == (
        f"drafts pay with 1 to 8 sequences ({gain:.2f} x at best, with 1), if 70% of the drafted tokens are right, "
        "and do not with 16 to 64 sequences"
    )
    assert found.disturbed == ""
    assert " with 1 sequence (" in verdict(changed(bulk_from=0, token=0.006)).drafts


def test_drafts_that_never_pay() -> None:
    found = verdict(changed(draft_bias=1.0))
    assert found.drafts.startswith("drafts do not pay here, if 70% of the drafted tokens are right: 0.")
    assert " x at best, with " in found.drafts


def test_drafts_that_always_pay() -> None:
    found = verdict(changed(bias=10.0, bulk_bias=10.0))
    assert found.drafts.startswith("drafts pay with 1 to 64 sequences (")
    assert found.drafts.endswith("if 70% of the drafted tokens are right")


@pytest.mark.parametrize("card", [False, True])
def test_a_sequence_that_waits_for_missing_experts(card: bool) -> None:
    made = replace(changed(share=0.35, link=1e8), card=CARD if card else None)
    what = "link" if card else "disk"
    found = verdict(made).bottleneck
    assert found.startswith(f"one sequence waits for the {what} for 9")
    assert found.endswith(f"a larger expert_cache=, fewer bits (experts=) or a faster {what} would help")
    assert "waits" not in verdict(changed(share=1.0, link=1e8)).bottleneck


def test_a_sequence_that_reads_memory() -> None:
    made = changed(bias=0.0, token=0.0, load=0.0, expert=6 * 14_000_000 / 50e9)
    assert verdict(made).bottleneck.startswith("one sequence reads memory for 100% of its time")


def test_a_sequence_that_computes() -> None:
    assert verdict(changed(bias=0.5)).bottleneck == (
        "one sequence spends most of its time on computing and small operations: more sequences at a time would help"
    )


def test_a_measurement_that_was_disturbed() -> None:
    made = known_profile()
    points = [replace(point, spread=0.5) for point in made.points[:6]]
    disturbed = replace(made, points=(*points, *made.points[6:]))
    assert verdict(disturbed).sentences[-1].startswith("6 of 24 times differed by more than 30% from pass to pass")
    assert len(verdict(replace(made, points=(*points[:5], *made.points[5:]))).sentences) == 2
