"""The library's face: generating, streaming, stopping, closing, measuring."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edgemoe import Chunk, EdgeMoEError, Engine, RequestError, Sampling
from edgemoe.demo import demo_folder
from edgemoe.results import Progress
from tests.support.checkpoints import PROMPT, Zoo, greedy, reference

LONG = Sampling(max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(talker: Path) -> Iterator[Engine]:
    """Text in and out, with room for a quarter of the experts, token by token. Shared: no test may close it."""
    with Engine.load(talker, expert_cache="25%", threads=1, speculate="off") as loaded:
        yield loaded


def load(folder: Path) -> Engine:
    """A step a token: what was asked before would be drafted; how drafts end replies is tested apart."""
    return Engine.load(folder, expert_cache=8, threads=1, speculate="off")


def wait_in_thread(thread: threading.Thread) -> None:
    thread.join(20)
    assert not thread.is_alive()


def test_a_stream_is_the_completion_in_pieces(engine: Engine) -> None:
    settings = Sampling(max_tokens=20, temperature=1.0, seed=3, logprobs=2, ignore_eos=True)
    chunks = list(engine.stream("Hello", settings))
    whole = engine.generate("Hello", settings)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert tuple(item for chunk in chunks for item in chunk.logprobs or ()) == whole.logprobs
    assert [chunk.finish_reason for chunk in chunks] == [None] * 19 + ["length"] == [*[None] * 19, whole.finish_reason]
    assert all(len(chunk.token_ids) == 1 for chunk in chunks)


def test_text_and_token_ids_are_the_same_prompt(engine: Engine) -> None:
    ids = [3 + byte for byte in "Grüße".encode()]
    by_text, by_ids = (engine.generate(prompt, Sampling(max_tokens=8)) for prompt in ("Grüße", ids))
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids == tuple(ids)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.text == by_ids.text


def test_the_text_is_the_decoding_of_the_tokens(engine: Engine) -> None:
    reply = engine.generate("abc", Sampling(max_tokens=60, ignore_eos=True, temperature=1.0, seed=5))
    text = bytes(token - 3 for token in reply.token_ids if 3 <= token < 259).decode(errors="replace")
    assert reply.text == text


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_tokens_is_exact(count: int, engine: Engine) -> None:
    reply = engine.generate("abc", Sampling(max_tokens=count, ignore_eos=True))
    assert len(reply.token_ids) == count
    assert reply.finish_reason == "length"
    assert reply.timings.generated_tokens == count


def test_the_context_bounds_prompt_and_reply_together(talker: Path) -> None:
    with Engine.load(talker, expert_cache=8, context=12, threads=1) as small:
        reply = small.generate([5] * 9, Sampling(max_tokens=50, ignore_eos=True))
        assert (len(reply.token_ids), reply.finish_reason) == (3, "length")
        assert len(small.generate([5] * 11, LONG).token_ids) == 1
        for length in (12, 40):
            with pytest.raises(RequestError, match=rf"{length} tokens and the context 12.*context="):
                small.generate([5] * length)


def test_an_end_token_ends_and_is_reported_but_has_no_text(zoo: Zoo) -> None:
    folder = zoo("mixtral")
    free = greedy(reference(folder), PROMPT, 8)
    stopping = zoo("mixtral", eos_token_id=free[3])
    assert greedy(reference(stopping), PROMPT, 8) == free[: free.index(free[3]) + 1]
    with load(stopping) as ended:
        reply = ended.generate(PROMPT, Sampling(max_tokens=8))
        assert list(reply.token_ids) == free[: free.index(free[3]) + 1]
        assert reply.finish_reason == "stop"
        ignoring = ended.generate(PROMPT, Sampling(max_tokens=8, ignore_eos=True))
        assert (list(ignoring.token_ids), ignoring.finish_reason) == (free, "length")


def test_a_stop_text_cuts_the_reply_where_it_begins(engine: Engine) -> None:
    settings: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "temperature": 1.0, "seed": 11}
    whole = engine.generate("abc", Sampling(**settings)).text
    for start, length in ((5, 1), (7, 3), (0, 2)):
        stop = whole[start : start + length]
        reply = engine.generate("abc", Sampling(**settings, stop=(stop,)))
        assert reply.text == whole[: whole.index(stop)]
        assert reply.finish_reason == "stop"
        assert len(reply.token_ids) < 60
    never = engine.generate("abc", Sampling(**settings, stop=("no such text at all",)))
    assert (never.text, never.finish_reason) == (whole, "length")


def test_seeds_make_replies_repeatable(engine: Engine) -> None:
    first, again, other = (
        engine.generate("abc", Sampling(temperature=1.0, seed=seed, max_tokens=30)).token_ids for seed in (1, 1, 2)
    )
    assert first == again != other


def test_logprobs_are_those_of_the_unsampled_distribution(zoo: Zoo) -> None:
    folder = zoo("mixtral")
    with torch.inference_mode():
        logits = reference(folder)(torch.tensor([PROMPT])).logits[0, -1]
    expected = logits.float().log_softmax(-1)
    with load(folder) as own:
        reply = own.generate(PROMPT, Sampling(max_tokens=3, logprobs=4, temperature=0.7, top_k=2, seed=0))
        assert reply.logprobs is not None
        assert [item.token_id for item in reply.logprobs] == list(reply.token_ids)
        first = reply.logprobs[0]
        assert first.logprob == pytest.approx(float(expected[first.token_id]), abs=1e-4)
        assert [token for token, _, _ in first.top] == expected.topk(4).indices.tolist()
        assert [value for _, _, value in first.top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-4)
        chosen_only = own.generate(PROMPT, Sampling(max_tokens=3, logprobs=0)).logprobs
        assert chosen_only is not None
        assert [item.top for item in chosen_only] == [(), (), ()]
        assert own.generate(PROMPT, Sampling(max_tokens=3)).logprobs is None


def test_measurements_add_up(talker: Path) -> None:
    with load(talker) as own:
        replies = [own.generate("abcdefghijkl", Sampling(max_tokens=5, ignore_eos=True)) for _ in range(2)]
        stats = own.stats
    # What the first has computed of the prompt the second takes over, all but the last token.
    for reply, shared in zip(replies, (0, 11), strict=True):
        timings = reply.timings
        assert (timings.prompt_tokens, timings.shared_tokens, timings.generated_tokens) == (12, shared, 5)
        assert timings.wait_seconds > 0
        assert timings.prompt_seconds > 0
        assert timings.generate_seconds > 0
        assert timings.time_to_first_token == pytest.approx(timings.wait_seconds + timings.prompt_seconds)
        assert timings.prompt_per_second == pytest.approx((12 - shared) / timings.prompt_seconds)
        assert timings.generated_per_second == pytest.approx(4 / timings.generate_seconds)
        assert timings.bytes_per_token == timings.bytes_loaded / 17
    assert stats.hits == sum(reply.timings.hits for reply in replies)
    assert stats.misses == sum(reply.timings.misses for reply in replies)
    assert stats.bytes_loaded == sum(reply.timings.bytes_loaded for reply in replies)
    assert (stats.requests, stats.tokens_prompt, stats.tokens_generated) == (2, 24, 10)
    assert (stats.prefix_tokens, stats.preemptions, stats.steps) == (11, 0, 10)
    assert (stats.batch, stats.batch_reason) == (4, "not measured yet")
    assert (stats.slots, stats.experts) == (8, 32)
    assert stats.to_dict()["hit_rate"] == stats.hit_rate == stats.hits / (stats.hits + stats.misses)


def test_cancelling_from_another_thread_ends_after_the_current_token(engine: Engine) -> None:
    chunks: list[Chunk] = []
    for chunk in engine.stream("abc", LONG):
        chunks.append(chunk)
        if len(chunks) == 3:
            canceller = threading.Thread(target=engine.cancel)
            canceller.start()
            wait_in_thread(canceller)
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "cancelled"]
    assert sum(len(chunk.token_ids) for chunk in chunks) == 3
    assert engine.generate("abc", Sampling(max_tokens=2, ignore_eos=True)).finish_reason == "length"


def test_a_blocking_generate_can_be_cancelled(talker: Path) -> None:
    with Engine.load(talker, expert_cache=4, threads=1, link_gbps=0.01) as slow:
        replies: list[str] = []
        worker = threading.Thread(target=lambda: replies.append(slow.generate("abc", LONG).finish_reason))
        worker.start()
        end = time.monotonic() + 20
        while slow.stats.misses == 0 and time.monotonic() < end:
            time.sleep(0.001)
        slow.cancel()
        wait_in_thread(worker)
    assert replies == ["cancelled"]


def test_closing_a_stream_early_leaves_the_engine_usable(engine: Engine) -> None:
    expected = engine.generate("abc", Sampling(max_tokens=6, ignore_eos=True)).token_ids
    for taken in (0, 1, 4):
        stream = engine.stream("other words", LONG)
        for _ in range(taken):
            next(stream)
        stream.close()
        assert engine.generate("abc", Sampling(max_tokens=6, ignore_eos=True)).token_ids == expected


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(prompt: str, engine: Engine) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.generate(prompt)
    with pytest.raises(RequestError, match="the prompt is empty"):
        next(engine.stream(prompt))


@pytest.mark.parametrize("token", [-1, 264, 10**9])
def test_unknown_token_ids_are_refused(token: int, engine: Engine) -> None:
    with pytest.raises(RequestError, match=f"token id {token}, outside the vocabulary of 264"):
        engine.generate([5, token])


def test_a_bias_beyond_the_vocabulary_is_refused(engine: Engine) -> None:
    """vllm-project/vllm#16529: one such request must not end the others."""
    with pytest.raises(RequestError, match="logit_bias has the token id 264, outside the vocabulary of 264"):
        engine.generate([5], Sampling(logit_bias={264: 1.0}))
    assert engine.generate([5], Sampling(logit_bias={263: -1.0}, max_tokens=2)).token_ids


