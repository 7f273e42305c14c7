"""One pass over a tree gives each node the logits of its own text, and leaves a past like that of plain decoding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from edgemoe.experts.lockstep import LockstepPasses
from edgemoe.kernels.batch_invariant_linear import install_gemv
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner, tree_input
from edgemoe.model.packed_runner import PackedRunner
from edgemoe.model.sequential_runner import PassInput, SequentialRunner
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import Running, Zoo, random_ids, running, spread

PACKED = ["qwen3_moe", "mixtral", "gpt_oss", "gemma4", "exaone_moe", "cohere2_moe", "phimoe", "mimo_v2_flash"]
"""Half of them with windows of 6 tokens in some layers; sinks, and values narrower than keys."""
UNPACKED = ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "axk1"]
"""Latents."""
WITH_STATES = ["jamba", "qwen3_next", "nemotron_h", "lfm2_moe", "zaya", "granitemoehybrid"]
"""Recurrent states and convolutions, whose families share a pass."""
BY_TOKEN = ["deepseek_v32", "deepseek_v4", "minimax", "minimax_m3_vl_text", "inkling_text", "kimi_linear", "qwen4_exp"]
"""Indexers, compressed rows, a cache of the model's own, and states beside latents or attention of their own."""


def random_tree(draw: random.Random, nodes: int, root: int) -> DraftTree:
    tree = DraftTree(root)
    while len(tree) < nodes:
        parent = len(tree) - 1 if draw.random() < 0.6 else draw.randrange(len(tree))
        tree.add(parent, draw.randint(3, 250), 0.5)
    return tree


def started(runner: SequentialRunner, text: Sequence[int], capacity: int = 8) -> SequenceCache:
    cache = runner.start(capacity)
    runner.step(cache, text)
    return cache


def sequential(runner: SequentialRunner, text: Sequence[int], tree: DraftTree) -> torch.Tensor:
    """The logits after each node, every path in a plain pass of its own after `text`: what a tree is to give."""
    logits: list[torch.Tensor | None] = [None] * len(tree)
    for leaf in range(len(tree)):
        if not tree.children(leaf):
            path = tree.path(leaf)
            cache = runner.start(8)
            after = runner.run([PassInput(cache, [*text, *(tree.tokens[node] for node in path)], every=True)])[0]
            for node, each in zip(path, after[len(text) :], strict=True):
                logits[node] = each
    return torch.stack([each for each in logits if each is not None])


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")
    assert (found - expected).abs().max() <= 1e-4 * spread(expected)


def assert_goes_on_after(runner: ModelRunner, cache: SequenceCache, text: Sequence[int]) -> None:
    fresh = started(runner.sequential, text)
    assert cache.tokens == fresh.tokens
    for tokens in ([7], [8, 9]):
        assert_close(runner.step(cache, tokens), runner.sequential.step(fresh, tokens))


