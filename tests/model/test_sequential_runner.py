"""Prefill in chunks gives what one pass gives, and families that cannot be run in chunks are found out."""

from __future__ import annotations

import pytest
import torch

from edgemoe.model.sequential_runner import PassInput
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import PROMPT, Running, Zoo, running, spread

CHUNKS = [
    "mixtral",
    "qwen2_moe",
    "gpt_oss",
    "deepseek_v2",
    "gemma4",
    "minimax",
    "nemotron_h",
    "qwen3_next",
    "zaya",
    "inkling2_text",
]


def prefilled(own: Running, prompt: list[int], chunk: int, following: int = 4) -> list[torch.Tensor]:
    """The logits after each chunk of `prompt`, then those after each of some greedy tokens."""
    steps = own.runner(chunk)
    cache = steps.start(len(prompt) + following)
    with quiet_transformers():
        size = chunk if steps.can_chunk else len(prompt)
        logits = [steps.step(cache, prompt[at : at + size]) for at in range(0, len(prompt), size)]
        for _ in range(following):
            logits.append(steps.step(cache, [int(logits[-1].argmax())]))
    return logits


@pytest.mark.parametrize("chunk", [1, 5, 8, 22, 23])
@pytest.mark.parametrize("family", CHUNKS)
def test_chunks_equal_one_pass(family: str, chunk: int, zoo: Zoo) -> None:
    with running(zoo(family)) as own:
        whole, parts = prefilled(own, PROMPT, 1000), prefilled(own, PROMPT, chunk)
        assert len(whole) == 1 + 4
        assert len(parts) == -(-len(PROMPT) // chunk) + 4
        for expected, found in zip(whole, parts[-5:], strict=True):
            assert (expected - found).abs().max() <= 1e-4 * spread(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_jamba_which_cannot_extend_its_state_in_chunks_is_run_in_one(dtype: str, zoo: Zoo) -> None:
    """transformers' jamba forgets its state when several tokens come on top of it: silently, so it must be found."""
    with running(zoo("jamba"), dtype=dtype) as own:
        parts = prefilled(own, PROMPT, 6)
        assert len(parts) == 1 + 4
        assert torch.equal(parts[0], prefilled(own, PROMPT, 1000)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["minimax", "nemotron_h", "qwen3_next", "zaya"])
def test_rounding_is_not_taken_for_a_lost_state(family: str, dtype: str, zoo: Zoo) -> None:
    with running(zoo(family), dtype=dtype) as own:
        assert len(prefilled(own, PROMPT, 6)) == 4 + 4


def test_whether_prompts_may_be_divided_is_probed_once_and_without_experts(zoo: Zoo) -> None:
    with running(zoo("nemotron_h")) as own, quiet_transformers():
        steps, passes = own.runner(), []
        run = steps.run
        steps.run = lambda inputs: passes.append(1) or run(inputs)  # type: ignore[method-assign, func-returns-value]
        assert steps.can_chunk
        assert steps.can_chunk
        assert len(passes) == 3, "the tokens whole, and in two parts"
        assert own.cache.counters.hits + own.cache.counters.misses == 0


def test_sequences_do_not_disturb_one_another(zoo: Zoo) -> None:
    with running(zoo("mixtral")) as own:
        steps = own.runner()
        one, other = steps.start(8), steps.start(8)
        with quiet_transformers():
            steps.step(one, [5, 6, 7])
            steps.step(other, [200, 100])
            interleaved = steps.step(one, [8])
            alone = steps.step(steps.start(8), [5, 6, 7, 8])
        torch.testing.assert_close(interleaved, alone, rtol=1e-4, atol=1e-4)


def test_a_sequence_may_outgrow_its_room(zoo: Zoo) -> None:
    with running(zoo("mixtral")) as own:
        steps = own.runner()
        cramped, roomy = steps.start(1), steps.start(100)
        with quiet_transformers():
            for token in PROMPT:
                found, expected = steps.step(cramped, [token]), steps.step(roomy, [token])
                assert torch.equal(found, expected)


def test_logits_are_float32_on_the_cpu_whatever_the_model(zoo: Zoo) -> None:
    with running(zoo("mixtral"), dtype="bfloat16") as own:
        logits = prefilled(own, PROMPT[:4], 1000, following=0)[0]
        assert (logits.dtype, logits.device.type, tuple(logits.shape)) == (torch.float32, "cpu", (256,))
        assert not logits.requires_grad


def test_a_device_leaves_nothing_to_several_threads_of_the_cpu(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 16 cores they cost 10 ms a layer, more than all else."""
    with running(zoo("mixtral")) as own:
        runner = own.runner()
        monkeypatch.setattr(runner, "threads", 4)
        monkeypatch.setattr(runner, "_few_tokens", 64)
        item = PassInput(runner.start(1), [1] * 4096)
        monkeypatch.setattr("edgemoe.model.sequential_runner.MIN_THREADED_WORK", 0)
        used, plans = {}, {}
        for kind in ("cpu", "cuda"):
            monkeypatch.setattr(runner, "device", torch.device(kind))
            with runner.passing([item], kind="test"):
                used[kind] = torch.get_num_threads()
                plans[kind] = torch.backends.cuda.cudnn_sdp_enabled()
    assert used == {"cpu": 4, "cuda": 1}
    assert not plans["cuda"], "cuDNN plans every length anew"
