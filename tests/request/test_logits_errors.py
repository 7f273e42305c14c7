"""Logits that are not finite end the request that they are of, with an error that names what to do."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from edgemoe import Completion, Engine, LogitsError, Sampling, TokenLogprob
from edgemoe.results import LOWEST_LOGPROB, chat_logprobs

DAMAGED, WHOLE = [10, 77, 11], [10, 12, 11]
"""Prompts with and without the token whose embedding is damaged."""
GREEDY = Sampling(temperature=0, max_tokens=4, ignore_eos=True, logit_bias={77: -100})


def damage(folder: Path, value: float) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][77, 3] = value
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError(f"no embeddings in {folder}")


@pytest.fixture(scope="module", params=[math.nan, math.inf], ids=str)
def engine(request: pytest.FixtureRequest, talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = Path(shutil.copytree(talker, tmp_path_factory.mktemp("damaged") / "model"))
    damage(folder, request.param)
    with Engine.load(folder, expert_cache="25%", threads=1, state_folder="none") as loaded:
        yield loaded


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.0, max_tokens=4, seed=1), Sampling(temperature=0.7, top_p=0.9, seed=1)]
)
def test_a_prompt_that_gives_no_numbers_is_an_error(sampling: Sampling, engine: Engine) -> None:
    with pytest.raises(LogitsError, match=r"^the model's logits are not finite .*damaged weights: give another dtype="):
        engine.generate(DAMAGED, sampling)
    assert engine.generate(WHOLE, GREEDY).finish_reason == "length"


def test_of_many_requests_only_those_fail_that_give_no_numbers(engine: Engine) -> None:
    prompts = [WHOLE, DAMAGED, [20, 21, 22], DAMAGED, [30, 31]]
    replies = dict(engine.generate_batch((prompt, GREEDY) for prompt in prompts))
    for number, prompt in enumerate(prompts):
        reply = replies[number]
        if prompt is DAMAGED:
            assert isinstance(reply, LogitsError)
        else:
            assert isinstance(reply, Completion)
            assert reply.token_ids == engine.generate(prompt, GREEDY).token_ids


def test_a_reply_ends_where_its_numbers_do(engine: Engine) -> None:
    with engine.stream(WHOLE, Sampling(temperature=0, max_tokens=4, logit_bias={77: 100})) as stream:
        assert next(stream).token_ids == (77,)
        with pytest.raises(LogitsError):
            next(stream)
        assert stream.finished


def test_a_token_that_cannot_occur_has_a_log_probability_in_json(engine: Engine) -> None:
    reply = engine.generate(WHOLE, Sampling(temperature=0, max_tokens=1, logprobs=2))
    assert reply.logprobs is not None
    entry = reply.logprobs[0]
    impossible = TokenLogprob(entry.token_id, entry.token, -math.inf, ((3, "x", -math.inf), *entry.top))
    (told,) = (chat_logprobs((impossible,)) or {})["content"]
    assert told["logprob"] == told["top_logprobs"][0]["logprob"] == LOWEST_LOGPROB == -9999.0
    assert told["top_logprobs"][1]["logprob"] == pytest.approx(entry.top[0][2])
    json.dumps(told, allow_nan=False)


def test_nothing_is_kept_of_a_prompt_that_gives_no_numbers(engine: Engine) -> None:
    scheduler = engine._loop.scheduler
    shared = engine.stats.prefix_tokens
    for more in ([], [5]):
        with pytest.raises(LogitsError):
            engine.generate([*DAMAGED * 60, *more], GREEDY)
    assert scheduler.running == scheduler.waiting == 0
    assert engine.stats.prefix_tokens == shared
