"""Samples use noise that is drawn in advance: drafts may use it too, and do not change the samples."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edgemoe.model.draft_tree import DraftTree
from tests.support.checkpoints import random_ids
from tests.support.crowd import new_request
from tests.support.samplers import sampler

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 12},
    {"temperature": 1.3, "top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
]
TOKENS = [3, 3, 17, 39]


def some_logits(seed: int, vocabulary: int = 40) -> torch.Tensor:
    return 1.5 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


def probabilities(logits: torch.Tensor, changed: dict[str, Any]) -> torch.Tensor:
    """The softmax of `logits` after transformers' processors, in transformers' order."""
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(changed.get("repetition_penalty", 1.0))])
    steps.append(TemperatureLogitsWarper(float(changed.get("temperature", 1.0))))
    steps.append(TopKLogitsWarper(changed.get("top_k", len(logits))))
    steps.append(TopPLogitsWarper(changed.get("top_p", 1.0)))
    steps.append(MinPLogitsWarper(changed.get("min_p", 0.0)))
    return torch.as_tensor(steps(torch.LongTensor([TOKENS]), logits[None])[0].double().softmax(-1))


@pytest.mark.parametrize(("changed", "ahead"), [*((each, 0) for each in SETTINGS), ({"top_p": 0.9}, 3)], ids=str)
def test_samples_follow_the_softmax_of_the_processed_logits(changed: dict[str, Any], ahead: int) -> None:
    """Chi-square over a fixed sequence of draws: about 1 in 10,000 sequences would be further off.

    So do the greatest of the values that a draft sees `ahead` of each draw.
    """
    logits, count = some_logits(1), 3000
    expected = probabilities(logits, changed)
    drawing, found = sampler(seed=3, **changed), torch.zeros(len(logits))
    for _ in range(count):
        if ahead:
            found[drawing.scores(TOKENS, logits, ahead=ahead).argmax()] += 1
            drawing.draw(TOKENS, logits)
        else:
            found[drawing.draw(TOKENS, logits)] += 1
    assert not (found[expected == 0]).any()
    often = expected * count >= 5
    rest = torch.stack([found[~often].sum(), expected[~often].sum() * count]).double()
    pairs = [*zip(found[often].double(), expected[often] * count, strict=True)]
    if rest[1] >= 5:
        pairs.append((rest[0], rest[1]))
    chi_square = float(sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs))
    degrees = len(pairs) - 1
    # Wilson and Hilferty's normal approximation, at 3.7 standard deviations.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.7 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert chi_square <= limit


@pytest.mark.parametrize("changed", [*SETTINGS, {"temperature": 0.0, "repetition_penalty": 1.2}], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_scores_ahead_are_those_of_the_later_sample(changed: dict[str, Any], seed: int) -> None:
    """Whether scores are computed ahead once, several times or never: the samples are the same."""
    later = [some_logits(20 * seed + number) for number in range(20)]
    silent, text = sampler(seed=seed, **changed), list(TOKENS)
    for logits in later:
        text.append(silent.draw(text, logits))
    draw = random.Random(seed)
    asking, told = sampler(seed=seed, **changed), dict[int, torch.Tensor]()
    for number, logits in enumerate(later):
        for _ in range(draw.randint(0, 3)):
            place = min(number + draw.randrange(6), len(later) - 1)
            # Accepted drafts, and one that is rejected.
            scores = asking.scores(text[: len(TOKENS) + place], later[place], ahead=place - number)
            asking.scores([*TOKENS, 1], some_logits(99), ahead=place - number)
            assert torch.equal(told.setdefault(place, scores), scores)
        token = asking.draw(text[: len(TOKENS) + number], logits)
        assert token == text[len(TOKENS) + number]
        if number in told:
            assert int(told[number].argmax()) == token
    assert len(told) > 10


def test_different_positions_have_different_noise() -> None:
    logits, drawing = some_logits(1), sampler()
    ahead = [drawing.scores(TOKENS, logits, ahead=place) for place in (2, 0, 1, 2)]
    assert torch.equal(ahead[0], ahead[3])
    assert len({tuple(each.tolist()) for each in ahead}) == 3
    drawing.draw(TOKENS, logits)
    assert torch.equal(drawing.scores(TOKENS, logits), ahead[2])


def test_greedy_is_the_argmax_at_every_position() -> None:
    greedy = sampler(temperature=0.0)
    for seed in range(5):
        logits = some_logits(seed)
        for ahead in (0, 4):
            assert torch.equal(greedy.scores(TOKENS, logits, ahead=ahead), logits)
        assert greedy.draw(TOKENS, logits) == int(logits.argmax())


@pytest.mark.parametrize("vocabulary", [2, 300, 5000])
def test_the_noise_is_finite_and_masked_tokens_stay_masked(vocabulary: int) -> None:
    drawing = sampler(top_k=1)
    logits = some_logits(1, vocabulary)
    for _ in range(200):
        scores = drawing.scores(TOKENS[:1], logits, ahead=1)
        assert int(scores.isfinite().sum()) == 1
        assert not scores.isnan().any()
        assert drawing.draw([0], logits) == int(logits.argmax())


# --- what a draft makes of it ----------------------------------------------------------------------


PENALISED = {"repetition_penalty": 3.0}


@pytest.mark.parametrize("settings", [PENALISED, {**PENALISED, "temperature": 0.9, "seed": 4, "top_k": 30}])
def test_candidates_from_the_models_own_logits_are_the_samples(settings: dict[str, Any]) -> None:
    """A drafter with the model's logits is always right. Without a penalty this model would repeat one token."""
    logits = some_logits(1, 264)
    asked = new_request(0, random_ids(9), max_tokens=6, **settings)
    asked.advance(logits)
    tree, node = DraftTree(asked.tokens[-1]), 0
    for _ in range(4):
        found = asked.candidates(tree, node, logits, 3)
        assert [share for _, share in found] == sorted((share for _, share in found), reverse=True)
        assert 0 < sum(share for _, share in found) <= 1 + 1e-5
        assert len(found) == 3
        node = tree.add(node, found[0][0], found[0][1])
    path = asked.verify(tree, logits.expand(5, -1))
    assert path == [0, 1, 2, 3, 4]
    assert asked.generated == 6
    assert asked.chunks[-1].timings.accepted == asked.chunks[-1].timings.drafted == 4
    alone = new_request(0, random_ids(9), max_tokens=6, **settings)
    while not alone.finished:
        alone.advance(logits)
    assert asked.tokens == alone.tokens
    assert len(set(alone.tokens[9:])) > 3


