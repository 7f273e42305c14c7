"""A budget kept by whole passes: what it bounds, whom it leaves alone, and not a bit changed where there is room."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from edgemoe import Engine, Sampling
from edgemoe.cache import CacheCounters
from edgemoe.config import choices_of
from edgemoe.draft.expert_budget import ExpertBudget
from edgemoe.experts.expert_layer import ExpertLayers
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner, tree_input
from edgemoe.model.pass_logits import LogitsRows
from edgemoe.model.sequential_runner import PassInput
from edgemoe.prefetch.budget import RULES
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import Running, Zoo, random_ids, running
from tests.support.crowd import Crowd, alone, assert_same_reply, budgeted, completion

# --- passes under a budget -------------------------------------------------------------------------


class Side:
    """Several sequences that verify, a plain step and a prompt beside them, run as often as asked from where they are.

    `shapes` has "tree", "chain", "step" or "prompt" for each.
    """

    def __init__(self, joint: ModelRunner, shapes: Sequence[str]) -> None:
        self.joint = joint
        self.caches: list[SequenceCache] = []
        self.texts: list[list[int]] = []
        self.trees: list[DraftTree | None] = []
        self.certain: list[list[float] | None] = []
        draw = random.Random(3)
        for number, shape in enumerate(shapes):
            text = random_ids(5 + 3 * number, seed=number)
            cache = joint.start(64)
            joint.step(cache, text)
            tree = None
            if shape in ("tree", "chain"):
                tree = DraftTree(9)
                while len(tree) < 5:
                    parent = len(tree) - 1 if shape == "chain" else draw.randrange(len(tree))
                    tree.add(parent, draw.randint(3, 250), tree.probabilities[parent] * 0.7)
            self.caches.append(cache)
            self.texts.append([7] if shape == "step" else random_ids(6, seed=50 + number))
            self.trees.append(tree)
            self.certain.append(tree.probabilities if tree else None)

    def work(self) -> list[PassInput]:
        return [
            tree_input(cache, tree, range(len(tree)), ())._replace(verifies=True) if tree else PassInput(cache, text)
            for cache, tree, text in zip(self.caches, self.trees, self.texts, strict=True)
        ]

    def run(self, budget: ExpertBudget | None = None) -> list[torch.Tensor]:
        """The logits of each, with all pasts left as they were."""
        lengths = [cache.tokens for cache in self.caches]
        for cache in self.caches:
            cache.mark()
        work = self.work()
        with quiet_transformers():
            if budget is None:
                found = self.joint.run(work)
            else:
                with budget.restricting(work, self.certain):
                    found = self.joint.run(work)
        for cache, length in zip(self.caches, lengths, strict=True):
            cache.rollback(length)
        return found


MIXED = ["tree", "step", "chain", "prompt", "tree"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "deepseek_v2", "phimoe"])
def test_with_room_for_all_no_bit_changes(family: str, dtype: str, zoo: Zoo) -> None:
    """Every expert, all of the mass, more bytes than there are: trees, chains, steps, prompts, alone and together."""
    with running(zoo(family), dtype=dtype) as own:
        every = max(own.store.experts)
        sizes: list[str | int] = [every, every + 5, "100%", f"{own.store.nbytes}B"]
        for shapes in (MIXED, ["tree"], ["chain"]):
            side = Side(ModelRunner(own.runner()), shapes)
            exact = side.run()
            for rule in RULES:
                for dropped in choices_of("budget_dropped"):
                    for size in sizes:
                        budget = budgeted(own, size, rule, dropped)
                        found = side.run(budget)
                        assert all(torch.equal(*pair) for pair in zip(found, exact, strict=True)), (size, rule)
                        assert budget.totals.budget_dropped == 0 < budget.totals.budget_choices


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_what_verifies_nothing_in_the_same_pass_keeps_its_result(family: str, zoo: Zoo) -> None:
    with running(zoo(family)) as own:
        side = Side(ModelRunner(own.runner()), MIXED)
        exact = side.run()
        for dropped in choices_of("budget_dropped"):
            budget = budgeted(own, 1, "sum", dropped)
            found = side.run(budget)
            assert budget.totals.budget_dropped > 0
            for one, other, tree in zip(found, exact, side.trees, strict=True):
                scale = float(other.max() - other.min())
                if tree is None:
                    assert (one - other).abs().max() <= 1e-5 * scale
                else:
                    assert (one - other).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_where_nothing_verifies_there_is_no_budget(family: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(zoo(family)) as own:
        side = Side(ModelRunner(own.runner()), ["step", "prompt", "step"])
        exact, budget = side.run(), budgeted(own, 1)
        monkeypatch.setattr(ExpertLayers, "overriding", None)
        assert all(torch.equal(*pair) for pair in zip(side.run(budget), exact, strict=True))
        assert vars(budget.totals) == {"budget_choices": 0, "budget_dropped": 0}


def test_an_error_in_a_pass_ends_its_budget(zoo: Zoo) -> None:
    with running(zoo("mixtral")) as own:
        side = Side(ModelRunner(own.runner()), ["tree"])
        exact, budget = side.run(), budgeted(own, 1, "sum")
        with pytest.raises(RuntimeError, match="no"), budget.restricting(side.work(), side.certain):
            raise RuntimeError("no")
        assert torch.equal(side.run()[0], exact[0])


# --- what it bounds --------------------------------------------------------------------------------


class Asked:
    """The experts that passes ask for from now on, by layer, and what is moved for it."""

    def __init__(self, own: Running) -> None:
        self._cache = own.cache
        self._layers = len(own.store.experts)
        self._before = CacheCounters()
        own.cache.recording = []
        self.begin()

    def begin(self) -> None:
        self._before = self._cache.counters.copy()
        self._cache.recording = []

    @property
    def nbytes(self) -> int:
        return self._cache.counters.bytes_loaded - self._before.bytes_loaded

    @property
    def experts(self) -> list[int]:
        """How many of each layer."""
        assert self._cache.recording is not None
        wanted = [{each.number for each in asked} for asked in self._cache.recording]
        assert len(wanted) == self._layers, "one pass, in which every expert is acquired once"
        return [len(each) for each in wanted]


@contextmanager
def cold(zoo: Zoo, family: str, shapes: Sequence[str]) -> Iterator[tuple[Running, Side, Asked]]:
    """Sequences under way, and nothing resident."""
    with running(zoo(family)) as own:
        joint = ModelRunner(own.runner())
        with own.layers.silenced(), quiet_transformers():
            side = Side(joint, shapes)
        assert not any(own.cache.residents(layer) for layer in range(len(own.store.experts)))
        yield own, side, Asked(own)


SEVERAL = ["tree", "chain", "tree"]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("rule", RULES)
def test_a_layer_uses_so_many_experts_at_most_whoever_verifies(family: str, rule: str, zoo: Zoo) -> None:
    """Packed into one pass, and side by side, where each sequence's router chooses alone."""
    with cold(zoo, family, SEVERAL) as (own, side, asked):
        assert side.joint.packs == (family == "qwen3_moe")
        for size in (5, 3):
            side.run(budgeted(own, size, "sum" if rule == "residency" else rule))
            assert max(asked.experts) <= size
            asked.begin()
    with cold(zoo, family, SEVERAL) as (own, side, asked):
        if rule == "residency":
            side.run(budgeted(own, 3, rule))
            record, layers = own.store.slot_nbytes, len(own.store.experts)
            assert record * layers < asked.nbytes <= 3 * record * layers


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "phimoe"])
@pytest.mark.parametrize("shapes", [SEVERAL, ["tree"]])
def test_bytes_bound_what_a_pass_moves(family: str, shapes: list[str], zoo: Zoo) -> None:
    with cold(zoo, family, shapes) as (own, side, _):
        record, layers = own.store.slot_nbytes, len(own.store.experts)
    moved = []
    for records in (layers, layers + 1, 2 * layers + 1, 3 * layers, 100 * layers):
        with cold(zoo, family, shapes) as (own, side, asked):
            side.run(budgeted(own, f"{records * record + 1}B", "residency"))
            moved.append(asked.nbytes)
            assert 0 < asked.nbytes <= records * record
    assert moved[0] == layers * record
    assert all(less <= more for less, more in pairwise(moved))
    assert moved[1] > moved[0], "what is left over is for the layers behind"


