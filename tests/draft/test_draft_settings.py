"""What may be asked of speculation, and the sentence for what may not."""

from __future__ import annotations

from typing import Any

import pytest

from edgemoe import Engine, PlanError
from edgemoe.config import EngineConfig
from edgemoe.draft.settings import DraftSettings, draft_settings
from tests.support.checkpoints import Zoo


def settings(**asked: Any) -> DraftSettings:
    return draft_settings(EngineConfig(**asked))


@pytest.mark.parametrize(
    ("asked", "drafters", "priced"),
    [
        ({}, {"ngram"}, True),
        ({"speculate": "auto"}, {"ngram"}, True),
        ({"speculate": " AUTO "}, {"ngram"}, True),
        ({"speculate": "auto", "draft_model": "small"}, {"ngram", "model"}, True),
        ({"speculate": "off"}, set(), False),
        ({"speculate": "off", "draft_model": "small"}, set(), False),
        ({"speculate": "ngram"}, {"ngram"}, False),
        ({"speculate": "self"}, {"self"}, False),
        ({"speculate": "ngram+self"}, {"ngram", "self"}, False),
        ({"speculate": "Self+Ngram"}, {"ngram", "self"}, False),
        ({"speculate": "model", "draft_model": "small"}, {"model"}, False),
        ({"speculate": "ngram+model", "draft_model": "small"}, {"ngram", "model"}, False),
    ],
)
def test_what_drafts_and_whether_it_must_pay(asked: dict[str, Any], drafters: set[str], priced: bool) -> None:
    found = settings(**asked)
    assert found.drafters == drafters
    assert found.priced == priced


def test_a_head_drafts_by_default_where_there_is_one() -> None:
    for asked, drafters in (
        ({}, {"ngram", "mtp"}),
        ({"draft_model": "small"}, {"ngram", "model"}),
        ({"speculate": "auto+self"}, {"ngram", "self"}),
        ({"speculate": "ngram"}, {"ngram"}),
        ({"speculate": "mtp"}, {"mtp"}),
        ({"speculate": "ngram+mtp"}, {"ngram", "mtp"}),
        ({"speculate": "off"}, set()),
    ):
        config = EngineConfig(**asked)  # type: ignore[arg-type]
        assert draft_settings(config, head=True).drafters == drafters
        assert config.drafts_with_head == ("mtp" in drafters)
    refused = EngineConfig(speculate="mtp")
    with pytest.raises(PlanError, match="since its layer is odd: give auto"):
        draft_settings(refused, no_head="its layer is odd")
    bare = draft_settings(EngineConfig(), head=True).without_head("it gives other logits")
    assert bare.describe().endswith("tokens (not mtp: it gives other logits)")
    assert draft_settings(refused, head=True).without_head("it is odd").describe() == "off: it is odd"


def test_the_bounds_are_taken_over() -> None:
    found = settings(draft_nodes=20, draft_depth=5, draft_shape="chain", draft_rule="fewer")
    assert (found.nodes, found.depth, found.shape, found.rule) == (20, 5, "chain", "fewer")
    defaults = settings()
    assert (defaults.nodes, defaults.depth, defaults.shape, defaults.rule) == (16, 8, "tree", "auto")
    assert settings(draft_nodes=3, draft_depth=8).depth == 3, "nothing is deeper than it has nodes"
    assert (settings(draft_nodes=1, draft_depth=1).nodes, settings(draft_nodes=256, draft_depth=256).depth) == (1, 256)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"speculate": "fast"}, r"^speculate='fast' is none of auto, auto\+self, off, ngram, .*: give one of these$"),
        ({"speculate": ""}, r"^speculate='' is none of auto, "),
        ({"speculate": "ngram+"}, r"^speculate='ngram\+' is none of auto, "),
        ({"speculate": "off+self"}, r"^speculate='off\+self' is none of auto, "),
        (
            {"speculate": "self+model", "draft_model": "small"},
            r"^model and self cannot draft together: give one of them as speculate=$",
        ),
        (
            {"speculate": "mtp"},
            r"^speculate='mtp' is not possible, since the checkpoint has no draft head: give auto as ",
        ),
        ({"speculate": "mtp+self"}, r"^mtp and self cannot draft together: "),
        ({"speculate": "model"}, r"^speculate='model' needs a second checkpoint: name it as draft_model=$"),
        ({"speculate": "ngram+model"}, r"needs a second checkpoint: name it as draft_model=$"),
        ({"draft_shape": "bush"}, r"^draft_shape='bush' is none of tree, chain: give one of these$"),
        (
            {"draft_rule": "drop"},
            r"^draft_rule='drop' is none of auto, reselect, affinity, fewer: give one of these$",
        ),
        ({"draft_nodes": 0}, r"^draft_nodes=0 is not possible: give a number from 1 to 256$"),
        ({"draft_nodes": 257}, r"^draft_nodes=257 is not possible: give a number from 1 to 256$"),
        ({"draft_depth": 0}, r"^draft_depth=0 is not possible: give a number from 1 to 256$"),
        ({"draft_depth": -3}, r"^draft_depth=-3 is not possible: "),
        ({"speculate": "off", "draft_depth": 1000}, r"^draft_depth=1000 is not possible: "),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        settings(**asked)


def test_it_is_refused_before_any_weight_is_read(zoo: Zoo) -> None:
    for ask in (Engine.plan_for, Engine.load):
        with pytest.raises(PlanError, match="draft_nodes=0 is not possible"):
            ask(zoo("mixtral"), draft_nodes=0)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "ngram, while it pays, trees of at most 16 tokens"),
        ({"speculate": "off"}, "off: asked for"),
        (
            {"speculate": "ngram+self", "draft_shape": "chain", "draft_nodes": 4},
            "ngram and self, always, chains of at ",
        ),
    ],
)
def test_it_says_what_drafts(asked: dict[str, Any], sentence: str) -> None:
    assert settings(**asked).describe().startswith(sentence)
