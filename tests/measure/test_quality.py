from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from edgemoe.measure.quality import Quality, QualityMeter, TaskQuality

# Logits whose probabilities are (3/4, 1/4), (1/4, 3/4) and (1/5, 4/5).
THREE, QUARTER, FIFTH = [math.log(3.0), 0.0], [-math.log(3.0), 0.0], [0.0, math.log(4.0)]
APART = 0.75 * math.log(3.0) + 0.25 * math.log(1 / 3)
"""The divergence of (1/4, 3/4) from (3/4, 1/4): 0.549."""
NEAR = 0.25 * math.log(0.25 / 0.2) + 0.75 * math.log(0.75 / 0.8)
"""The divergence of (1/5, 4/5) from (1/4, 3/4): 0.007."""


def metered(exact: list[list[float]], found: list[list[float]], following: list[int]) -> QualityMeter:
    meter = QualityMeter()
    meter.add(torch.tensor(exact), torch.tensor(found), torch.tensor(following))
    return meter


def test_three_tokens_by_hand() -> None:
    meter = metered([THREE, QUARTER, QUARTER], [QUARTER, FIFTH, QUARTER], [0, 1, 0])
    assert meter.tokens == 3
    assert meter.exact_perplexity == pytest.approx((0.75 * 0.75 * 0.25) ** (-1 / 3))
    assert meter.perplexity == pytest.approx((0.25 * 0.8 * 0.25) ** (-1 / 3))
    assert meter.divergence == pytest.approx((APART + NEAR) / 3)
    assert meter.agreement == pytest.approx(2 / 3)
    # Sorted: 0, NEAR, APART; the 99th percentile is at position 1.98.
    assert meter.divergence_99 == pytest.approx(NEAR + 0.98 * (APART - NEAR))


def test_it_makes_no_difference_how_many_come_at_a_time() -> None:
    draw = torch.Generator().manual_seed(0)
    exact, found = (torch.randn(30, 50, generator=draw) * 5 for _ in range(2))
    following = torch.randint(50, (30,), generator=draw)
    whole, parts = QualityMeter(), QualityMeter()
    whole.add(exact, found, following)
    for start in (0, 7, 14, 21, 28):
        parts.add(exact[start : start + 7], found[start : start + 7], following[start : start + 7])
    for name in ("tokens", "perplexity", "exact_perplexity", "divergence", "divergence_99", "agreement"):
        assert getattr(whole, name) == pytest.approx(getattr(parts, name))
    kl = torch.nn.functional.kl_div(
        found.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert whole.divergence == pytest.approx(float(kl), rel=1e-5)


def test_a_model_agrees_with_itself_to_the_last_bit() -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * 20
    meter = metered(logits.tolist(), logits.tolist(), [3] * 40)
    assert (meter.divergence, meter.divergence_99, meter.agreement) == (0.0, 0.0, 1.0)
    assert meter.perplexity == meter.exact_perplexity


def test_tokens_that_are_ruled_out() -> None:
    """By both models they add nothing; by the measured one alone, they make the figures infinite."""
    ruled_out = [0.0, 0.0, -math.inf]
    both = metered([ruled_out], [ruled_out], [0])
    assert both.divergence == 0.0
    assert both.perplexity == pytest.approx(2.0)
    one = metered([[0.0, 0.0, 0.0]], [ruled_out], [2])
    assert (one.divergence, one.perplexity) == (math.inf, math.inf)
    # A token that only the exact model rules out takes probability from the others.
    assert metered([ruled_out], [[0.0, 0.0, 0.0]], [0]).divergence == pytest.approx(math.log(1.5))


def test_a_perplexity_too_large_for_a_float_is_infinite() -> None:
    assert metered([[0.0, 1.0]], [[2000.0, 0.0]], [1]).perplexity == math.inf


def test_what_does_not_belong_together_is_refused() -> None:
    for found, following in (([THREE, THREE], [0]), ([[1.0, 2.0, 3.0]], [0]), ([THREE], [0, 1])):
        with pytest.raises(ValueError, match="do not match the tokens"):
            metered([THREE], found, following)


QUALITY = Quality(
    model="small",
    lossy="at most 8 experts a layer",
    against="exact",
    tokens=2048,
    perplexity=4.21,
    exact_perplexity=4.2,
    kl_mean=0.0123456,
    kl_99=0.2,
    agreement=0.98765,
    tasks=(TaskQuality("count", 20, 18, 19), TaskQuality("code", 20, 20, 20)),
)


def test_the_result_as_rows() -> None:
    assert QUALITY.lines() == [
        ("model", "small", "lossy: at most 8 experts a layer"),
        ("against", "exact", "the same weights with nothing lossy"),
        ("text", "2048", "tokens predicted"),
        ("perplexity", "4.2100", "4.2000 exact"),
        ("KL divergence", "0.01235", "nats a token, mean"),
        ("", "0.20000", "99th percentile"),
        ("top-1 agreement", "98.77%", "of the tokens have the same likeliest next one"),
        ("task score", "95.0%", "38 of 40 right, 39 exact"),
        ("  count", "90.0%", "18 of 20 right, 19 exact"),
        ("  code", "100.0%", "20 of 20 right, 20 exact"),
    ]
    other = replace(QUALITY, lossy="", against="large", tasks=())
    assert other.lines()[:2] == [("model", "small", "exact: nothing is lossy"), ("against", "large", "")]
    assert len(other.lines()) == 7


def test_the_result_as_json() -> None:
    shown = json.loads(json.dumps(replace(QUALITY, kl_mean=math.inf).to_dict(), allow_nan=False))
    assert shown["kl_mean"] is None
    assert shown["agreement"] == 0.98765
    assert shown["tasks"][0] == {"task": "count", "asked": 20, "right": 18, "exact_right": 19}
