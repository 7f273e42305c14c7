"""The lookahead: which routers it recognises, what it predicts, and what it learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bench.support.zoo import config
from edgemoe.cache import Part, RecordLayout
from edgemoe.checkpoint.experts_module import ExpertsModule, find_experts_modules
from edgemoe.checkpoint.tokenizer import load_tokenizer
from edgemoe.demo import demo_folder
from edgemoe.demo.tasks import HELD_OUT_SEED, TASKS
from edgemoe.experts.lookahead import MAX_LEARNT_TOKENS, MAX_PREDICTED_TOKENS, MAX_RANKS, Lookahead
from tests.support.checkpoints import Running, Zoo, running

HIDDEN = 16

ROUTERS = {
    "mixtral": "gate.weight",
    "qwen2_moe": "gate.weight",
    "deepseek_v3": "gate.weight",
    "gpt_oss": "router.weight",
    "phimoe": "router.weight",
    "afmoe": "router.gate.weight",
    "granitemoe": "router.weight",
    "jamba": "router.weight",
    "nemotron_h": "gate.weight",
    "ernie4_5_moe": "gate.weight",
    "qwen3_5_moe": "gate.weight",
}
"""The router's weight in each family, relative to the MoE block."""


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Experts(nn.Module):
    is_transposed = False

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(count, width, 4))


class Block(nn.Module):
    """A MoE block: a router with random weights and its experts."""

    def __init__(self, count: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, count, bias=False)
        self.gate.weight.copy_(torch.randn(count, HIDDEN, generator=generator))
        self.experts = Experts(count, width)


class Model(nn.Module):
    """A model of MoE blocks with the given numbers of experts."""

    def __init__(self, experts: Sequence[int], widths: Sequence[int] | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=HIDDEN))
        self.layers = nn.ModuleList()
        generator = torch.Generator().manual_seed(7)
        for count, width in zip(experts, widths or [HIDDEN] * len(experts), strict=True):
            self.layers.append(Block(count, width, generator))
        self.experts_modules = [
            ExpertsModule(
                f"layers.{number}.experts", count, RecordLayout([Part("down_proj", (width, 4), torch.float32)]), {}, {}
            )
            for number, (count, width) in enumerate(zip(experts, widths or [HIDDEN] * len(experts), strict=True))
        ]

    def weight(self, layer: int) -> torch.Tensor:
        block = self.layers[layer]
        assert isinstance(block, Block)
        return block.gate.weight


def made(model: Model) -> Lookahead:
    return Lookahead(model, model.experts_modules)


def hidden_of(tokens: int, seed: int = 0, width: int = HIDDEN) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def best_ranks(scores: torch.Tensor, count: int) -> dict[int, int]:
    """The plain form: each token's `count` best experts, each with its best rank over the tokens."""
    ranks: dict[int, int] = {}
    for row in scores.tolist():
        for rank, expert in enumerate(sorted(range(len(row)), key=lambda expert: -row[expert])[:count]):
            ranks[expert] = min(rank, ranks.get(expert, rank))
    return ranks


# --- routers ---------------------------------------------------------------------------------------


