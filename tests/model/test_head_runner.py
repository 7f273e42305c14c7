"""The passes of a draft head against transformers' own, several sequences against one, and trees against chains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.support.engine_parts import runner_of
from bench.support.zoo_heads import make_with_head
from edgemoe import Engine
from edgemoe.model.draft_tree import DraftTree, TreeMask
from edgemoe.model.head_cache import HeadCache
from edgemoe.model.head_runner import AFTER, BEFORE, HeadInput, HeadOutput, HeadRunner
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.sequential_runner import PassInput
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import random_ids, reference, spread

FAMILIES = ["mixtral", "gpt_oss", "deepseek_v3"]
"""Rows; windows of 6 tokens in every second layer; and sequences that do not share passes."""
TOKENS = random_ids(17)
CHAIN = random_ids(4, seed=3)
SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "threads": 1, "state_folder": "none"}
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root, folders = tmp_path_factory.mktemp("heads"), dict[str, Path]()

    def folder(family: str, **how: Any) -> Path:
        key = repr((family, sorted(how.items())))
        if key not in folders:
            with quiet_transformers():
                folders[key] = make_with_head(family, root / str(len(folders)), **how)
        return folders[key]

    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def runner(request: pytest.FixtureRequest, made: Made) -> Iterator[ModelRunner]:
    with Engine.load(made(request.param), speculate="mtp", **SETTINGS) as engine:
        yield runner_of(engine)


def head_of(runner: ModelRunner) -> HeadRunner:
    assert runner.head is not None
    return runner.head


def own_of(cache: SequenceCache) -> HeadCache:
    assert cache.head is not None
    return cache.head


def after(runner: ModelRunner, tokens: Sequence[int]) -> SequenceCache:
    cache = runner.start(64)
    runner.step(cache, tokens)
    return cache


def whole(cache: SequenceCache, tokens: Sequence[int], outputs: int = 1) -> HeadInput:
    """All states of a sequence that wait, with the tokens after them; `tokens` has one more than `cache`."""
    own = own_of(cache)
    count = own.waiting
    return HeadInput(own, tokens[own.rows + 1 : own.rows + 1 + count], own.peek(count, AFTER), outputs)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-5 * spread(expected)


# --- transformers' own -----------------------------------------------------------------------------


class Oracle(NamedTuple):
    """What transformers' own model and head give for a text: all in float32."""

    before: torch.Tensor
    """The model's hidden states before its last norm, [tokens, hidden size]."""
    after: torch.Tensor
    logits: torch.Tensor
    """Those of the head: after each of the text's tokens but the first, then after each token of the chain."""


def oracle(folder: Path, tokens: Sequence[int], chain: Sequence[int]) -> Oracle:
    """The head reads all of `tokens` at once, then goes on along `chain` with its own states, one after the other."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    model = reference(folder)
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4\..*"]
    with quiet_transformers(), torch.inference_mode():
        mtp: Any = MtpModel.from_pretrained(model, device_map={"": "cpu"}).eval()
        before: list[torch.Tensor] = []
        hook = model.model.norm.register_forward_hook(lambda module, inputs, output: before.append(inputs[0][0]))
        hidden = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states[-1]
        hook.remove()
        cache = MtpCache(config=model.config.get_mtp_config())
        positions = torch.arange(1, len(tokens))[None]
        states = mtp.forward_layer(0, hidden, positions, cache, input_ids=torch.tensor([tokens[1:]]))
        logits = [mtp._project_to_logits(states)[0]]
        for place, token in enumerate(chain, start=len(tokens)):
            follow = {"input_ids": torch.tensor([[token]])}
            states = mtp.forward_layer(0, states[:, -1:], torch.tensor([[place]]), cache, **follow)
            logits.append(mtp._project_to_logits(states)[0])
    return Oracle(before[0], hidden[0], torch.cat(logits))


def drafted(runner: ModelRunner, cache: SequenceCache, tokens: Sequence[int], chain: Sequence[int]) -> torch.Tensor:
    """The same logits by the head's runner."""
    (output,) = head_of(runner).run([whole(cache, tokens, len(tokens) - 1)])
    logits = [torch.as_tensor(output.logits)]
    for token in chain:
        (output,) = head_of(runner).run([HeadInput(own_of(cache), [token], output.hidden[-1:, AFTER], 1)])
        logits.append(torch.as_tensor(output.logits))
    return torch.cat(logits)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_logits_are_those_of_transformers_own_head(family: str, made: Made) -> None:
    """After every token of a prompt, and after those that follow with the head's own states."""
    folder = made(family, copies=True)
    expected = oracle(folder, TOKENS, CHAIN)
    assert len(set(expected.logits.argmax(-1).tolist())) > 8, "the tokens differ"
    with Engine.load(folder, speculate="mtp", **SETTINGS) as engine:
        runner = runner_of(engine)
        cache = after(runner, TOKENS[:-1])
        for kind, states in ((BEFORE, expected.before), (AFTER, expected.after)):
            assert (own_of(cache).peek(len(states), kind) - states).abs().max() < 1e-4
        assert (expected.before - expected.after).abs().max() > 0.1, "the kinds differ"
        found = drafted(runner, cache, TOKENS, CHAIN)
        assert found.shape == expected.logits.shape
        assert (found - expected.logits).abs().max() < 1e-5


