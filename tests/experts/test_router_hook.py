"""Routers intercepted at their top-k, and drafts restricted to resident experts, for every family and rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from edgemoe.experts.draft_routing import RULES, DraftRouting
from edgemoe.experts.expert_layer import ExpertLayer
from edgemoe.experts.router_hook import Choice, RouterMode, topk_weights
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import PROMPT, Running, Zoo, running

SEEN = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "gemma4", "cohere2_moe", "jamba"]
"""Routers before and after a softmax, with groups, biases and normalised weights."""
UNSEEN = {"phimoe": [], "zaya": [], "deepseek_v4": [1, 2, 3]}
"""Families with routers that do not choose by `topk`, and the layers whose routers do."""


@pytest.mark.parametrize(("family", "layers"), [*((family, None) for family in SEEN), *UNSEEN.items()])
def test_intercepting_the_routers_changes_no_bit(family: str, layers: list[int] | None, zoo: Zoo) -> None:
    with running(zoo(family)) as own:
        expected = own.logits(PROMPT)
        seen: list[int] = []

        def choose(layer: int, choice: Choice) -> torch.Tensor:
            seen.append(layer)
            assert choice.scores.shape == (len(PROMPT), own.blueprint.experts_modules[layer].experts)
            assert 0 < choice.top_k <= 3
            return choice.scores

        with RouterMode(own.layers._current, choose):
            found = own.logits(PROMPT)
        assert torch.equal(found, expected)
        assert seen == (list(range(len(own.blueprint.experts_modules))) if layers is None else layers)


class Where:
    """As `CurrentLayer`, without a model."""

    def __init__(self, layer: int | None) -> None:
        self.layer, self.experts = layer, [4, 6]


def test_only_the_first_topk_over_the_experts_in_a_block_is_the_routers() -> None:
    seen: list[tuple[int, int]] = []

    def choose(layer: int, choice: Choice) -> torch.Tensor:
        seen.append((layer, choice.top_k))
        return -choice.scores

    current, scores = Where(1), torch.arange(12.0).view(2, 6)
    with RouterMode(current, choose):  # type: ignore[arg-type]
        assert scores[:, :4].topk(2).indices.tolist() == [[3, 2], [3, 2]], "among groups"
        assert scores.view(2, 1, 6).topk(1).indices.flatten().tolist() == [5, 5]
        assert seen == []
        assert torch.topk(scores, k=3, dim=-1).indices.tolist() == [[0, 1, 2], [0, 1, 2]]
        assert scores.topk(2).indices.tolist() == [[5, 4], [5, 4]], "a second one in the same block is not"
        current.layer = 0
        assert scores[:, :4].topk(1, dim=-1, sorted=False).indices.tolist() == [[0], [0]]
    current.layer = 1
    assert scores.topk(2).indices.tolist() == [[5, 4], [5, 4]]
    assert seen == [(1, 3), (0, 1)]


def fill(own: Running, residents: Sequence[int]) -> None:
    """Makes `residents` of every layer resident."""
    for layer in range(len(own.blueprint.experts_modules)):
        for _ in own.cache.borrow(layer, residents):
            pass


def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """The calls of `ExpertLayer.draft` from now on: layer, experts and weights."""
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    draft = ExpertLayer.draft

    def noting(self: ExpertLayer, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append((self.number, index, weights))
        return draft(self, hidden, index, weights)

    monkeypatch.setattr(ExpertLayer, "draft", noting)
    return seen


def counted(own: Running) -> dict[str, Any]:
    return vars(own.cache.counters.copy())


def most_similar(layer: int, resident: torch.Tensor) -> torch.Tensor:
    """The resident expert with the closest lower number, wrapping around."""
    count = len(resident)
    return torch.tensor(
        [next((one - step) % count for step in range(count) if resident[(one - step) % count]) for one in range(count)]
    )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "phimoe", "zaya", "deepseek_v4"])
def test_a_draft_uses_resident_experts_and_loads_none(family: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """With none, one, three and all experts resident, under every rule: no hit, miss or byte is counted."""
    with running(zoo(family)) as own, quiet_transformers():
        seen, held = computed(monkeypatch), set[int]()
        experts = own.store.experts
        for more in ([], [5], [1, 4], range(experts[0])):
            fill(own, list(more))
            held |= {*more}
            before = counted(own)
            for rule in RULES:
                routing = DraftRouting(own.cache, experts, rule, most_similar)
                seen.clear()
                with own.layers.overriding(routing):
                    logits = own.logits(PROMPT)
                assert logits.isfinite().all()
                assert [layer for layer, _, _ in seen] == (list(range(len(experts))) if held else [])
                for _, index, weights in seen:
                    assert set(index.flatten().tolist()) <= held
                    assert weights.isfinite().all()
                assert [[each.shape for each in wanted] for wanted in routing.wanted] == [
                    [(len(PROMPT), count)] for count in experts
                ]
            assert counted(own) == before
            assert all(set(own.cache.residents(layer)) == held for layer in range(len(experts)))
        own.cache.check_integrity()


def test_one_expert_may_replace_several_of_a_token(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sum of their routing weights."""
    with running(zoo("mixtral")) as own, quiet_transformers():
        seen = computed(monkeypatch)
        fill(own, [5])
        with own.layers.overriding(DraftRouting(own.cache, own.store.experts, "affinity", most_similar)):
            found = own.logits(PROMPT)
        assert all((index == 5).all() and torch.allclose(weights.sum(-1), torch.ones(23)) for _, index, weights in seen)
        with own.layers.overriding(DraftRouting(own.cache, own.store.experts, "reselect")):
            expected = own.logits(PROMPT)
        assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", [*SEEN[:6], *UNSEEN])
