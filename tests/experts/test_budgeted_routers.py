"""A pass under a budget: the router's arithmetic over the allowed experts, and unrestricted tokens unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from edgemoe.experts.budget_routing import BudgetRouting, BudgetTotals
from edgemoe.experts.expert_layer import ExpertLayer
from edgemoe.prefetch.budget import Budget, Unit
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import Running, Zoo, random_ids, reference, running

IDS = random_ids(9)
CERTAIN = [1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0625, 0.5, 0.03125]
"""Path probabilities of the nine."""


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode(), quiet_transformers():
        yield


class Pass(NamedTuple):
    """A call of a layer: `chosen` and `weights` are [tokens, top-k], `output` has the shape of `hidden`."""

    layer: int
    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor

    def dense(self, experts: int) -> torch.Tensor:
        """The weights as [tokens, experts]."""
        weights = self.weights.float()
        return torch.zeros(len(weights), experts).scatter_add(-1, self.chosen, weights)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """The calls of layers from now on."""
    seen: list[Pass] = []
    compute = ExpertLayer.compute

    def noting(self: ExpertLayer, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = compute(self, hidden, index, weights)
        seen.append(Pass(self.number, hidden.reshape(-1, hidden.shape[-1]), index, weights, output.flatten(0, -2)))
        return output

    monkeypatch.setattr(ExpertLayer, "compute", noting)
    return seen


def routing(own: Running, budget: Budget, dropped: str, rows: Sequence[float] = CERTAIN) -> BudgetRouting:
    return BudgetRouting(budget, dropped, own.cache, own.store.experts, torch.tensor(rows), BudgetTotals())


# --- against the routers' arithmetic by hand -------------------------------------------------------


class Family(NamedTuple):
    """A family's choice and routing weights, one token at a time."""

    scores: Callable[[Any, torch.Tensor], torch.Tensor]
    """The scores that it chooses by, [tokens, experts], from its block and the hidden states."""
    weigh: Callable[[Any, torch.Tensor, torch.Tensor, list[int]], torch.Tensor]
    """The routing weights of the chosen experts, from its block, a token's hidden state and scores."""
    probabilities: Callable[[torch.Tensor], torch.Tensor]
    """Its scores normalised to a sum of 1."""