@pytest.mark.parametrize("parts", [(1,) * 16, (3, 13), (15, 1)])
def test_a_prompt_in_parts_is_that_of_transformers(parts: Sequence[int], made: Made) -> None:
    """The states come as the model's passes give them, and are read as far as they go."""
    folder = made("glm4_moe", copies=True)
    expected = oracle(folder, TOKENS, ())
    with Engine.load(folder, speculate="mtp", **SETTINGS) as engine:
        runner, first = runner_of(engine), 0
        cache = runner.start(64)
        for count in parts:
            runner.step(cache, TOKENS[first : first + count])
            first += count
            item = whole(cache, TOKENS)
            (output,) = head_of(runner).run([item])
            own_of(cache).drop_first(len(item.tokens))
            assert own_of(cache).rows == first
            assert (torch.as_tensor(output.logits)[0] - expected.logits[first - 1]).abs().max() < 1e-5


# --- several sequences -----------------------------------------------------------------------------


def test_hidden_states_are_those_around_the_last_norm(runner: ModelRunner) -> None:
    own = own_of(after(runner, TOKENS))
    norm = runner.sequential.model.get_decoder().norm
    with torch.inference_mode():
        assert (norm(own.peek(17, BEFORE)) - own.peek(17, AFTER)).abs().max() < 1e-5
        logits = runner.sequential.model.get_output_embeddings()(own.peek(17, AFTER)[-1])
    assert close(runner.step(runner.start(64), TOKENS), logits)


def test_sequences_at_once_get_what_each_gets_alone(runner: ModelRunner) -> None:
    """Of different lengths, with different numbers of rows read before."""
    texts = [random_ids(length, seed) for seed, length in enumerate((1, 17, 6, 30))]

    def begun() -> list[tuple[SequenceCache, list[int]]]:
        found = []
        for text in texts:
            cache = after(runner, text)
            if len(text) > 6:
                own = own_of(cache)
                head_of(runner).run([HeadInput(own, text[1:5], own.peek(4, AFTER), 1)])
                own.drop_first(4)
            found.append((cache, [*text, 9]))
        return found

    expected = [head_of(runner).run([whole(*each, min(2, len(each[1]) - 1))])[0] for each in begun()]
    together = begun()
    found = head_of(runner).run([whole(*each, min(2, len(each[1]) - 1)) for each in together])
    for one, other, (cache, _) in zip(found, expected, together, strict=True):
        assert len(torch.as_tensor(one.logits)) == len(torch.as_tensor(other.logits))
        assert close(torch.as_tensor(one.logits), torch.as_tensor(other.logits))
        assert one.hidden.shape == other.hidden.shape == (len(torch.as_tensor(one.logits)), 2, 64)
        assert (one.hidden - other.hidden).abs().max() < 1e-4
        assert own_of(cache).rows == cache.tokens


def test_model_passes_over_several_sequences_give_each_its_states(runner: ModelRunner) -> None:
    texts = [random_ids(length, seed) for seed, length in enumerate((3, 11, 1))]
    caches = [runner.start(64) for _ in texts]
    runner.run([PassInput(cache, text) for cache, text in zip(caches, texts, strict=True)])
    for cache, text in zip(caches, texts, strict=True):
        alone = own_of(after(runner, text))
        assert own_of(cache).waiting == len(text)
        for kind in (BEFORE, AFTER):
            assert (own_of(cache).peek(len(text), kind) - alone.peek(len(text), kind)).abs().max() < 1e-4


# --- trees -----------------------------------------------------------------------------------------


def a_tree() -> DraftTree:
    """Two children of the root, three grandchildren, and one below them."""
    tree = DraftTree(TOKENS[-1])
    first, second = tree.add(0, 21, 1.0), tree.add(0, 33, 1.0)
    for parent, token in ((first, 45), (second, 45), (second, 57)):
        tree.add(parent, token, 1.0)
    tree.add(4, 69, 1.0)
    return tree


def root(runner: ModelRunner, tokens: Sequence[int]) -> tuple[HeadCache, HeadOutput]:
    """A head that has read all states of a text, and what it says after the last token."""
    cache = after(runner, tokens[:-1])
    (output,) = head_of(runner).run([whole(cache, tokens)])
    own_of(cache).mark_rows()
    return own_of(cache), output


