"""What is kept of logits is what transformers' processors leave of them, and the noise is that of a Gumbel variable."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    EpsilonLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edgemoe.request.gumbel_noise import gumbel_noise
from edgemoe.request.kept_logits import LogitsSteps, top_k
from edgemoe.request.logits_processors import OccurrencePenalty
from edgemoe.request.sparse_processors import in_place

TOKENS = [3, 8, 3, 200]


def plain(processors: LogitsProcessorList, logits: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(processors(torch.LongTensor([TOKENS]), logits[None].clone())[0])


@pytest.mark.parametrize("vocabulary", [257, 1000, 5000])
@pytest.mark.parametrize("count", [1, 2, 20, 256])
@pytest.mark.parametrize("ties", [False, True])
def test_what_is_kept_is_what_the_processors_leave(vocabulary: int, count: int, ties: bool) -> None:
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.7)])
    processors += [TopKLogitsWarper(count), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)]
    steps = LogitsSteps(processors)
    for seed in range(20):
        logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))
        logits = logits.round() if ties else logits
        before, kept = logits.clone(), steps.run(TOKENS, logits)
        found, expected = kept.spread(vocabulary), plain(processors, logits)
        assert kept.ids is not None
        if ties:
            # Which of several equal ones are left at the border of top-p depends on how PyTorch sorts them.
            found, expected = found.sort().values, expected.sort().values
        assert torch.equal(found, expected)
        assert float(kept.scores.max()) == float(expected.max())
        assert torch.equal(logits, before)


def test_processors_that_look_at_more_than_values_see_all_logits() -> None:
    processors = LogitsProcessorList([TopKLogitsWarper(5), EpsilonLogitsWarper(0.1)])
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    kept = LogitsSteps(processors).run(TOKENS, logits)
    assert kept.ids is None
    assert torch.equal(kept.scores, plain(processors, logits))


@pytest.mark.parametrize("text", [TOKENS, [], [4999, 5000, 7000, 3]])
def test_changes_in_place_are_those_of_the_processors(text: list[int]) -> None:
    """Also where the embeddings have more tokens than there are logits."""
    processors = LogitsProcessorList([SequenceBiasLogitsProcessor([[[3], 2.0], [[40], -100.0]])])
    processors += [RepetitionPenaltyLogitsProcessor(1.3)]
    if max(text, default=0) < 5000:
        processors.append(OccurrencePenalty(1, 0.5, 0.25))
    assert all(in_place(each) for each in processors)
    processors.append(TopKLogitsWarper(30))
    for seed in range(5):
        logits = 2 * torch.randn(5000, generator=torch.Generator().manual_seed(seed))
        logits[[3, 8, 200]] = torch.tensor([4.0, 9.0, -1.0])
        before = logits.clone()
        expected = processors(torch.LongTensor([text]), logits[None].clone())[0]
        assert torch.equal(LogitsSteps(processors).run(text, logits).spread(5000), expected)
        assert torch.equal(logits, before)


def test_a_bias_for_a_token_without_a_logit_is_refused_by_name() -> None:
    processors = LogitsProcessorList([SequenceBiasLogitsProcessor([[[77], 2.0]]), TopKLogitsWarper(3)])
    with pytest.raises(ValueError, match="77"):
        LogitsSteps(processors).run(TOKENS, torch.zeros(50))


@pytest.mark.parametrize(
    "processor",
    [
        SequenceBiasLogitsProcessor([[[3, 4], 2.0]]),
        RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=2),
        TemperatureLogitsWarper(0.5),
    ],
)
def test_what_changes_more_than_known_tokens_has_no_form_in_place(processor: LogitsProcessor) -> None:
    assert in_place(processor) is None


def test_no_processors_leave_the_logits() -> None:
    logits = torch.randn(9)
    kept = LogitsSteps(LogitsProcessorList()).run(TOKENS, logits)
    assert kept.scores is logits
    assert kept.spread(9) is logits


@pytest.mark.parametrize("place", [0, 100, 2047])
def test_logits_that_are_no_numbers_go_the_plain_way(place: int) -> None:
    processors = LogitsProcessorList([TopKLogitsWarper(5)])
    logits = torch.randn(2048, generator=torch.Generator().manual_seed(2))
    logits[place] = float("nan")
    kept = LogitsSteps(processors).run(TOKENS, logits)
    assert torch.allclose(kept.spread(2048), plain(processors, logits), equal_nan=True)


def test_masked_logits_are_never_kept_before_others() -> None:
    scores = torch.full((1000,), -torch.inf)
    scores[[7, 300, 999]] = torch.tensor([1.0, 2.0, 3.0])
    assert top_k(scores, 3).tolist() == [7, 300, 999]
    assert len(top_k(scores, 4)) == 1000, "as transformers does, whose threshold is then minus infinity"


def test_the_noise_is_gumbels() -> None:
    """Kolmogorov and Smirnov's distance: one in 10,000 seeds would be further off."""
    count = 20000
    for sample in range(3):
        found = gumbel_noise(5, sample, torch.arange(count)).double().sort().values
        expected = (-(-found).exp()).exp()
        ranks = torch.arange(1, count + 1) / count
        assert (ranks - expected).abs().max() < 2.2 / count**0.5
        assert found.isfinite().all()


def test_the_noise_of_a_token_is_the_same_whichever_others_are_asked_for() -> None:
    everything = gumbel_noise(9, 4, torch.arange(500))
    some = torch.tensor([3, 77, 499])
    assert torch.equal(gumbel_noise(9, 4, some), everything[some])


def test_seeds_and_samples_have_noise_of_their_own() -> None:
    tokens = torch.arange(4000)
    first, *others = (gumbel_noise(*each, tokens) for each in ((0, 0), (0, 1), (1, 0), (2**63 - 1, 0), (2**64 - 1, 7)))
    for other in others:
        correlation = torch.corrcoef(torch.stack([first, other]))[0, 1]
        assert abs(float(correlation)) < 0.07
