from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from bench.support.gguf_files import GgufMaker
from edgemoe import Engine, Sampling
from edgemoe.kernels.cpu.kernel_choice import few_tokens
from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
from edgemoe.kernels.row_linear import BATCH_INVARIANT_TOKENS
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import Zoo

WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64}
"""Rows of whole blocks of every type."""


@pytest.mark.parametrize(
    ("experts", "tokens"), [("native", few_tokens(torch.bfloat16)), ("int8", PackedMatrix.max_tokens)]
)
def test_packed_experts_let_as_many_tokens_run_on_kernels_as_they_multiply(experts: str, tokens: int, zoo: Zoo) -> None:
    with Engine.load(zoo("qwen3_moe"), experts=experts, dtype="bfloat16", device="cpu", state_folder="none") as engine:
        assert engine._runtime is not None
        assert engine._runtime.runner()._few_tokens == tokens


@pytest.mark.parametrize(("experts", "dense"), [(Kind.IQ3_S, Kind.Q4_K), (Kind.Q4_K, Kind.IQ3_S)])
def test_a_type_without_kernels_is_exact_for_few_tokens_only(experts: Kind, dense: Kind, tmp_path: Path) -> None:
    """Also where the other matrices have kernels, which multiply any number."""
    with quiet_transformers():
        made = GgufMaker.of_zoo("qwen3_moe", tmp_path, **WIDE)
        file = made.write(tmp_path / "model.gguf", experts, dense)
        with Engine.load(file, device="cpu", state_folder="none") as engine:
            assert engine._runtime is not None
            tokens = engine._runtime.runner().batch_invariant_tokens
    assert tokens == BATCH_INVARIANT_TOKENS


@pytest.mark.parametrize("dense", ["native", "int8"])
def test_drafts_do_not_change_replies_of_quantised_experts(dense: str, zoo: Zoo) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=48, ignore_eos=True)
    replies = []
    for speculate in ("off", "ngram"):
        with Engine.load(
            zoo("qwen3_moe"), experts="int8", dense=dense, speculate=speculate, state_folder="none"
        ) as engine:
            replies.append(engine.generate([5, 60, 70, 5, 60, 70, 5, 60], sampling).token_ids)
    assert replies[0] == replies[1]