def of_family(family: str, **how: int) -> tuple[nn.Module, list[ExpertsModule], Lookahead]:
    """A family's model without weights, and the lookahead over it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText if family == "qwen3_5_moe" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config(family, **how))
    experts_modules = find_experts_modules(model)
    return model, experts_modules, Lookahead(model, experts_modules)


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_are_recognised_next_to_their_experts(family: str) -> None:
    model, experts_modules, lookahead = of_family(family)
    for moe, router in zip(experts_modules, lookahead._routers, strict=True):
        assert router is not None
        block = moe.name.rpartition(".")[0]
        assert router[0] is model.get_parameter(f"{block}.{ROUTERS[family]}")
    assert [lookahead.can_predict(layer) for layer in range(-1, len(experts_modules) + 1)] == [
        False,
        False,
        *[True] * (len(experts_modules) - 1),
        False,
    ]


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h", "glm4_moe", "minimax_m2"])
def test_a_familys_correction_bias_is_found(family: str) -> None:
    model, experts_modules, lookahead = of_family(family)
    for moe, router in zip(experts_modules, lookahead._routers, strict=True):
        assert router is not None
        assert router[1] is not None
        assert router[1].shape == (moe.experts,)
    assert all(router is not None and router[1] is None for router in of_family("mixtral")[2]._routers)


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("zaya", {}),
        ("inkling_text", {}),
        ("nemotron_h", {"moe_latent_size": 32}),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}),
    ],
    ids=["a-network", "one-row-more", "latent-experts", "two-candidates"],
)
def test_layers_with_another_kind_of_router_are_not_predicted(family: str, how: dict[str, int]) -> None:
    _, experts_modules, lookahead = of_family(family, **how)
    assert len(experts_modules) > 1
    assert not any(lookahead.can_predict(layer) for layer in range(len(experts_modules)))


def test_neither_a_layer_with_another_kind_of_router_nor_the_next_is_predicted() -> None:
    lookahead = made(Model([4] * 6, widths=[HIDDEN, HIDDEN, 8, HIDDEN, HIDDEN, HIDDEN]))
    assert [lookahead.can_predict(layer) for layer in range(6)] == [False, True, False, False, True, True]
    lookahead.enter_layer(2, hidden_of(3, width=8))
    lookahead.enter_layer(3, hidden_of(3))


# --- what is named ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5, MAX_PREDICTED_TOKENS])
@pytest.mark.parametrize(("experts", "top_k"), [((12, 12), 2), ((12, 12), 5), ((6, 20), 3), ((20, 3), 2)])
def test_untrained_it_predicts_the_next_routers_choice(experts: tuple[int, int], top_k: int, tokens: int) -> None:
    model = Model(experts)
    lookahead = made(model)
    hidden = hidden_of(tokens)
    count = min(MAX_RANKS, 2 * top_k, experts[1])
    assert lookahead.ranks(1, top_k) == count
    assert lookahead.predict(1, hidden, top_k) == best_ranks(hidden @ model.weight(1).t(), count)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_untrained_it_predicts_the_next_routers_choice_on_a_checkpoint(family: str, zoo: Zoo) -> None:
    with running(zoo(family)) as own:
        experts_modules = own.blueprint.experts_modules
        lookahead = Lookahead(own.model, experts_modules)
        hidden = hidden_of(4, width=64)
        for layer in range(1, len(experts_modules)):
            gate = own.model.get_submodule(experts_modules[layer].name.rpartition(".")[0]).gate
            scores = hidden @ gate.weight.t()
            if family == "deepseek_v3":
                scores = scores.sigmoid() + gate.e_score_correction_bias
            assert lookahead.predict(layer, hidden, 2) == best_ranks(scores, 4)


def test_hidden_states_may_have_another_dtype() -> None:
    model = Model([8, 8]).to(torch.bfloat16)
    lookahead = made(model)
    assert lookahead.predict(1, hidden_of(3).to(torch.bfloat16), 2)
    assert lookahead.predict(1, hidden_of(3), 2)
    lookahead.enter_layer(1, hidden_of(3))


# --- what is learnt --------------------------------------------------------------------------------


def test_many_tokens_are_learnt_from_and_not_predicted() -> None:
    model = Model([8, 8])
    few, many = made(model), made(model)
    before, after = hidden_of(MAX_PREDICTED_TOKENS + 1), hidden_of(MAX_PREDICTED_TOKENS + 1, seed=1)
    assert many.predict(1, before, 2) == {}
    many.enter_layer(1, after)
    for half in (slice(0, 40), slice(40, None)):
        assert few.predict(1, before[half], 2)
        few.enter_layer(1, after[half])
    fresh = hidden_of(10, seed=2)
    assert many.predict(1, fresh, 2) == few.predict(1, fresh, 2) != made(model).predict(1, fresh, 2)


def test_of_very_many_tokens_only_the_first_are_learnt_from() -> None:
    model = Model([8, 8])
    some, all_of_them = made(model), made(model)
    before, after = hidden_of(MAX_LEARNT_TOKENS + 500), hidden_of(MAX_LEARNT_TOKENS + 500, seed=1)
    all_of_them.predict(1, before, 2)
    all_of_them.enter_layer(1, after)
    some.predict(1, before[:MAX_LEARNT_TOKENS], 2)
    some.enter_layer(1, after[:MAX_LEARNT_TOKENS])
    fresh = hidden_of(30, seed=2)
    assert some.predict(1, fresh, 2) == all_of_them.predict(1, fresh, 2)
    assert some._maps[1] is not None
    assert some._maps[1]._tokens == MAX_LEARNT_TOKENS


@pytest.mark.parametrize("what", ["another pass", "twice", "not predicted"])
def test_only_a_predicted_pass_is_learnt_from(what: str) -> None:
    lookahead = made(Model([8, 8]))
    assert lookahead._maps[1] is not None
    if what == "another pass":
        lookahead.predict(1, hidden_of(100), 2)
        lookahead.enter_layer(1, hidden_of(99))
    elif what == "twice":
        lookahead.predict(1, hidden_of(10), 2)
        lookahead.enter_layer(1, hidden_of(10))
        lookahead.enter_layer(1, hidden_of(10))
        assert lookahead._maps[1]._tokens == 10
        return
    else:
        lookahead.enter_layer(1, hidden_of(100))
    assert lookahead._maps[1]._tokens == 0


def test_layers_of_different_sizes_have_maps_of_their_own() -> None:
    """Each layer adds an offset to its experts' input, so the next router alone predicts wrong experts."""
    experts = (6, 10, 3, 14)
    model = Model(experts)
    learning, fixed = made(model), made(model)
    generator = torch.Generator().manual_seed(4)
    offsets = [3 * torch.randn(HIDDEN, generator=generator) for _ in experts]
    right = {learning: 0, fixed: 0}
    for step in range(150):
        hidden = hidden_of(2, seed=step)
        for layer in range(len(experts) - 1):
            following = hidden + offsets[layer]
            wanted = set(best_ranks(following @ model.weight(layer + 1).t(), 1))
            for lookahead in (learning, fixed):
                named = lookahead.predict(layer + 1, hidden, 1)
                if step >= 100:
                    right[lookahead] += len(wanted & {expert for expert, rank in named.items() if rank == 0})
            learning.enter_layer(layer + 1, following)
            hidden = following
    assert right[learning] > 1.5 * right[fixed]
    assert right[learning] > 0.9 * 50 * 3


