"""One pass over a tree gives each node the logits of its own text, and leaves a past like that of plain decoding."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

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
REFUSED = ["jamba", "qwen3_next", "nemotron_h", "lfm2_moe", "zaya", "minimax", "deepseek_v32", "deepseek_v4"]
"""Recurrent states, convolutions, indexers and compressed rows."""


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


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_taken_back_is_never_drafted_upon(family: str, zoo: Zoo) -> None:
    with running(zoo(family)) as own, quiet_transformers():
        joint = ModelRunner(own.runner())
        assert joint.verifies == ""
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


@pytest.mark.parametrize(("family", "shape"), [("deepseek_v3", "chain"), ("gpt_oss", "")])
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
