"""A checkpoint's own draft head: found by its tensors, loaded with the file's values, or left out with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from bench.support.gguf_files import SETTINGS, GgufMaker
from bench.support.zoo_heads import ROLES, make_with_head
from edgemoe import CheckpointError, Engine, PlanError, Sampling
from edgemoe.cache import ExpertId
from edgemoe.checkpoint.blueprint import Blueprint, open_blueprint
from edgemoe.checkpoint.dense_loader import load_dense
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import CPU, PROMPT, Zoo, edit, greedy, random_ids, reference

Tensors = dict[str, torch.Tensor]
Made = Callable[..., Path]
TOKENS = 6
FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_5_moe"]
CASES = [(family, layout) for family in FAMILIES for layout in ROLES]
NEXTN = {"shared_head.norm": "shared_head_norm", "shared_head.head": "shared_head_head"}
"""Parts of a head that llama.cpp calls otherwise."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes each checkpoint with a head once; none is to be changed."""
    root, folders = tmp_path_factory.mktemp("heads"), dict[str, Path]()

    def folder(family: str, layout: str = "appended", **how: Any) -> Path:
        key = repr((family, layout, sorted(how.items())))
        if key not in folders:
            with quiet_transformers():
                folders[key] = make_with_head(family, root / str(len(folders)), layout=layout, **how)
        return folders[key]

    return folder


@pytest.fixture
def changed(made: Made, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint with a head whose tensors are changed by a function of all of them and the head's."""

    def folder(change: Callable[[Tensors, list[str]], None], *which: Any, **how: Any) -> Path:
        copy = Path(shutil.copytree(made(*which, **how), tmp_path / "changed"))
        tensors = load_file(copy / "model.safetensors")
        change(tensors, head_keys(tensors))
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return folder


def head_keys(tensors: Tensors) -> list[str]:
    """The names of the head's tensors in a file whose model has four layers."""
    return [key for key in tensors if ".layers.4." in key or key.startswith("mtp.")]


def with_head(folder: Path) -> Blueprint:
    return open_blueprint(folder, "float32", head=True)


def outside_of_experts(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What the head has as it is loaded, by the names in it."""
    model = load_dense(with_head(folder), CPU, lambda done, total: None)
    for name, value in model.draft_head.state_dict().items():
        if ".experts." not in name:
            yield name, value


def in_the_file(tensors: Tensors, name: str, layout: str) -> torch.Tensor:
    """The tensor of the file that the head's parameter `name` is, by the last parts of its name there."""
    role, _, end = name.partition(".")
    if role in ROLES[layout]:
        projection = f"{ROLES[layout]['eh_proj']}.weight"
        (root,) = (key.removesuffix(projection) for key in head_keys(tensors) if key.endswith(f".{projection}"))
        found = [f"{root}{ROLES[layout][role]}.{end}"]
    else:
        ending = "." + ".".join(name.split(".")[-2:])
        found = [key for key in head_keys(tensors) if key.endswith(ending) and ".experts." not in key]
    assert len(found) == 1, (name, found)
    return tensors[found[0]]


# --- found and loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_head_is_found_and_has_the_values_of_the_file(family: str, layout: str, made: Made) -> None:
    """Every parameter of it outside of the experts; its experts are the last module, behind those of the model."""
    folder = made(family, layout)
    blueprint, tensors = with_head(folder), load_file(folder / "model.safetensors")
    assert blueprint.head_refusal == ""
    assert blueprint.head is not None
    assert blueprint.head.has_norm
    assert not blueprint.head.has_embedding
    assert not blueprint.head.has_output
    assert blueprint.experts_modules[-1].name.startswith("draft_head.blocks.0.")
    assert blueprint.pass_modules == blueprint.experts_modules[:-1]
    count = 0
    for name, value in outside_of_experts(folder):
        count += 1
        assert torch.equal(value, in_the_file(tensors, name, layout)), name
    assert count == len([key for key in head_keys(tensors) if ".experts." not in key])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("layout", ROLES)
def test_the_records_of_its_experts_are_the_matrices_of_the_head(family: str, layout: str, made: Made) -> None:
    folder = made(family, layout)
    blueprint, tensors = with_head(folder), load_file(folder / "model.safetensors")
    layer = len(blueprint.experts_modules) - 1
    whole = (folder / "model.safetensors").read_bytes()
    for expert in range(blueprint.experts_modules[-1].experts):
        source = blueprint.records[ExpertId(layer, expert)]
        found = {whole[extent.offset : extent.offset + extent.nbytes] for extent in source.extents}
        keys = [key for key in head_keys(tensors) if f".experts.{expert}." in key]
        assert len(keys) == len(found) == 3
        assert found == {tensors[key].numpy().tobytes() for key in keys}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("layout", ROLES)
def test_without_being_asked_for_it_is_left_out(family: str, layout: str, made: Made, zoo: Zoo) -> None:
    """The blueprint is that of the checkpoint without one, and the replies are transformers'."""
    folder, plain = open_blueprint(made(family, layout), "float32"), open_blueprint(zoo(family), "float32")
    assert folder.head is None
    assert folder.head_refusal == ""
    assert folder.dense_keys == plain.dense_keys
    assert folder.dense_nbytes == plain.dense_nbytes
    assert folder.records.keys() == plain.records.keys()
    with Engine.load(made(family, layout), device="cpu", speculate="off", threads=1, state_folder="none") as engine:
        reply = engine.generate(PROMPT, Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True))
        assert engine.stats.experts == len(plain.records)
    assert list(reply.token_ids) == greedy(reference(zoo(family)), PROMPT, TOKENS)


def test_a_head_that_is_a_layer_of_its_own_kind_is_built_like_the_last_one_that_is_alike(made: Made) -> None:
    """The first layer of these has no experts, so what is like the head is among the others: the last of them."""
    for family in ("deepseek_v3", "glm4_moe"):
        head = with_head(made(family)).head
        assert head is not None
        assert head.layers == (3,)


# --- embeddings and outputs ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_copies_of_the_models_own_are_not_kept(family: str, made: Made) -> None:
    folder, plain = with_head(made(family, copies=True)), with_head(made(family))
    assert folder.head is not None
    assert not folder.head.has_embedding
    assert not folder.head.has_output
    assert folder.dense_nbytes == plain.dense_nbytes


@pytest.mark.parametrize("which", ["embed_tokens", "shared_head.head"])
def test_other_values_are_the_heads_own(which: str, made: Made, changed: Callable[..., Path]) -> None:
    """A single value that differs, in a matrix that is small enough to be compared whole."""
    key = f"model.layers.4.{which}.weight"

    def change(tensors: Tensors, _: list[str]) -> None:
        tensors[key][200, 3] += 1.0

    folder = changed(change, "deepseek_v3", copies=True)
    head = with_head(folder).head
    assert head is not None
    assert (head.has_embedding, head.has_output) == (which == "embed_tokens", which != "embed_tokens")
    model = load_dense(with_head(folder), CPU, lambda done, total: None)
    own = model.draft_head.embedding if head.has_embedding else model.draft_head.output
    assert torch.equal(own.weight, load_file(folder / "model.safetensors")[key])
    owner = model.get_input_embeddings() if head.has_embedding else model.get_output_embeddings()
    assert not torch.equal(own.weight, owner.weight), "the model keeps its own"


# --- what cannot be used ---------------------------------------------------------------------------


def assert_runs_without(folder: Path, why: str, zoo: Zoo, family: str) -> None:
    """The model runs as the checkpoint without a head does, and says `why` it has none."""
    blueprint = with_head(folder)
    assert blueprint.head is None
    assert why in blueprint.head_refusal
    with pytest.raises(PlanError, match="speculate='mtp' is not possible, since .*: give auto as speculate="):
        Engine.load(folder, device="cpu", speculate="mtp", threads=1, state_folder="none")
    with Engine.load(folder, device="cpu", threads=1, state_folder="none") as engine:
        reply = engine.generate(PROMPT, Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True))
        assert "mtp" not in engine.stats.speculation.split(",")[0]
    assert list(reply.token_ids) == greedy(reference(zoo(family)), PROMPT, TOKENS)