def passed_through(own: Running, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each layer the input of its experts, [tokens, hidden size], and the chosen ones, [tokens, top-k]."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        seen.append((inputs[0].reshape(len(ids), -1).clone(), inputs[1].clone()))

    for moe in own.blueprint.experts_modules:
        moe.module(own.model).register_forward_pre_hook(keep)
    own.logits(ids)
    return seen


def test_training_improves_its_predictions_on_a_text() -> None:
    """On the shipped model, token by token, compared with an untrained lookahead."""
    items = islice(TASKS[0].items(HELD_OUT_SEED, held_out=True), 3)
    with running(demo_folder()) as own:
        tokenizer = load_tokenizer(own.blueprint.checkpoint)
        ids = tokenizer.encode("\n".join(f"{item.user} {item.reply}" for item in items))[:200]
        seen = passed_through(own, ids)
        layers = range(1, len(seen))
        learning, fixed = (Lookahead(own.model, own.blueprint.experts_modules) for _ in range(2))
        right = {learning: 0, fixed: 0}
        for token in range(len(ids)):
            one = slice(token, token + 1)
            for layer in layers:
                wanted = set(seen[layer][1][token].tolist())
                for lookahead in right:
                    named = lookahead.predict(layer, seen[layer - 1][0][one], len(wanted))
                    if token >= 64:
                        right[lookahead] += sum(named.get(expert, MAX_RANKS) < len(wanted) for expert in wanted)
                learning.enter_layer(layer, seen[layer][0][one])
        asked = (len(ids) - 64) * len(layers) * seen[0][1].shape[1]
    assert right[learning] / asked > right[fixed] / asked + 0.1