def gate(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    return torch.matmul(hidden, block.gate.weight.t())


def softmaxed(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    return gate(block, hidden).softmax(-1)


def as_they_are(block: Any, hidden: torch.Tensor, scores: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    return scores[chosen]


def to_one(block: Any, hidden: torch.Tensor, scores: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    return scores[chosen] / scores[chosen].sum()


def soft(block: Any, hidden: torch.Tensor, scores: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    return scores[chosen].softmax(-1)


def grouped(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Sigmoid plus bias; minus infinity outside of the best two of four groups, ranked by their best two experts."""
    scores = gate(block, hidden).sigmoid() + block.gate.e_score_correction_bias
    hidden_ones = torch.full_like(scores, float("-inf"))
    for token, each in enumerate(scores.view(len(scores), 4, -1)):
        sums = [float(group.sort(descending=True).values[:2].sum()) for group in each]
        size = each.shape[1]
        for group in sorted(range(4), key=lambda number: -sums[number])[:2]:
            part = slice(group * size, (group + 1) * size)
            hidden_ones[token, part] = scores[token, part]
    return hidden_ones


def sigmoids(block: Any, hidden: torch.Tensor, scores: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """Without the bias, times the family's factor."""
    weights = gate(block, hidden[None])[0].sigmoid()[chosen]
    return weights / weights.sum() * float(block.gate.routed_scaling_factor)


def of_one(scores: torch.Tensor) -> torch.Tensor:
    scores = scores.masked_fill(scores == float("-inf"), 0.0)
    return scores / scores.sum(-1, keepdim=True)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1)


FAMILIES = {
    "qwen3_moe": Family(softmaxed, to_one, of_one),
    "mixtral": Family(softmaxed, to_one, of_one),
    "qwen2_moe": Family(softmaxed, as_they_are, of_one),
    "olmoe": Family(softmaxed, as_they_are, of_one),
    "gpt_oss": Family(lambda block, hidden: hidden @ block.router.weight.t() + block.router.bias, soft, softmax),
    "granitemoe": Family(lambda block, hidden: hidden @ block.router.weight.t(), soft, softmax),
    "deepseek_v3": Family(grouped, sigmoids, of_one),
    "glm4_moe": Family(grouped, sigmoids, of_one),
}


def best(scores: torch.Tensor, among: Sequence[int], most: int) -> list[int]:
    """The best experts `among` those that the family does not hide."""
    there = [expert for expert in among if scores[expert] > float("-inf")]
    return sorted(there, key=lambda expert: -float(scores[expert]))[:most]


def best_set(family: Family, scores: torch.Tensor, rule: str, size: int) -> list[int]:
    """MoE-Spec's set: the greatest sums over nodes, weighted by path probability or not."""
    weigh = torch.tensor(CERTAIN)[:, None] if rule == "path" else 1.0
    sums = (family.probabilities(scores) * weigh).sum(0)
    return best(sums, range(len(sums)), size)


def expected(family: Family, block: Any, seen: Pass, experts: int, size: int, rule: str, dropped: str) -> torch.Tensor:
    """The routing weights of a layer under the budget, [tokens, experts], computed token by token."""
    scores = family.scores(block, seen.hidden)
    allowed = best_set(family, scores, rule, size)
    weights = torch.zeros(len(scores), experts)
    for token, each in enumerate(scores):
        top = best(each, range(experts), seen.chosen.shape[-1])
        chosen = [expert for expert in top if expert in allowed]
        if len(chosen) < len(top) and dropped == "substitute":
            chosen = best(each, allowed, len(top))
        chosen = chosen or best(each, allowed, 1)
        if chosen:
            weights[token, chosen] = family.weigh(block, seen.hidden[token], each, chosen)
    return weights


@pytest.mark.parametrize("dropped", ["substitute", "truncate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_computes_its_routers_arithmetic_inside_of_the_set(
    name: str, dropped: str, zoo: Zoo, passes: list[Pass]
) -> None:
    """Sets of fewer experts than the top-k, of a few, and of all but one; transformers computes the experts."""
    model, family = reference(zoo(name)), FAMILIES[name]
    with running(zoo(name)) as own:
        for size, rule in ((1, "sum"), (3, "path"), (4, "sum"), (own.store.experts[0] - 1, "path")):
            passes.clear()
            with own.layers.overriding(routing(own, Budget(Unit.EXPERTS, size, rule), dropped)):
                own.logits(IDS)
            assert [seen.layer for seen in passes] == list(range(len(own.store.experts)))
            for seen in passes:
                moe, count = own.blueprint.experts_modules[seen.layer].name, own.store.experts[seen.layer]
                block = model.get_submodule(moe.rpartition(".")[0])
                weights = expected(family, block, seen, count, size, rule, dropped)
                found = seen.dense(count)
                assert torch.equal(found > 0, weights > 0)
                assert torch.allclose(found, weights, atol=1e-6)
                assert len((found > 0).any(0).nonzero()) <= size
                everybody = torch.arange(count).expand(len(weights), -1)
                output = model.get_submodule(moe)(seen.hidden, everybody, weights)
                assert torch.allclose(seen.output, output, atol=1e-5 * float(output.abs().max()))


def test_a_router_without_topk_loses_its_dropped_choices(zoo: Zoo, passes: list[Pass]) -> None:
    """And the others keep their routing weights."""
    with running(zoo("phimoe")) as own:
        own.logits(IDS)
        exact = passes[0].dense(8)
        passes.clear()
        for size, rule in ((1, "path"), (2, "sum"), (7, "path")):
            passes.clear()
            with own.layers.overriding(routing(own, Budget(Unit.EXPERTS, size, rule), "substitute")):
                assert own.logits(IDS).isfinite().all()
            # Only the first layer has the same input in both passes.
            topk_weights = exact / exact.sum(-1, keepdim=True)
            sums = (topk_weights * (torch.tensor(CERTAIN)[:, None] if rule == "path" else 1.0)).sum(0)
            kept = torch.zeros(8, dtype=torch.bool)
            kept[best(sums, range(8), size)] = True
            assert torch.allclose(passes[0].dense(8), exact * kept)


def test_residency_first_loads_the_best_missing_experts(zoo: Zoo, passes: list[Pass]) -> None:
    """Up to the budget, and none that no token chose; resident experts are always used."""
    family = FAMILIES["qwen3_moe"]
    model = reference(zoo("qwen3_moe"))
    with running(zoo("qwen3_moe")) as own:
        there = [2, 7]
        for layer in range(len(own.store.experts)):
            for _ in own.cache.borrow(layer, there):
                pass
        passes.clear()
        with own.layers.overriding(routing(own, Budget(Unit.EXPERTS, 2, "residency"), "substitute")):
            own.logits(IDS)
        for seen in passes:
            block = model.get_submodule(own.blueprint.experts_modules[seen.layer].name.rpartition(".")[0])
            scores = family.scores(block, seen.hidden)
            wanted = {expert for each in scores for expert in best(each, range(12), 3)}
            moved = best(scores.sum(0), sorted(wanted - {*there}), 2)
            used = set(seen.chosen[seen.weights != 0].tolist())
            assert set(moved) <= used <= {*there, *moved}
            assert set(own.cache.residents(seen.layer)) == {*there, *moved}


# --- whom it is not for ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "phimoe", "qwen2_moe"])
def test_tokens_that_verify_nothing_keep_their_choice_and_its_weights(name: str, zoo: Zoo, passes: list[Pass]) -> None:
    rows = [0.0, 1.0, 0.5, 0.0, 0.25, 0.0, 0.5, 0.0, 1.0]
    plain = [token for token, certain in enumerate(rows) if not certain]
    with running(zoo(name)) as own:
        own.logits(IDS)
        exact = passes[0]
        for rule in ("sum", "path", "residency"):
            for dropped in ("substitute", "truncate"):
                passes.clear()
                route = routing(own, Budget(Unit.EXPERTS, 1, rule), dropped, rows)
                with own.layers.overriding(route):
                    own.logits(IDS)
                found = passes[0]
                assert torch.equal(found.chosen[plain], exact.chosen[plain])
                assert torch.equal(found.weights[plain], exact.weights[plain])
                assert torch.allclose(found.output[plain], exact.output[plain], atol=1e-6)
                if rule != "residency":
                    assert not torch.equal(found.output, exact.output)
        passes.clear()
        with own.layers.overriding(routing(own, Budget(Unit.EXPERTS, 1, "sum"), "truncate", [0.0] * len(IDS))):
            own.logits(IDS)
        assert all(torch.equal(*pair) for pair in zip(passes[0][1:], exact[1:], strict=True))