def test_with_every_expert_resident_a_draft_is_the_model_itself(family: str, zoo: Zoo) -> None:
    """Bit for bit."""
    with running(zoo(family)) as own, quiet_transformers():
        expected = own.logits(PROMPT)
        fill(own, range(own.store.experts[0]))
        for rule in ("reselect", "affinity"):
            with own.layers.overriding(DraftRouting(own.cache, own.store.experts, rule)):
                assert torch.equal(own.logits(PROMPT), expected)
        before = counted(own)["hits"]
        assert torch.equal(own.logits(PROMPT), expected)
        assert counted(own)["hits"] > before, "the override ends with its block"


def test_an_error_in_a_draft_ends_the_override(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(zoo("mixtral")) as own, quiet_transformers():
        expected = own.logits(PROMPT)

        def fail(*args: Any) -> torch.Tensor:
            raise RuntimeError("no")

        with monkeypatch.context() as patch:
            patch.setattr(ExpertLayer, "draft", fail)
            routing = DraftRouting(own.cache, own.store.experts, "reselect")
            with pytest.raises(RuntimeError, match="no"), own.layers.overriding(routing):
                own.logits(PROMPT)
        before = counted(own)["hits"]
        assert torch.equal(own.logits(PROMPT), expected)
        assert counted(own)["hits"] > before


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_weights_of_a_normalising_family_sum_to_one_however_few_are_resident(
    family: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(zoo(family)) as own, quiet_transformers():
        seen = computed(monkeypatch)
        for residents in ([3], [3, 6], range(own.store.experts[0])):
            fill(own, residents)
            seen.clear()
            with own.layers.overriding(DraftRouting(own.cache, own.store.experts, "reselect")):
                own.logits(PROMPT)
            for _, _, weights in seen:
                assert torch.allclose(weights.sum(-1), torch.ones(len(PROMPT)), atol=1e-5)


# --- rules -----------------------------------------------------------------------------------------


class Residents:
    """The part of a cache that routing uses."""

    table = None

    def __init__(self, residents: Sequence[int]) -> None:
        self._residents = list(residents)

    def residents(self, layer: int) -> list[int]:
        return self._residents


def routing(residents: Sequence[int], rule: str, experts: int = 6, **options: Any) -> DraftRouting:
    return DraftRouting(Residents(residents), [experts], rule, **options)  # type: ignore[arg-type]


SCORES = torch.tensor([[0.1, 0.4, 0.05, 0.2, 0.15, 0.1], [0.3, 0.0, 0.3, 0.2, 0.1, 0.1]])


@pytest.mark.parametrize("scores", [SCORES, SCORES.log(), SCORES - 0.2], ids=["probabilities", "logits", "biased"])
def test_reselecting_takes_the_best_resident_experts(scores: torch.Tensor) -> None:
    for rule in ("reselect", "fewer"):
        chosen = routing([0, 2, 4], rule).choose(0, Choice(scores, 2)).topk(2)
        assert sorted(chosen.indices[0].tolist()) == [0, 4]
        assert sorted(chosen.indices[1].tolist()) == [0, 2]
        assert torch.equal(chosen.values, scores.gather(1, chosen.indices))
        one = routing([2], rule).choose(0, Choice(scores, 2)).topk(2)
        assert one.indices[:, 0].tolist() == [2, 2]
    assert torch.equal(routing([2], "affinity").choose(0, Choice(scores, 2)), scores)


def test_the_most_similar_resident_expert_gets_the_weight_of_the_chosen_one() -> None:
    index, weights = torch.tensor([[1, 3], [5, 0]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    asked: list[list[bool]] = []

    def similar(layer: int, resident: torch.Tensor) -> torch.Tensor:
        asked.append(resident.tolist())
        return torch.tensor([0, 2, 2, 0, 2, 0])

    found = routing([0, 2], "affinity", most_similar=similar).substitute(0, index, weights)
    assert found is not None
    assert found[0].tolist() == [[2, 0], [0, 0]]
    assert torch.equal(found[1], weights)
    assert asked == [[True, False, True, False, False, False]]


@pytest.mark.parametrize("rule", RULES)
def test_a_choice_that_no_rule_can_replace_gets_no_weight(rule: str) -> None:
    """Choices of an expert that is not resident and of no expert, and weights that are NaN."""
    index = torch.tensor([[1, 4], [6, 2], [2, 4]])
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4], [float("nan"), 0.5]])
    # The last expert is resident: an index beyond the experts must not be clamped to it.
    found = routing([2, 4, 5], rule).substitute(0, index, weights)
    assert found is not None
    assert set(found[0].flatten().tolist()) <= {2, 4, 5}
    assert torch.allclose(found[1], torch.tensor([[0.0, 0.3], [0.0, 0.4], [0.0, 0.5]]))
    assert found[0][:, 1].tolist() == [4, 2, 4]
    assert routing([], rule).substitute(0, index, weights) is None


def test_fewer_keeps_the_two_greatest_weights_and_the_sum() -> None:
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.5, 0.0], [0.9, 0.0, 0.0, 0.0]])
    index = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [5, 4, 3, 2]])
    found = routing(range(6), "fewer").substitute(0, index, weights)
    assert found is not None
    kept = found[1]
    assert torch.allclose(kept.sum(-1), weights.sum(-1))
    assert (kept != 0).sum(-1).tolist() == [2, 2, 1]
    assert torch.allclose(kept[0], torch.tensor([0.0, 0.4, 0.0, 0.3]) / 0.7)
    assert kept[1, 2] > 0
    assert (found[0][kept != 0] == index[kept != 0]).all()
    less = routing([1], "fewer").substitute(0, torch.tensor([[1]]), torch.tensor([[0.3]]))
    assert less is not None
    assert less[1].tolist() == [pytest.approx([0.3])]