def rename(tensors: Tensors, key: str, to: str) -> None:
    tensors[to] = tensors.pop(key)


def test_a_layer_like_none_of_the_models_is_named(changed: Callable[..., Path], zoo: Zoo) -> None:
    def change(tensors: Tensors, keys: list[str]) -> None:
        tensors["model.layers.4.self_attn.odd_proj.weight"] = torch.zeros(4, 4)

    folder = changed(change, "mixtral")
    assert_runs_without(folder, "like none of the model's (self_attn.odd_proj.weight)", zoo, "mixtral")


def test_a_layer_of_another_shape_is_none_of_the_models(changed: Callable[..., Path], zoo: Zoo) -> None:
    def change(tensors: Tensors, keys: list[str]) -> None:
        key = "model.layers.4.self_attn.o_proj.weight"
        tensors[key] = tensors[key][:, :32].contiguous()

    assert_runs_without(changed(change, "mixtral"), "its head's layer is like none of the model's", zoo, "mixtral")


@pytest.mark.parametrize("role", ["enorm", "hnorm", "eh_proj"])
def test_what_a_head_lacks_is_named(role: str, changed: Callable[..., Path], zoo: Zoo) -> None:
    def change(tensors: Tensors, keys: list[str]) -> None:
        del tensors[f"model.layers.4.{role}.weight"]

    assert_runs_without(changed(change, "mixtral"), f"its head has no {role}", zoo, "mixtral")


