"""The quantisations that the names of GGUF files say."""

from __future__ import annotations

import pytest

from edgemoe import CheckpointError
from edgemoe.checkpoint.gguf.gguf_variant import choose, only_gguf, variants


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("Qwen3-30B-A3B-Q4_K_M.gguf", "Q4_K_M"),
        ("mixtral-8x7b-instruct-v0.1.Q5_0.gguf", "Q5_0"),
        ("Qwen3-30B-A3B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Model.i1-IQ3_XXS.gguf", "i1-IQ3_XXS"),
        ("gpt-oss-120b-mxfp4-00001-of-00003.gguf", "mxfp4"),
        ("gpt-oss-20b-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("model_q4_0.gguf", "q4_0"),
        ("BF16/GLM-4.5-Air-BF16-00001-of-00005.gguf", "BF16"),
        ("Q6_K/model-00001-of-00002.gguf", "Q6_K"),
        ("OLMoE-F16-Q8_0.gguf", "Q8_0"),
        ("Qwen3-Q4_K_M-imat.gguf", "Q4_K_M-imat"),
        ("ggml-model.gguf", "ggml-model.gguf"),
    ],
)
def test_the_tag_is_the_end_of_a_name(name: str, tag: str) -> None:
    assert [each.tag for each in variants([name])] == [tag]


def test_files_that_are_no_model_are_left_out() -> None:
    names = ["mmproj-F16.gguf", "a-imatrix.gguf", "imatrix_unsloth.gguf", "ggml-vocab-qwen2.gguf", "a-draft-Q8_0.gguf",
             "mtp-a-Q8_0.gguf", "README.md", "config.json"]  # fmt: skip
    assert variants(names) == []
    assert not only_gguf(names)
    assert only_gguf([*names, "a-Q8_0.gguf"])
    assert not only_gguf(["a-Q8_0.gguf", "model.safetensors"])


NAMES = [
    "a-Q4_K_M.gguf", "a-UD-Q4_K_XL.gguf", "a-Q6_K.gguf", "a-UD-Q6_K.gguf", "mmproj-F16.gguf",
    "Q8_0/a-Q8_0-00002-of-00002.gguf", "Q8_0/a-Q8_0-00001-of-00002.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "files"),
    [
        ("q4_k_m", ("a-Q4_K_M.gguf",)),
        ("Q4_K_XL", ("a-UD-Q4_K_XL.gguf",)),
        ("Q6_K", ("a-Q6_K.gguf",)),
        ("ud-q6_k", ("a-UD-Q6_K.gguf",)),
        ("Q8_0", ("Q8_0/a-Q8_0-00001-of-00002.gguf", "Q8_0/a-Q8_0-00002-of-00002.gguf")),
        ("a-Q8_0-00001-of-00002.gguf", ("Q8_0/a-Q8_0-00001-of-00002.gguf", "Q8_0/a-Q8_0-00002-of-00002.gguf")),
        ("Q8_0/a-Q8_0-00001-of-00002.gguf", ("Q8_0/a-Q8_0-00001-of-00002.gguf", "Q8_0/a-Q8_0-00002-of-00002.gguf")),
        ("mmproj-F16.gguf", ("mmproj-F16.gguf",)),
    ],
)
def test_one_quantisation_is_chosen(wanted: str, files: tuple[str, ...]) -> None:
    assert choose(NAMES, wanted, "org/repo", "model") == files


@pytest.mark.parametrize("wanted", [None, "Q5_K_M", "UD", "K", "none.gguf"])
def test_what_means_none_or_several_is_refused_with_all(wanted: str | None) -> None:
    with pytest.raises(CheckpointError) as caught:
        choose(NAMES, wanted, "org/repo", "model")
    assert str(caught.value) == (
        "org/repo has Q4_K_M, Q6_K, Q8_0, UD-Q4_K_XL, UD-Q6_K: give one of them, such as org/repo:Q4_K_M, as model="
    )


def test_two_models_of_one_quantisation_are_told_by_their_files() -> None:
    names = ["a-Q8_0.gguf", "b-Q8_0.gguf", "b-Q4_0.gguf"]
    with pytest.raises(CheckpointError, match=r"has a-Q8_0\.gguf, b-Q8_0\.gguf, Q4_0: give one of them"):
        choose(names, "Q8_0", "org/repo", "model")
    assert choose(names, "b-Q8_0.gguf", "org/repo", "model") == ("b-Q8_0.gguf",)


def test_the_only_one_needs_no_name() -> None:
    assert choose(["a-Q8_0.gguf", "mmproj-F16.gguf"], None, "org/repo", "model") == ("a-Q8_0.gguf",)
    with pytest.raises(CheckpointError, match=r"org/repo has Q8_0: give org/repo:Q8_0 as model="):
        choose(["a-Q8_0.gguf"], "Q4_0", "org/repo", "model")
    with pytest.raises(CheckpointError, match="has no GGUF file of a model"):
        choose(["model.safetensors"], "Q4_0", "org/repo", "model")
