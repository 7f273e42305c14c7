"""What a request may be: everything else is a RequestError, and the engine stays usable."""

from __future__ import annotations

import array
import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgemoe import Completion, Engine, RequestError, Sampling

GREEDY = Sampling(temperature=0, max_tokens=2, ignore_eos=True)
HALF = "\ud800"


@pytest.fixture(scope="module")
def engine(talker: Path) -> Iterator[Engine]:
    with Engine.load(talker, expert_cache="25%", threads=1, context=128) as loaded:
        yield loaded


NO_PROMPTS: dict[str, Any] = {
    "nothing": None,
    "number": 5,
    "float": 1.5,
    "truth": True,
    "bytes": b"x",
    "byte array": bytearray(b"x"),
    "one message": {"role": "user", "content": "x"},
    "set": {5, 6},
    "generator": (token for token in [5]),
    "object": object(),
    "texts": ["a"],
    "floats": [1.5],
    "truths": [True],
    "nested": [[5, 6]],
    "nothings": [None],
    "half a character": HALF,
    "half a character inside": f"abc{HALF}def",
    "negative": [-1],
    "long integer": [10**400],
    "longer integer": [10**5000],
    "empty": [],
    "empty text": "",
    "matrix": np.array([[5, 6]]),
    "scalar": np.array(5),
    "float array": np.array([5.0]),
    "bool array": np.array([True]),
    "text array": np.array(["a"]),
    "batch tensor": torch.tensor([[5]]),
    "float tensor": torch.tensor([5.0]),
    "mixed": [5, {"role": "user", "content": "x"}],
    "message and token": [{"role": "user", "content": "x"}, 5],
    "message of numbers": [{1: 2}],
}


@pytest.mark.parametrize("name", NO_PROMPTS)
def test_what_is_no_prompt_is_refused(name: str, engine: Engine) -> None:
    with pytest.raises(RequestError) as refusal:
        engine.generate(NO_PROMPTS[name], GREEDY)
    assert len(str(refusal.value)) < 300
    with pytest.raises(RequestError):
        list(engine.stream(NO_PROMPTS[name], GREEDY))


@pytest.mark.parametrize(
    "prompt",
    [
        (5, 6, 7),
        range(5, 8),
        array.array("i", [5, 6, 7]),
        np.array([5, 6, 7]),
        np.array([5, 6, 7], dtype=np.uint8),
        torch.tensor([5, 6, 7]),
        collections.deque([5, 6, 7]),
        [np.int64(5), 6, 7],
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_integers_of_any_kind_are_token_ids(prompt: Any, engine: Engine) -> None:
    assert engine.generate(prompt, GREEDY).token_ids == engine.generate([5, 6, 7], GREEDY).token_ids


@pytest.mark.parametrize(
    "messages",
    ["text", None, 5, ["a"], [None], {"role": "user", "content": "x"}, [{"role": "user", "content": HALF}],
     [{"role": HALF, "content": "x"}], [{"role": "user", "content": "x", "name": HALF}],
     [{"role": "user", "content": ["x"]}], [{"role": 5, "content": "x"}], [{"role": "user", "content": b"x"}]],
    ids=repr,
)  # fmt: skip
def test_what_is_no_conversation_is_refused(messages: Any, engine: Engine) -> None:
    with pytest.raises(RequestError):
        engine.chat(messages, GREEDY)


def endless() -> dict[str, Any]:
    nested: dict[str, Any] = {}
    nested["more"] = nested
    return nested


@pytest.mark.parametrize("variables", [5, [1], {1: 2}, {"x": HALF}, endless()], ids=["5", "list", "key", "half", "end"])
def test_variables_of_a_template_are_checked(variables: Any, engine: Engine) -> None:
    with pytest.raises(RequestError, match="template_kwargs"):
        engine.chat([{"role": "user", "content": "x"}], GREEDY, variables)


@pytest.mark.parametrize("sampling", [5, 0, {}, {"temperature": 0}, "greedy"], ids=repr)
def test_settings_of_a_request_are_a_sampling(sampling: Any, engine: Engine) -> None:
    with pytest.raises(RequestError, match="must be an edgemoe.Sampling or None, not "):
        engine.generate("x", sampling)


def test_a_bias_of_a_token_that_is_none_is_refused_with_a_short_message(engine: Engine) -> None:
    with pytest.raises(RequestError, match="token id 9223372036854775807, outside the vocabulary"):
        engine.generate("x", Sampling(logit_bias={(1 << 63) - 1: 1}))


@pytest.mark.parametrize(
    "prompt", ["word " * 4_000_000, "w" * 30_000_000, np.zeros(10**8, np.int8)], ids=["words", "letters", "ids"]
)
def test_a_prompt_that_is_far_too_long_is_refused_before_it_is_tokenized(prompt: Any, engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"^the prompt has \d+ (characters|tokens).*context"):
        engine.generate(prompt, GREEDY)


def test_one_bad_request_of_many_ends_nothing(engine: Engine) -> None:
    requests: list[Any] = [
        ("a", GREEDY), None, 5, "ab", ("x",), ("x", 5), (None, GREEDY), (HALF, GREEDY), ([True], GREEDY),
        (object(), GREEDY), ([{"role": "user"}], GREEDY), ["b", GREEDY], ("c", None, 1),
    ]  # fmt: skip
    replies = dict(engine.generate_batch(requests))
    assert sorted(replies) == list(range(len(requests)))
    served = [number for number, reply in replies.items() if isinstance(reply, Completion)]
    assert sorted(served) == [0, 11]
    assert all(isinstance(replies[number], RequestError) for number in replies.keys() - {0, 11})


def test_the_defaults_hold_where_a_pair_has_no_settings(engine: Engine) -> None:
    ((_, reply),) = engine.generate_batch([([5, 6], None)])  # type: ignore[list-item]
    assert isinstance(reply, Completion)
    assert reply.token_ids == engine.generate([5, 6]).token_ids