def test_without_a_tokenizer_prompts_are_ids_and_replies_have_no_text(zoo: Zoo) -> None:
    with load(zoo("mixtral")) as bare:
        assert not bare.has_tokenizer
        assert not bare.has_chat_template
        reply = bare.generate(PROMPT, Sampling(max_tokens=4, logprobs=1))
        assert (reply.text, len(reply.token_ids)) == ("", 4)
        with pytest.raises(RequestError, match="has no tokenizer files: give the prompt as token ids"):
            bare.generate("text")
        with pytest.raises(RequestError, match="has no chat template"):
            bare.chat([{"role": "user", "content": "Hi"}])


def test_close_may_be_repeated_and_ends_everything(talker: Path) -> None:
    own = load(talker)
    own.generate("abc", Sampling(max_tokens=2))
    own.close()
    own.close()
    for use in (lambda: own.generate("abc"), lambda: next(own.stream("abc")), lambda: own.stats):
        with pytest.raises(EdgeMoEError, match="the engine is closed: load it again with Engine.load"):
            use()
    own.cancel()


def test_leaving_the_block_with_a_stream_half_read_closes_too(talker: Path) -> None:
    outcome: list[str] = []

    def leave() -> None:
        with load(talker) as own:
            stream = own.stream("abc", LONG)
            next(stream)
        try:
            next(stream)
        except EdgeMoEError as error:
            outcome.append(str(error))
        outcome.extend(chunk.text for chunk in stream)

    worker = threading.Thread(target=leave, daemon=True)
    worker.start()
    wait_in_thread(worker)
    assert outcome == ["the engine is closed: load it again with Engine.load"]


