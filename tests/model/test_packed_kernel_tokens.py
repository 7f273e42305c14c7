from __future__ import annotations

import pytest
import torch

from edgemoe import Engine, Sampling
from edgemoe.kernels.cpu.kernel_choice import few_tokens
from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
from tests.support.checkpoints import Zoo


@pytest.mark.parametrize(
    ("experts", "tokens"), [("native", few_tokens(torch.bfloat16)), ("int8", PackedMatrix.max_tokens)]
)
def test_packed_experts_let_as_many_tokens_run_on_kernels_as_they_multiply(experts: str, tokens: int, zoo: Zoo) -> None:
    with Engine.load(zoo("qwen3_moe"), experts=experts, dtype="bfloat16", device="cpu", state_folder="none") as engine:
        assert engine._runtime is not None
        assert engine._runtime.runner()._few_tokens == tokens


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