@pytest.mark.parametrize("family", [*PACKED, *UNPACKED])
def test_a_tree_gives_what_its_paths_give_one_after_the_other(family: str, zoo: Zoo) -> None:
    """Shorter and longer than the windows, in one pass or drafted in several, and whatever is kept of it goes on."""
    draw = random.Random(family)
    with running(zoo(family)) as own, quiet_transformers():
        joint = ModelRunner(own.runner())
        assert joint.verifies == "tree"
        assert joint.packs == (family in PACKED)
        for length in (3, 20):
            text, tree = random_ids(length, seed=length), random_tree(draw, 10, root=5)
            expected = sequential(joint.sequential, text, tree)
            cache = started(joint.sequential, text)
            cache.mark()
            first = 0
            # The last pass is of one node, which has seen no sibling.
            for last in (draw.randint(1, 5), len(tree) - 1, len(tree)):
                logits = joint.run([tree_input(cache, tree, range(first, last), range(first))])[0]
                assert_close(logits, expected[first:last])
                first = last
            cache.rollback(length)
            cache.mark()
            assert_close(joint.run([tree_input(cache, tree, range(len(tree)), ())])[0], expected)
            path = tree.path(draw.randrange(len(tree)))
            cache.rollback(length, path)
            assert_goes_on_after(joint, cache, [*text, *(tree.tokens[node] for node in path)])


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe"])
def test_windows_are_masked_where_sequences_are_not_packed_too(
    family: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for checkpoints whose positions are scaled by their length."""
    monkeypatch.setattr(PackedRunner, "_agrees", lambda self: False)
    with running(zoo(family)) as own, quiet_transformers():
        joint = ModelRunner(own.runner())
        assert joint.verifies == "tree"
        for length in (3, 20):
            text, tree = random_ids(length, seed=length), random_tree(random.Random(length), 10, root=5)
            cache = started(joint.sequential, text)
            cache.mark()
            for first, last in ((0, 4), (4, len(tree))):
                logits = joint.run([tree_input(cache, tree, range(first, last), range(first))])[0]
                assert_close(logits, sequential(joint.sequential, text, tree)[first:last])
            cache.rollback(length, tree.path(7))
            assert_goes_on_after(joint, cache, [*text, *(tree.tokens[node] for node in tree.path(7))])


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_chains_and_passes_without_an_answer_for_each_token_go_on_alike(family: str, zoo: Zoo) -> None:
    """A chain needs no masks of ours: it is a chunk of which all logits are wanted."""
    with running(zoo(family)) as own, quiet_transformers():
        joint = ModelRunner(own.runner())
        tree = DraftTree(5)
        for node in range(9):
            tree.add(node, 20 + node, 0.5)
        for length in (3, 15):
            text = random_ids(length)
            cache = started(joint.sequential, text)
            cache.mark()
            work = tree_input(cache, tree, range(len(tree)), ())
            assert work.tree_mask is None
            assert_close(joint.run([work])[0], sequential(joint.sequential, text, tree))
            cache.rollback(length, range(4))
            assert_goes_on_after(joint, cache, [*text, 5, 20, 21, 22])


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "deepseek_v2"])
def test_trees_of_several_sequences_beside_prompts_and_plain_steps(family: str, zoo: Zoo) -> None:
    """Equal trees at equal lengths too, whose masks must not be mixed up."""
    draw = random.Random(1)
    texts = [random_ids(length, seed=length) for length in (3, 12, 12, 25)]
    trees = [random_tree(draw, nodes, root=9) for nodes in (4, 6, 6, 1)]
    prompt = random_ids(17, seed=50)
    with running(zoo(family)) as own, quiet_transformers():
        joint = ModelRunner(own.runner())
        caches = [started(joint.sequential, text) for text in texts]
        for cache in caches:
            cache.mark()
        work = [tree_input(cache, tree, range(len(tree)), ()) for cache, tree in zip(caches, trees, strict=True)]
        fresh, one = joint.start(8), started(joint.sequential, texts[1])
        found = joint.run([work[0], PassInput(fresh, prompt), *work[1:], PassInput(one, [9])])
        assert_close(found.pop(1), joint.sequential.step(joint.start(8), prompt))
        assert_close(found.pop(), joint.sequential.step(started(joint.sequential, texts[1]), [9]))
        for logits, text, tree, cache in zip(found, texts, trees, caches, strict=True):
            assert_close(logits, sequential(joint.sequential, text, tree))
            path = tree.path(len(tree) - 1)
            cache.rollback(len(text), path)
            assert_goes_on_after(joint, cache, [*text, *(tree.tokens[node] for node in path)])
        assert fresh.tokens == len(prompt)


def test_a_cycle_that_accepts_nothing_leaves_no_trace(zoo: Zoo) -> None:
    """Bit for bit, in every layer: full ones and windows."""
    with running(zoo("gpt_oss")) as own, quiet_transformers():
        joint = ModelRunner(own.runner())
        for length in (3, 14):
            cache, other = started(joint.sequential, random_ids(length)), started(joint.sequential, random_ids(length))
            for _ in range(2):
                cache.mark()
                tree = random_tree(random.Random(length), 8, root=5)
                joint.run([tree_input(cache, tree, range(len(tree)), ())])
                cache.rollback(length)
            for layer, expected in zip(cache.kv.layers, other.kv.layers, strict=True):
                assert torch.equal(layer.keys, expected.keys)
                assert torch.equal(layer.values, expected.values)
                assert layer.get_mask_sizes(4) == expected.get_mask_sizes(4)


@pytest.mark.parametrize("family", [*WITH_STATES, *BY_TOKEN])
def test_what_is_verified_of_states_has_the_bits_of_single_steps(family: str, zoo: Zoo) -> None:
    """Also what was drafted in several passes and dropped before leaves no trace."""
    draw = random.Random(family)
    with running(zoo(family)) as own, quiet_transformers():
        install_gemv(own.model, KernelThreads(1))
        joint = ModelRunner(own.runner())
        assert joint.verifies == ("tree" if family in WITH_STATES else "chain")
        assert joint.packs == (family in WITH_STATES)
        for length in (3, 20):
            cache = joint.start(8)
            joint.step(cache, random_ids(length, seed=length))
            plain = cache.fork(length, 8)
            tree = random_tree(draw, 6, root=5) if family in WITH_STATES else chain([5, 20, 21, 22, 23, 24])
            for keeps in (False, True):
                cache.mark()
                for first, last in ((0, 2), (2, 6)) if not keeps else ((0, 6),):
                    work = tree_input(cache, tree, range(first, last), range(first))
                    logits = joint.run([work])[0]
                path = tree.path(draw.randrange(1, 6)) if keeps else []
                cache.rollback(length, path)
            for node in path:
                assert torch.equal(joint.step(plain, [tree.tokens[node]]), logits[node])
            for token in (9, 10, 11):
                assert torch.equal(joint.step(plain, [token]), joint.step(cache, [token]))


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v4", "minimax"])
def test_several_verifications_beside_prompts_and_plain_steps(family: str, zoo: Zoo) -> None:
    with running(zoo(family)) as own, quiet_transformers():
        joint = ModelRunner(own.runner())
        caches = [joint.start(8) for _ in range(3)]
        for number, cache in enumerate(caches):
            joint.step(cache, random_ids(4 + 7 * number, seed=number))
        plain = [cache.fork(cache.tokens, 8) for cache in caches]
        drafts = [chain([5, 20, 21]), chain([9, 30])]
        for cache in caches[:2]:
            cache.mark()
        works = [tree_input(cache, each, range(len(each)), ()) for cache, each in zip(caches[:2], drafts, strict=True)]
        for others in ([PassInput(caches[2], [7])], [PassInput(caches[2], [8]), PassInput(joint.start(8), [3, 4, 5])]):
            found = joint.run([*works, *others])
            for cache, other, each, logits in zip(caches, plain, drafts, found, strict=False):
                alone = other.fork(other.tokens, 8)
                expected = torch.stack([joint.step(alone, [token]) for token in each.tokens])
                assert_close(logits, expected)
                cache.rollback(other.tokens)
                cache.mark()
            assert_close(found[2], joint.step(plain[2], others[0].tokens))


def chain(tokens: Sequence[int]) -> DraftTree:
    tree = DraftTree(tokens[0])
    for node, token in enumerate(tokens[1:]):
        tree.add(node, token, 0.5)
    return tree


def test_tokens_that_would_overtake_one_another_share_no_linear_layer(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain is then run again, with experts shared alone."""
    with running(zoo("deepseek_v32")) as own, quiet_transformers():
        install_gemv(own.model, KernelThreads(1))
        joint = ModelRunner(own.runner())
        assert joint.tokens_side_by_side is not None
        assert joint.tokens_side_by_side.shares_linears
        cache = joint.start(8)
        joint.step(cache, random_ids(6))
        plain, calls = cache.fork(6, 8), iter(range(1000))
        wait = LockstepPasses.wait_for_others

        def skips(self: LockstepPasses, layer: Any, *tensors: torch.Tensor) -> torch.Tensor:
            if layer.number < 0 and next(calls) == 5:
                return layer.compute_together(*([each] for each in tensors))[0]  # type: ignore[no-any-return]
            return wait(self, layer, *tensors)

        monkeypatch.setattr(LockstepPasses, "wait_for_others", skips)
        cache.mark()
        logits = joint.run([tree_input(cache, chain([5, 6, 7]), range(3), ())])[0]
        assert not joint.tokens_side_by_side.shares_linears
        cache.rollback(6, range(3))
        for token, found in zip([5, 6, 7], logits, strict=True):
            assert torch.equal(joint.step(plain, [token]), found)


@pytest.mark.parametrize("family", [*WITH_STATES[:2], *BY_TOKEN[:2]])
def test_states_are_tried_without_loading_an_expert(family: str, zoo: Zoo) -> None:
    with running(zoo(family)) as own, quiet_transformers():
        ModelRunner(own.runner())
        assert_untouched(own)


@pytest.mark.parametrize("family", ["gemma4", "deepseek_v3"])
def test_what_can_be_verified_is_tried_without_loading_an_expert(family: str, zoo: Zoo) -> None:
    with running(zoo(family), slots=4) as own:
        assert ModelRunner(own.runner()).verifies == "tree"
        assert_untouched(own)


def assert_untouched(own: Running) -> None:
    counters = own.cache.counters
    assert (counters.hits, counters.misses, counters.bytes_demanded) == (0, 0, 0)


def test_a_family_that_takes_no_masks_of_ours_verifies_chains(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: SequentialRunner, sequence: SequenceCache, tree_mask: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(SequentialRunner, "_masks", refuse)
    with running(zoo("deepseek_v3")) as own:
        assert ModelRunner(own.runner()).verifies == "chain"


@pytest.mark.parametrize(
    ("family", "shape"), [("deepseek_v3", "chain"), ("gpt_oss", ""), ("deepseek_v32", ""), ("zaya", "")]
)
def test_masks_that_a_family_gets_wrong_are_noticed(
    family: str, shape: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward that ignores what it is given sees siblings, and one that keeps the wrong rows goes on wrongly."""
    if family == "deepseek_v3":
        monkeypatch.setattr(SequentialRunner, "_masks", lambda self, sequence, tree_mask: None)
    else:
        monkeypatch.setattr(SequenceCache, "rollback", lambda self, base, rows=(): None)
    with running(zoo(family)) as own:
        assert ModelRunner(own.runner()).verifies == shape