def test_bytes_bound_what_a_pass_moves_on_top_of_what_is_there(zoo: Zoo) -> None:
    for dropped in choices_of("budget_dropped"):
        with cold(zoo, "mixtral", SEVERAL) as (own, side, asked):
            for layer in range(len(own.store.experts)):
                for _ in own.cache.borrow(layer, [3, 5]):
                    pass
            asked.begin()
            side.run(budgeted(own, "1B", "residency", dropped))
            assert asked.nbytes == 0
            assert all(count <= 2 for count in asked.experts)
            asked.begin()
            side.run(budgeted(own, 1, "residency", dropped))
            assert asked.nbytes == 4 * own.store.slot_nbytes
            asked.begin()
            side.run(budgeted(own, 1, "residency", dropped))
            assert asked.nbytes <= 4 * own.store.slot_nbytes
            asked.begin()
            side.run()
            assert sum(asked.experts) > 16, "without a budget it wants more"


def test_a_smaller_share_of_the_mass_asks_for_less(zoo: Zoo) -> None:
    asked_for = []
    for size in ("20%", "50%", "80%", "100%"):
        with cold(zoo, "qwen3_moe", SEVERAL) as (own, side, asked):
            side.run(budgeted(own, size, "path"))
            asked_for.append(sum(asked.experts))
    assert asked_for == sorted(set(asked_for))


# --- in a batch, and in an engine ------------------------------------------------------------------

