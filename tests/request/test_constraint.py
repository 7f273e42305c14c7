"""Replies in a given form: whatever a model's logits are, the reply is JSON that fits its schema."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import torch

from edgemoe.errors import RequestError
from edgemoe.model.draft_tree import DraftTree
from edgemoe.quiet import quiet_transformers
from edgemoe.request.constraint import Constraints
from edgemoe.request.reply_grammar import HEADER
from edgemoe.request.request import Request
from edgemoe.sampling import Sampling
from tests.support.checkpoints import Running, Zoo, random_ids, running
from tests.support.crowd import CONSTRAINTS, TEXTS, VOCABULARY, Crowd, alone, assert_same_reply, completion, new_request
from tests.support.logits import CountedLogits

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": -5, "maximum": 120},
        "kind": {"enum": ["cat", "dog", None, 7]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {"n": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}]}},
    "$ref": "#/$defs/n",
}
CODE = {"type": "string", "pattern": "^[a-z]{2}-[0-9]{1,3}$"}
NUMBER = {"type": "number", "minimum": 0, "maximum": 10}
SCHEMAS = [PERSON, TREE, CODE, NUMBER, {"const": {"a": [1, "ü"]}}, {"const": "<pad>"}]
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 0},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 5, "min_p": 0.05, "repetition_penalty": 1.3, "presence_penalty": 1.0},
    {"temperature": 0.0, "logit_bias": {str(3 + ord("}")): -100, "5": 100}},
]


@pytest.fixture
def own(zoo: Zoo) -> Iterator[Running]:
    with running(zoo("mixtral")) as found, quiet_transformers():
        yield found


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}


def after(text: list[int], seed: int) -> torch.Tensor:
    """The logits of a model of the last two tokens, with a liking for what closes things."""
    made = 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed + 977 * text[-1] + text[-2]))
    made[[3 + byte for byte in b'"}],']] += 4
    return made


def plain(seed: int, **settings: Any) -> Request:
    asked = new_request(0, [5, 6], **{"max_tokens": 2000, "seed": seed, **settings})
    while not asked.finished:
        asked.advance(after(asked.tokens, seed))
    return asked


@pytest.mark.parametrize("settings", SAMPLED, ids=str)
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:20])
def test_every_reply_fits_its_schema(schema: dict[str, Any], settings: dict[str, Any]) -> None:
    ended = 0
    for seed in range(12):
        reply = completion(plain(seed, response_format=form(schema), stop="<eos>", max_tokens=400, **settings))
        if reply.finish_reason == "stop":
            jsonschema.validate(json.loads(reply.text), schema)
            ended += 1
    # Some models never stop writing digits, or opening brackets.
    assert ended == 12 or (schema in (TREE, NUMBER) and (ended > 3 or settings["temperature"] == 0.0))


@pytest.mark.parametrize("settings", SAMPLED[:3], ids=str)
def test_a_json_object_is_one_or_is_cut_off(settings: dict[str, Any]) -> None:
    ended = 0
    for seed in range(30):
        reply = completion(plain(seed, response_format={"type": "json_object"}, max_tokens=150, **settings))
        assert reply.text.startswith("{") or reply.text.strip().startswith("{")
        if reply.finish_reason == "stop":
            assert isinstance(json.loads(reply.text), dict)
            ended += 1
        else:
            assert (reply.finish_reason, len(reply.token_ids)) == ("length", 150)
    assert ended > 3


def test_the_mask_is_exactly_what_can_follow() -> None:
    """By brute force: a token may come next if, and only if, some value of the enumeration goes on with it."""
    values = ["ab", "abc", "b", "ac"]
    texts = [json.dumps(value) for value in values]
    constraint, end = CONSTRAINTS.new(f"{HEADER}\nstart: %json {json.dumps({'enum': values})}"), 2
    for said in ("", '"', '"a', '"ab', '"abc', '"abc"'):
        state = CONSTRAINTS.new(f"{HEADER}\nstart: %json {json.dumps({'enum': values})}")
        for byte in said.encode():
            state.accept(3 + byte)
        expected = {3 + text.encode()[len(said)] for text in texts if text.startswith(said) and text != said}
        expected |= {end} if said in texts else set()
        for found in (state.allowed(VOCABULARY, {end}), after_drafts(constraint, said)):
            assert set(found.nonzero()[:, 0].tolist()) == expected
        assert state.complete == (said in texts)
    assert constraint.allowed_after([3 + ord("x")], VOCABULARY, {end}) is None


def after_drafts(constraint: Any, said: str) -> torch.Tensor:
    found = constraint.allowed_after([3 + byte for byte in said.encode()], VOCABULARY, {2})
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("settings", SAMPLED, ids=str)
def test_drafts_do_not_change_the_reply(settings: dict[str, Any]) -> None:
    """Random trees, of tokens that follow the grammar and of tokens that do not."""
    accepted = 0
    for seed in range(4):
        own = {"response_format": form(PERSON), "ignore_eos": bool(seed % 2), **settings}
        expected, draw = plain(seed, **own), random.Random(seed)
        asked = new_request(0, [5, 6], **{"max_tokens": 2000, "seed": seed, **own})
        while not asked.finished:
            tree = DraftTree(asked.tokens[-1])
            likely = expected.tokens[len(asked.tokens) :][: draw.randrange(5)]
            node = 0
            for token in likely:
                node = tree.add(node, token, 0.5)
            for _ in range(draw.randrange(6)):
                tree.add(draw.randrange(len(tree)), draw.randrange(VOCABULARY), 0.5)
            rows = [after([*asked.tokens, *tree.text(node)], seed) for node in range(len(tree))]
            for node, row in enumerate(rows):
                asked.candidates(tree, node, row, 3)
            asked.verify(tree, torch.stack(rows))
        assert asked.tokens == expected.tokens
        assert completion(asked).text == completion(expected).text
        accepted += asked.chunks[-1].timings.accepted
    assert accepted > 20


def test_a_drafter_with_the_models_logits_is_always_right() -> None:
    own = {"response_format": form(PERSON), "temperature": 1.0, "top_k": 0}
    expected = plain(3, **own)
    asked = new_request(0, [5, 6], max_tokens=2000, seed=3, **own)
    while not asked.finished:
        tree, node = DraftTree(asked.tokens[-1]), 0
        for _ in range(3):
            found = asked.candidates(tree, node, after([*asked.tokens, *tree.text(node)], 3), 1)
            if not found:
                break
            node = tree.add(node, *found[0])
        rows = [after([*asked.tokens, *tree.text(node)], 3) for node in range(len(tree))]
        asked.verify(tree, torch.stack(rows))
    assert asked.tokens == expected.tokens
    timings = asked.chunks[-1].timings
    assert timings.accepted == timings.drafted >= asked.generated - timings.cycles


def test_log_probabilities_are_those_before_the_mask() -> None:
    asked = plain(1, response_format=form(CODE), logprobs=2, temperature=0.0)
    text = [5, 6]
    for chunk in asked.chunks:
        assert chunk.logprobs is not None
        values = after(text, 1).log_softmax(-1)
        (token,) = chunk.token_ids
        assert chunk.logprobs[0].logprob == pytest.approx(float(values[token]), abs=1e-5)
        assert chunk.logprobs[0].top[0][0] == int(values.argmax())
        text.append(token)


@pytest.mark.parametrize("settings", SAMPLED[:2], ids=str)
def test_logits_of_a_device_are_read_whole(settings: dict[str, Any]) -> None:
    expected = plain(2, response_format=form(PERSON), **settings)
    asked = new_request(0, [5, 6], max_tokens=2000, seed=2, response_format=form(PERSON), **settings)
    while not asked.finished:
        asked.advance(CountedLogits(after(asked.tokens, 2)[None]).split([1])[0][0])
    assert asked.tokens == expected.tokens


def test_an_end_that_must_not_come_does_not_come() -> None:
    """The checkpoint asks for a longer reply than the form has: the form decides."""
    found = completion(plain(1, response_format=form({"const": 1}), temperature=0.0))
    assert (found.text.strip(), found.finish_reason) == ("1", "stop")


def test_a_batch_with_preemptions_gives_the_same_replies(own: Running) -> None:
    """The state of a form is the request's: it outlives the loss of its KV cache."""
    settings = {"response_format": form(PERSON), "max_tokens": 120, "temperature": 1.0}
    crowd = Crowd(own, capacity=lambda size: 3 * size.nbytes(96))
    prompts = [random_ids(20, seed=number) for number in range(5)]
    asked = [crowd.ask(prompt, seed=number, **settings) for number, prompt in enumerate(prompts)]
    crowd.finish()
    assert crowd.scheduler.totals.preemptions
    for number, (request, prompt) in enumerate(zip(asked, prompts, strict=True)):
        assert_same_reply(completion(request), alone(own, prompt, seed=number, **settings))