def test_the_unrestricted_choice_is_recorded_whether_the_router_uses_topk_or_not() -> None:
    index, weights = torch.tensor([[1, 3], [6, 2]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    seen, unseen = routing([2], "reselect"), routing([2], "reselect")
    seen.choose(0, Choice(SCORES, 2))
    for each in (seen, unseen):
        each.substitute(0, index, weights)
    assert [len(each.wanted[0]) for each in (seen, unseen)] == [1, 1]
    assert seen.wanted[0][0][0, 1] == pytest.approx(0.4 / 0.6)
    assert unseen.wanted[0][0][0].tolist() == [0, 0.75, 0, 0.25, 0, 0]
    seen.substitute(0, index, weights)
    assert torch.equal(seen.wanted[0][1], unseen.wanted[0][0]), "the next call records anew"


@pytest.mark.parametrize("scores", [SCORES, SCORES.clamp_min(1e-6).log()], ids=["probabilities", "logits"])
def test_experts_that_the_family_hides_have_no_weight_and_do_not_change_the_others(scores: torch.Tensor) -> None:
    """Such as DeepSeek's groups that are not chosen."""
    found = topk_weights(Choice(scores.index_fill(1, torch.tensor([3, 4, 5]), float("-inf")), 2))
    expected = torch.tensor([[0.2, 0.8, 0.1, 0, 0, 0], [0.5, 0, 0.5, 0, 0, 0]])
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("scores", [SCORES, SCORES.clamp_min(1e-6).log()], ids=["probabilities", "logits"])
def test_topk_weights_are_proportional_to_the_probabilities(scores: torch.Tensor) -> None:
    """Whether the router's scores are probabilities or their logarithms."""
    found = topk_weights(Choice(scores, 2))
    assert found.dtype == torch.float32
    best = SCORES.topk(2)
    assert torch.allclose(found.gather(1, best.indices), best.values / best.values.sum(-1, keepdim=True), atol=1e-5)