def test_a_tree_does_not_change_the_samples() -> None:
    """A request with random draft trees gets the samples of one without."""
    settings = {"temperature": 1.0, "seed": 2, "max_tokens": 40}
    draw = random.Random(5)

    def after(text: list[int]) -> torch.Tensor:
        """A model of the last token alone, with few probable tokens, so that random drafts are accepted sometimes."""
        return 2 * some_logits(text[-1], 264) + torch.where(torch.arange(264) < 6, 8.0, 0.0)

    plain, drafted = (new_request(0, [5, 6], **settings) for _ in range(2))
    while not plain.finished:
        plain.advance(after(plain.tokens))
    while not drafted.finished:
        tree = DraftTree(drafted.tokens[-1])
        for _ in range(draw.randrange(12)):
            tree.add(draw.randrange(len(tree)), draw.randrange(6), 0.5)
        before = drafted.generated
        logits = torch.stack([after([tree.tokens[node]]) for node in range(len(tree))])
        path = drafted.verify(tree, logits)
        made = drafted.tokens[drafted.prompt_length + before :]
        assert [tree.tokens[node] for node in path[1:]] == made[: len(path) - 1]
        assert tree.path(path[-1]) == path
        assert len(made) == len(path) or (drafted.finished and len(made) == len(path) - 1)
    assert drafted.tokens == plain.tokens
    timings = drafted.chunks[-1].timings
    assert 0 < timings.accepted < timings.drafted
    assert [chunk.token_ids for chunk in drafted.chunks] == [chunk.token_ids for chunk in plain.chunks]