@pytest.mark.parametrize("length", [3, 17])
def test_nodes_of_a_tree_get_what_they_get_in_a_chain(length: int, runner: ModelRunner) -> None:
    """A level a pass, as drafts are made; each node against its own path alone. `length` is within windows or not."""
    tokens, tree = TOKENS[-length:], a_tree()
    own, output = root(runner, tokens)
    base, order = own.rows, list[int]()
    hidden, logits = {0: output.hidden[0]}, dict[int, torch.Tensor]()
    for level in ([1, 2], [3, 4, 5], [6]):
        order += level
        mask = TreeMask(base, [tree.depths[node] - 1 for node in order], tree.ancestry()[level][:, order])
        before = torch.stack([hidden[tree.parents[node]][AFTER] for node in level])
        item = HeadInput(own, [tree.tokens[node] for node in level], before, len(level), mask)
        (output,) = head_of(runner).run([item])
        hidden |= zip(level, output.hidden, strict=True)
        logits |= zip(level, torch.as_tensor(output.logits), strict=True)
    assert own.rows == base + 6
    own.drop_rows(base)
    for node in range(1, 7):
        alone, output = root(runner, tokens)
        for token in tree.text(node):
            (output,) = head_of(runner).run([HeadInput(alone, [token], output.hidden[-1:, AFTER], 1)])
        assert close(logits[node], torch.as_tensor(output.logits)[0]), node
        assert (hidden[node] - output.hidden[0]).abs().max() < 1e-4


def test_after_drafts_are_dropped_the_head_goes_on_as_if_there_were_none(runner: ModelRunner) -> None:
    caches = [after(runner, TOKENS) for _ in range(2)]
    for drafts, cache in zip((3, 0), caches, strict=True):
        (output,) = head_of(runner).run([whole(cache, [*TOKENS, 9])])
        own_of(cache).drop_first(len(TOKENS))
        own_of(cache).mark_rows()
        for token in range(50, 50 + drafts):
            (output,) = head_of(runner).run([HeadInput(own_of(cache), [token], output.hidden[-1:, AFTER], 1)])
        own_of(cache).drop_rows(len(TOKENS))
        runner.step(cache, [9])
    first, second = (head_of(runner).run([whole(cache, [*TOKENS, 9, 11])])[0] for cache in caches)
    assert close(torch.as_tensor(first.logits), torch.as_tensor(second.logits))


# --- what a head has of its own --------------------------------------------------------------------


def test_a_head_that_projects_the_state_alone_depends_on_nothing_else(made: Made, tmp_path: Path) -> None:
    """Without the embedding's half of the projection the following token changes nothing; without the other, all."""
    tensors = load_file(made("mixtral") / "model.safetensors")
    projection = tensors["model.layers.4.eh_proj.weight"]
    for half, differs in ((slice(0, 64), False), (slice(64, 128), True)):
        folder = tmp_path / str(differs)
        folder.mkdir()
        for file in made("mixtral").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        changed = projection.clone()
        changed[:, half] = 0
        save_file(tensors | {"model.layers.4.eh_proj.weight": changed}, folder / "model.safetensors", {"format": "pt"})
        with Engine.load(folder, speculate="mtp", **SETTINGS) as engine:
            runner, found = runner_of(engine), []
            for token in (9, 200):
                cache = after(runner, TOKENS[:1])
                found.append(head_of(runner).run([whole(cache, [TOKENS[0], token])])[0].logits)
        assert torch.equal(torch.as_tensor(found[0]), torch.as_tensor(found[1])) is not differs


@pytest.mark.parametrize("which", ["embed_tokens", "shared_head.head"])
def test_an_embedding_or_output_of_its_own_is_the_one_that_is_used(which: str, made: Made, tmp_path: Path) -> None:
    """Rows in another order: of the embedding, tokens are read as others; of the output, logits change places."""
    source = made("mixtral", copies=True)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    key = f"model.layers.4.{which}.weight"
    save_file(tensors | {key: tensors[key].flip(0).contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    found = []
    for folder in (source, tmp_path):
        with Engine.load(folder, speculate="mtp", **SETTINGS) as engine:
            runner = runner_of(engine)
            turned = which == "embed_tokens" and folder == tmp_path
            cache = after(runner, TOKENS[:-1])
            own = own_of(cache)
            follow = [255 - token for token in TOKENS[1:]] if turned else TOKENS[1:]
            (output,) = head_of(runner).run([HeadInput(own, follow, own.peek(16, AFTER), 1)])
            found.append(torch.as_tensor(output.logits)[0])
    plain, changed = found
    assert close(changed if which == "embed_tokens" else changed.flip(0), plain)