def test_closing_from_another_thread_ends_a_generation(talker: Path) -> None:
    own = load(talker)
    outcome: list[str] = []

    def generate() -> None:
        try:
            outcome.append(own.generate("abc", Sampling(max_tokens=450, ignore_eos=True)).finish_reason)
        except EdgeMoEError as error:
            outcome.append(str(error))

    worker = threading.Thread(target=generate)
    worker.start()
    end = time.monotonic() + 20
    while own.stats.misses == 0 and time.monotonic() < end:
        time.sleep(0.001)
    own.close()
    wait_in_thread(worker)
    assert len(outcome) == 1
    assert outcome[0] == "cancelled" or "closed" in outcome[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_closing_gives_the_memory_back_at_once(dtype: str, talker: Path) -> None:
    """Not whenever Python's collector happens to run: the next model may need the room."""
    gc.collect()
    gc.disable()
    try:
        own = Engine.load(talker, expert_cache=8, dtype=dtype, threads=1)
        own.generate("abc", Sampling(max_tokens=2))
        assert own._runtime is not None
        weights = weakref.ref(own._runtime.model.get_input_embeddings().weight)
        slots = weakref.ref(own._runtime.cache.pool._map)
        own.close()
        assert weights() is None
        assert slots() is None
    finally:
        gc.enable()


def test_progress_is_reported_to_the_last_byte(talker: Path) -> None:
    seen: list[Progress] = []
    with Engine.load(talker, expert_cache=8, threads=1, on_progress=seen.append):
        pass
    weights = [step for step in seen if step.stage == "weights"]
    assert [step.done for step in weights] == sorted(step.done for step in weights)
    assert weights[-1].done == weights[-1].total > 0


def test_replies_do_not_depend_on_the_cache_or_the_link(talker: Path) -> None:
    expected = None
    for options in ({"expert_cache": 1}, {"expert_cache": 5}, {"expert_cache": "100%"}, {"link_gbps": 0.05}):
        with Engine.load(talker, **{"expert_cache": 6, "threads": 1, **options}) as own:  # type: ignore[arg-type]
            reply = own.generate("abcdef", Sampling(max_tokens=6, ignore_eos=True))
            expected = expected or reply.token_ids
            assert reply.token_ids == expected


def test_the_first_request_need_not_wait_for_the_cache_to_fill(talker: Path) -> None:
    """At this bandwidth the fill takes 2 seconds, and what one token needs at most 0.6."""
    with Engine.load(talker, expert_cache=28, threads=1, link_gbps=0.001) as slow:
        slow.generate([250], Sampling(max_tokens=1))
        assert slow._runtime is not None
        assert slow._runtime.link.bytes_moved < 24 * slow.plan.slot_nbytes


def test_a_file_that_is_cut_short_later_is_an_error_and_no_end(zoo: Zoo, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for source in zoo("mixtral").iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    whole = file.read_bytes()
    with Engine.load(tmp_path, expert_cache=1, threads=1) as own:
        expected = own.generate(PROMPT, Sampling(max_tokens=3)).token_ids
        with file.open("r+b") as opened:
            opened.truncate(len(whole) // 3)
        with pytest.raises((OSError, EdgeMoEError), match=r"model\.safetensors changed since it was loaded"):
            own.generate(PROMPT, Sampling(max_tokens=3))
        with file.open("r+b") as opened:
            opened.write(whole)
        with pytest.raises(EdgeMoEError, match="changed since it was loaded"):
            own.generate(PROMPT, Sampling(max_tokens=3))
    with Engine.load(tmp_path, expert_cache=1, threads=1) as again:
        assert again.generate(PROMPT, Sampling(max_tokens=3)).token_ids == expected


def test_the_shipped_model_answers_as_under_transformers() -> None:
    model = reference(demo_folder(), torch.float32)
    with Engine.load(dtype="float32", expert_cache="25%", threads=1) as own:
        prompt = own.chat_prompt([{"role": "user", "content": "Hello"}])
        reply = own.generate(prompt, Sampling(temperature=0, max_tokens=12, repetition_penalty=1.0))
    expected = greedy(model, prompt, 12)
    assert list(reply.token_ids) == expected