ECHO = [*range(20, 32)] * 4
"""A text that repeats itself, so that n-grams draft."""


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_in_a_batch_only_passes_over_drafts_are_under_it(
    family: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, first tokens and steps without a draft are the model's own, whoever runs beside them."""
    under: list[bool] = []
    with running(zoo(family)) as own:
        crowd = Crowd(own, step_tokens=48, limit=3, speculate="ngram")
        run, restricting = crowd.joint.run_sampled, ExpertBudget.restricting

        def watched(inputs: Sequence[PassInput]) -> list[LogitsRows]:
            under.append(own.layers._override is not None)
            assert under[-1] == any(item.verifies for item in inputs)
            return run(inputs)

        def checked(self: ExpertBudget, work: Sequence[PassInput], certain: Sequence[Sequence[float] | None]) -> Any:
            for item, known in zip(work, certain, strict=True):
                assert (known is not None) == item.verifies
                assert known is None or len(known) == len(item.tokens)
            return restricting(self, work, certain)

        crowd.joint.run_sampled = watched  # type: ignore[method-assign]
        monkeypatch.setattr(ExpertBudget, "restricting", checked)
        crowd.loop.runner.budget = budgeted(own, 1, "sum", "truncate")
        prompts = [ECHO, random_ids(40, seed=2), ECHO[3:]]
        asked = [crowd.ask(prompt, max_tokens=12, logprobs=0) for prompt in prompts]
        crowd.finish()
        assert set(under) == {True, False}
        assert crowd.loop.runner.budget.totals.budget_dropped > 0
        for prompt, request in zip(prompts, asked, strict=True):
            first = alone(own, prompt, max_tokens=1, logprobs=0).logprobs
            found = completion(request).logprobs
            assert first is not None
            assert found is not None
            assert found[0].token_id == first[0].token_id
            assert found[0].logprob == pytest.approx(first[0].logprob, abs=1e-3)


def test_without_drafts_a_reply_is_the_models_own(zoo: Zoo) -> None:
    with running(zoo("mixtral")) as own:
        crowd = Crowd(own)
        crowd.loop.runner.budget = budgeted(own, 1, "sum", "truncate")
        assert_same_reply(crowd.reply(ECHO, max_tokens=20), alone(own, ECHO, max_tokens=20))
        assert crowd.loop.runner.budget.totals.budget_choices == 0


def reply(engine: Engine) -> tuple[int, ...]:
    return engine.generate(ECHO, Sampling(temperature=0, max_tokens=40, ignore_eos=True)).token_ids


def test_an_engine_counts_what_was_dropped_and_is_exact_with_room(zoo: Zoo) -> None:
    options: dict[str, Any] = {"speculate": "ngram", "state_folder": "none", "prefetch": "off"}
    with Engine.load(zoo("mixtral"), **options) as engine:
        exact = reply(engine)
        stats = engine.stats.to_dict()
        assert stats["drafted"] > 0
        assert stats["budget_choices"] == stats["budget_dropped"] == 0
    with Engine.load(zoo("mixtral"), budget="100%", **options) as engine:
        assert reply(engine) == exact
        assert engine.stats.budget_choices > engine.stats.budget_dropped == 0
    with Engine.load(zoo("mixtral"), budget=1, budget_rule="sum", budget_dropped="truncate", **options) as engine:
        assert len(reply(engine)) == 40
        stats = engine.stats.to_dict()
        # Each node chooses two in each of four layers, of which one is in a set of one.
        assert stats["budget_choices"] == 8 * (stats["drafted"] + stats["cycles"])
        assert stats["budget_choices"] > stats["budget_dropped"] >= stats["budget_choices"] / 2
    with Engine.load(zoo("mixtral"), budget=1, budget_rule="sum", **{**options, "speculate": "off"}) as engine:
        assert reply(engine) == exact
        assert engine.stats.budget_choices == 0


def test_what_was_answered_under_a_budget_is_computed_again_for_the_next_turn(zoo: Zoo) -> None:
    """Prompts are exact: that of the second turn, too, of which the first one's reply is a part."""
    folder, first = zoo("mixtral"), random_ids(7) * 3
    options: dict[str, Any] = {"threads": 1, "speculate": "ngram", "expert_cache": "100%", "state_folder": "none"}
    with Engine.load(folder, **options, budget=1, budget_rule="sum") as engine:
        reply = engine.generate(first, Sampling(max_tokens=30, ignore_eos=True)).token_ids
        assert engine.stats.budget_dropped > 0
        second = [*first, *reply, 5, 6, 7]
        ask = Sampling(max_tokens=1, logprobs=3)
        found = engine.generate(second, ask)
        assert 0 < engine.stats.prefix_tokens <= len(first)
    with Engine.load(folder, **options) as engine:
        assert_same_reply(found, engine.generate(second, ask))
        engine.generate(first, Sampling(max_tokens=30, ignore_eos=True))
        assert engine.stats.prefix_tokens >= len(first) - 1, "without a budget all of it is kept"