@pytest.mark.parametrize("speculate", ["ngram", "self"])
def test_a_model_drafts_under_a_form(own: Running, speculate: str) -> None:
    settings = {"response_format": form(PERSON), "max_tokens": 60}
    crowd, prompt = Crowd(own, speculate=speculate), random_ids(12)
    request = crowd.ask(prompt, **settings)
    crowd.finish()
    assert completion(request).timings.drafted
    assert_same_reply(completion(request), alone(own, prompt, **settings))


# --- what is refused ---------------------------------------------------------------------------------


def deep(levels: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        made = {"type": "array", "items": made}
    return made


REFUSED = [
    (3, "must be an object whose type is one of"),
    ({"type": "yaml"}, "must be an object whose type is one of"),
    ({"type": "json_schema"}, "the schema under"),
    ({"type": "json_schema", "json_schema": {"type": "object"}}, "the schema under"),
    ({"type": "json_object", "json_schema": None}, "unknown field 'json_schema'"),
    ({"type": "json_schema", "json_schema": {"schema": {}, "stritc": True}}, "unknown field 'stritc'"),
    ({"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}, "strict"),
    (form({"type": "string", "not": {"const": "a"}}), "not"),
    (form({"type": "strnig"}), "strnig"),
    (form({"$ref": "https://example.com/schema"}), "example.com"),
    (form({"type": "string", "pattern": "(?=a)b"}), "look-around"),
    (form({"enum": []}), "empty"),
    (form({"const": float("nan")}), "is not JSON"),
    (form({"const": {1, 2}}), "is not JSON"),
    (form({"const": {1: 2}}), "is not JSON"),
    (form({"const": "\ud800"}), "is not JSON"),
    (form({"const": 10**5000}), "is not JSON"),
    (form(deep(100)), "levels"),
    (form(deep(100_000)), "levels"),
    (form({"enum": list(range(20_000))}), "values"),
    (form({"const": "a" * 300_000}), "characters"),
    (form({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(6)]} for i in range(8)]}), "large"),
]


@pytest.mark.parametrize(("value", "why"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_a_format_is_checked_when_it_is_made(value: Any, why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        Sampling(response_format=value)
    message = str(caught.value)
    assert "response_format" in message
    assert "\n" not in message
    assert len(message) < 700


def test_any_text_is_no_form() -> None:
    assert Sampling(response_format={"type": "text"}) == Sampling()


def test_a_format_is_copied() -> None:
    schema = {"type": "string"}
    asked = Sampling(response_format=form(schema))
    schema["type"] = "null"
    assert asked.response_format == form({"type": "string"})


def test_a_tokenizer_that_cannot_be_read_is_said() -> None:
    class Slow:
        eos_token_id = None

    with pytest.raises(RequestError, match="leave response_format out"):
        Constraints(Slow(), TEXTS).new('start: "a"')


def test_a_schema_that_nothing_fits_fails_alone() -> None:
    """The request fails, with the reason; nothing is raised into the step that others share."""
    asked = new_request(0, [5, 6], response_format=form({"$ref": "#"}))
    while not asked.finished:
        asked.advance(after(asked.tokens, 1))
    assert isinstance(asked.error, RequestError)
    assert asked.finished
