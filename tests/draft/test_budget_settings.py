"""What may be asked of a budget, the sentence for what may not, and what the plan says of it."""

from __future__ import annotations

from typing import Any

import pytest

from edgemoe import Engine, PlanError
from edgemoe.config import EngineConfig, choices_of
from edgemoe.draft.settings import BudgetSettings, budget_settings
from edgemoe.prefetch.budget import RULES, Budget, Unit
from tests.support.checkpoints import Zoo


def settings(**asked: Any) -> BudgetSettings | None:
    return budget_settings(EngineConfig(**asked))


@pytest.mark.parametrize(
    ("asked", "unit", "amount"),
    [
        ("8", Unit.EXPERTS, 8.0),
        (8, Unit.EXPERTS, 8.0),
        (" 1 ", Unit.EXPERTS, 1.0),
        ("95%", Unit.MASS, 0.95),
        ("99.5%", Unit.MASS, 0.995),
        ("100%", Unit.MASS, 1.0),
        ("64MiB", Unit.NBYTES, 64.0 * (1 << 20)),
        ("64mib", Unit.NBYTES, 64.0 * (1 << 20)),
        ("1.5 GB", Unit.NBYTES, 1.5e9),
    ],
)
def test_sizes(asked: str | int, unit: Unit, amount: float) -> None:
    found = settings(budget=asked)
    assert found is not None
    assert found == BudgetSettings(Budget(unit, amount, "residency"), "substitute")


def test_without_one_there_is_none() -> None:
    assert settings() is None
    assert settings(budget=" OFF ") is None


def test_the_rule_and_what_becomes_of_what_is_dropped() -> None:
    for rule in RULES:
        for dropped in choices_of("budget_dropped"):
            found = settings(budget=4, budget_rule=rule, budget_dropped=dropped)
            assert found == BudgetSettings(Budget(Unit.EXPERTS, 4.0, rule), dropped)


FORMS = r'give off, experts of a layer \("8"\), a share of the routing mass \("95%"\) or bytes of a pass \("64MiB"\)$'
LEAST = "is not possible: give at least 1 expert or byte, or a share up to 100%$"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"budget": "much"}, "^budget='much' is no size: " + FORMS),
        ({"budget": ""}, "^budget='' is no size: " + FORMS),
        ({"budget": "-3"}, "^budget='-3' is no size: " + FORMS),
        ({"budget": "1.5"}, r"^budget='1\.5' is no size: " + FORMS),
        ({"budget": 0.95}, r"^budget=0\.95 is not possible: give a text .* or a whole number$"),
        ({"budget": "95 %"}, "^budget='95 %' is no size: " + FORMS),
        ({"budget": "8 apples"}, "^budget='8 apples' is no size: " + FORMS),
        ({"budget": 0}, "^budget=0 " + LEAST),
        ({"budget": "0%"}, "^budget=0% " + LEAST),
        ({"budget": "101%"}, "^budget=101% " + LEAST),
        ({"budget": "0MiB"}, "^budget=0mib " + LEAST),
        ({"budget": "0.5B"}, r"^budget=0\.5b " + LEAST),
        ({"budget_rule": "best"}, "^budget_rule='best' is none of sum, path, residency: give one of these$"),
        ({"budget": 8, "budget_dropped": "x"}, "^budget_dropped='x' is none of substitute, truncate: give one of "),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        settings(**asked)


def test_it_is_refused_before_any_weight_is_read(zoo: Zoo) -> None:
    for ask in (Engine.plan_for, Engine.load):
        with pytest.raises(PlanError, match="budget='some' is no size"):
            ask(zoo("mixtral"), budget="some")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"budget": 8, "budget_rule": "sum"}, "verifications of drafts keep to 8 experts a layer"),
        ({"budget": 1, "budget_rule": "path"}, "verifications of drafts keep to 1 expert a layer"),
        ({"budget": 8}, "verifications of drafts keep to 8 new experts a layer"),
        ({"budget": "99.5%"}, "verifications of drafts keep to 99.5% of each token's routing mass"),
        ({"budget": "64MiB"}, "verifications of drafts keep to 64.0 MiB of new experts a pass"),
        ({"budget": "64MiB", "budget_rule": "path"}, "verifications of drafts keep to 64.0 MiB of experts a pass"),
    ],
)
def test_the_plan_says_what_is_lossy(asked: dict[str, Any], sentence: str, zoo: Zoo) -> None:
    plan = Engine.plan_for(zoo("mixtral"), speculate="ngram", **asked)
    assert plan.lossy == plan.to_dict()["lossy"] == sentence
    assert ("lossy", "yes", sentence) in plan.lines()


@pytest.mark.parametrize("asked", [{}, {"budget": "off"}, {"budget": 2, "speculate": "off"}])
def test_where_nothing_is_lossy_the_plan_does_not_say_so(asked: dict[str, Any], zoo: Zoo) -> None:
    plan = Engine.plan_for(zoo("mixtral"), **asked)
    assert plan.lossy == ""
    assert "lossy" not in [what for what, _, _ in plan.lines()]