def test_a_projection_of_another_shape_does_not_stop_the_model(changed: Callable[..., Path], zoo: Zoo) -> None:
    def change(tensors: Tensors, keys: list[str]) -> None:
        tensors["model.layers.4.eh_proj.weight"] = torch.zeros(64, 64)

    assert_runs_without(changed(change, "mixtral"), "eh_proj", zoo, "mixtral")


def test_a_family_without_a_norm_like_a_heads_runs_without_it(made: Made) -> None:
    """Its layers have no norm over the hidden size that a head could have."""
    blueprint = with_head(made("qwen4_exp_text"))
    assert blueprint.head is None
    assert blueprint.head_refusal == "its layers have no norm of a kind that a head has"
    assert open_blueprint(made("qwen4_exp_text"), "float32").records.keys() == blueprint.records.keys()


def test_without_a_norm_of_its_own_it_has_the_models(changed: Callable[..., Path]) -> None:
    def change(tensors: Tensors, keys: list[str]) -> None:
        del tensors["model.layers.4.shared_head.norm.weight"]

    folder = changed(change, "mixtral")
    head = with_head(folder).head
    assert head is not None
    assert not head.has_norm
    with Engine.load(folder, device="cpu", speculate="mtp", threads=1, state_folder="none") as engine:
        engine.generate(PROMPT, Sampling(max_tokens=TOKENS, ignore_eos=True))
        assert engine.stats.drafted > 0


# --- layers that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("head", [True, False])
def test_a_wrong_number_of_layers_is_still_a_mistake(head: bool, zoo: Zoo, tmp_path: Path) -> None:
    """Layers like all others after the last one are no head, where the configuration says of none."""
    folder = Path(shutil.copytree(zoo("mixtral"), tmp_path / "cut"))
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="does not match its family"):
        open_blueprint(folder, head=head)


def test_a_checkpoint_without_one_has_none(zoo: Zoo) -> None:
    blueprint = open_blueprint(zoo("mixtral"), head=True)
    assert blueprint.head is None
    assert blueprint.head_refusal == ""


def test_a_second_head_is_left_out(changed: Callable[..., Path]) -> None:
    """As of several heads of MiMo's: the first one alone drafts, with its own tensors."""

    def change(tensors: Tensors, keys: list[str]) -> None:
        for key in keys:
            other = tensors[key] + 1.0
            tensors[key.replace(".layers.4.", ".layers.5.")] = other

    folder = changed(change, "mixtral")
    edit(folder / "config.json", lambda config: config.update(num_nextn_predict_layers=2))
    tensors = load_file(folder / "model.safetensors")
    for name, value in outside_of_experts(folder):
        assert torch.equal(value, in_the_file(tensors, name, "appended")), name
    assert len(with_head(folder).experts_modules) == 5


# --- GGUF ------------------------------------------------------------------------------------------


class MakerWithHead(GgufMaker):
    """Writes a head as llama.cpp's converter does: a layer more, with its other parts after `nextn.`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.config["num_hidden_layers"] += 1

    def describe(self, writer: GGUFWriter) -> None:
        """The metadata; the number of layers has the head's."""
        super().describe(writer)
        writer.add_uint32(f"{self.arch}.nextn_predict_layers", 1)

    def _of_layer(self, rest: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        base, _, end = rest.rpartition(".")
        if base in (*ROLES["appended"].values(), "embed_tokens", "shared_head.head"):
            yield f"nextn.{NEXTN.get(base, base)}.{end}", value
        else:
            yield from super()._of_layer(rest, value)


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
@pytest.mark.parametrize("copies", [False, True])
def test_a_gguf_files_head_is_that_of_the_checkpoint(family: str, copies: bool, made: Made, tmp_path: Path) -> None:
    folder = made(family, copies=copies, **SETTINGS.get(family, {}))
    file = MakerWithHead(folder).write(tmp_path / "model.gguf")
    expected, found = dict(outside_of_experts(folder)), dict(outside_of_experts(file))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    blueprint = with_head(file)
    assert len(blueprint.records) == len(with_head(folder).records)
    assert not blueprint.head or not blueprint.head.has_output


def test_a_gguf_files_head_drafts_what_the_checkpoints_does(made: Made, tmp_path: Path) -> None:
    folder = made("glm4_moe")
    file = MakerWithHead(folder).write(tmp_path / "model.gguf")
    found = []
    for model in (folder, file):
        with Engine.load(
            model, device="cpu", dtype="float32", speculate="mtp", threads=1, state_folder="none"
        ) as engine:
            asked = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
            reply = engine.generate(random_ids(24), asked)
            found.append((reply.token_ids, engine.stats.drafted, engine.stats.accepted))
    assert found[0] == found[1]
    assert found[0][1] > 0
