"""The learnt correction: its prediction before the first fit, its fits, and its memory."""

from __future__ import annotations

import pytest
import torch

from edgemoe.prefetch import router_map
from edgemoe.prefetch.router_map import FIRST_FIT, RouterMap

OTHERS, SCORES = 6, 4
FEATURES = OTHERS + SCORES


def features_of(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, FEATURES, generator=torch.Generator().manual_seed(seed))


def linear(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random linear map and offset."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(FEATURES, SCORES, generator=generator), torch.randn(SCORES, generator=generator)


def guess(features: torch.Tensor) -> torch.Tensor:
    return features[:, OTHERS:]


def error(made: RouterMap, weight: torch.Tensor, offset: torch.Tensor) -> float:
    """The error on new tokens, relative to the scores."""
    features = features_of(200, seed=99)
    scores = features @ weight + offset
    return float((made.scores(features) - scores).norm() / scores.norm())


def learn_one_by_one(made: RouterMap, features: torch.Tensor, scores: torch.Tensor) -> list[int]:
    """The numbers of tokens after which the map was fitted again."""
    fits, known = [], made._map
    for token in range(len(features)):
        made.learn(features[token : token + 1], scores[token : token + 1])
        if made._map is not known:
            fits.append(token + 1)
            known = made._map
    return fits


def test_before_the_first_fit_it_says_what_the_last_features_say() -> None:
    made = RouterMap(FEATURES, SCORES)
    features = features_of(FIRST_FIT - 1)
    assert torch.equal(made.scores(features), guess(features))
    made.learn(features, features_of(FIRST_FIT - 1, seed=1)[:, :SCORES])
    assert torch.equal(made.scores(features), guess(features))
    made.learn(features[:1], features[:1, :SCORES])
    assert not torch.equal(made.scores(features), guess(features))


def test_it_finds_a_linear_map_with_its_offset() -> None:
    made = RouterMap(FEATURES, SCORES)
    weight, offset = linear(0)
    features = features_of(2000)
    assert error(made, weight, offset) > 0.5
    made.learn(features, features @ weight + offset)
    assert error(made, weight, offset) < 0.03


def test_it_finds_an_offset_alone() -> None:
    made = RouterMap(FEATURES, SCORES)
    features = features_of(1000)
    offset = torch.tensor([3.0, -2.0, 0.0, 10.0])
    made.learn(features, guess(features) + offset)
    assert (made.scores(features) - guess(features) - offset).abs().max() < 0.3


def test_a_guess_that_is_right_stays_as_it_is() -> None:
    made = RouterMap(FEATURES, SCORES)
    features = features_of(1000)
    made.learn(features, guess(features))
    assert torch.allclose(made.scores(features), guess(features), atol=1e-5)


def test_it_is_least_squares_with_a_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equals a fit in float64 to all tokens at once, over noise, for any portions."""
    features, generator = features_of(300), torch.Generator().manual_seed(5)
    weight, offset = linear(1)
    scores = features @ weight + offset + torch.randn(300, SCORES, generator=generator)
    made = RouterMap(FEATURES, SCORES)
    monkeypatch.setattr(made, "_next_fit", 300.0)
    for portion in torch.arange(300).split([100, 1, 150, 49]):
        made.learn(features[portion], scores[portion])
    rows = torch.cat([features, torch.ones(300, 1)], dim=1).double()
    squares = rows.t() @ rows
    ridge = torch.diag((router_map.RIDGE + router_map.SMALL_SAMPLE_RIDGE * (FEATURES + 1) / 300) * squares.diagonal())
    expected = torch.linalg.solve(squares + ridge, rows.t() @ (scores - guess(features)).double())
    found = made.scores(features).double()
    assert torch.allclose(found, guess(features).double() + rows @ expected, atol=1e-3)


@pytest.mark.parametrize("tokens", [FIRST_FIT, 2 * FIRST_FIT])
def test_with_more_features_than_tokens_it_stays_close_to_its_guess(tokens: int) -> None:
    """As at the start of the first reply of a model with many experts. There is only noise to learn."""
    experts, best = 128, 8
    generator = torch.Generator().manual_seed(2)
    before, after = (torch.randn(experts, 256, generator=generator) / 16 for _ in range(2))
    hidden = torch.randn(tokens + 200, 256, generator=generator)
    moved = hidden + 0.3 * torch.randn(hidden.shape, generator=generator)
    features, scores = torch.cat([hidden @ before.t(), hidden @ after.t()], dim=1), moved @ after.t()
    made = RouterMap(2 * experts, experts)
    made.learn(features[:tokens], scores[:tokens])
    assert made._map is not None

    def right(said: torch.Tensor) -> float:
        chosen = torch.zeros_like(said).scatter(1, scores[tokens:].topk(best).indices, 1.0)
        return float(chosen.gather(1, said.topk(best).indices).mean())

    assert right(made.scores(features[tokens:])) > right(features[tokens:, experts:]) - 0.06


def test_it_is_fitted_ever_more_rarely() -> None:
    made = RouterMap(FEATURES, SCORES)
    assert learn_one_by_one(made, features_of(500), features_of(500, seed=1)[:, :SCORES]) == [
        64,
        96,
        144,
        216,
        324,
        486,
    ]


def test_many_tokens_at_once_are_one_fit() -> None:
    made = RouterMap(FEATURES, SCORES)
    made.learn(features_of(300), features_of(300, seed=1)[:, :SCORES])
    fits = learn_one_by_one(made, features_of(200), features_of(200, seed=1)[:, :SCORES])
    assert fits == [150], "after half as many tokens again"


def test_old_tokens_fade_and_fits_keep_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_map, "MEMORY", 256)
    made = RouterMap(FEATURES, SCORES)
    old, new = linear(0), linear(1)
    features = features_of(1500)
    learn_one_by_one(made, features, features @ old[0] + old[1])
    assert error(made, *old) < 0.03
    fits = learn_one_by_one(made, features, features @ new[0] + new[1])
    assert {later - sooner for sooner, later in zip(fits, fits[1:], strict=False)} == {128}
    assert error(made, *new) < 0.05


def test_without_fading_it_would_remember_for_ever() -> None:
    """The counterpart of the test above."""
    made = RouterMap(FEATURES, SCORES)
    old, new = linear(0), linear(1)
    features = features_of(1500)
    for weight, offset in (old, new):
        made.learn(features, features @ weight + offset)
    assert error(made, *new) > 0.3


@pytest.mark.parametrize("kind", ["zero", "constant", "one token", "twice the same", "tiny", "huge"])
def test_features_that_tell_nothing_do_no_harm(kind: str) -> None:
    made = RouterMap(FEATURES, SCORES)
    features = features_of(400)
    scores = guess(features) + 0.1
    if kind == "zero":
        features[:, :OTHERS] = 0
    elif kind == "constant":
        features[:, :OTHERS] = 7.5
    elif kind == "one token":
        features, scores = features[:1].expand(400, -1), scores[:1].expand(400, -1)
    elif kind == "twice the same":
        features[:, 1] = features[:, 0]
    else:
        scale = {"tiny": 1e-12, "huge": 1e9}[kind]
        features, scores = features * scale, scores * scale
    learn_one_by_one(made, features, scores)
    said = made.scores(features)
    assert said.isfinite().all()
    assert (said - scores).norm() <= 0.1 * scores.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize(("before", "noticed"), [(0, FIRST_FIT - 1), (1000, 93)], ids=["at first", "later"])
def test_a_token_that_overflowed_is_got_over(value: float, before: int, noticed: int) -> None:
    """The next fit detects it and is dropped; then learning starts anew."""
    made = RouterMap(FEATURES, SCORES)
    weight, offset = linear(0)
    features = features_of(3000)
    scores = features @ weight + offset
    learn_one_by_one(made, features[:before], scores[:before])
    broken = features[:1].clone()
    broken[0, 2] = value
    made.learn(broken, scores[:1])
    fits = learn_one_by_one(made, features[1000:], scores[1000:])
    assert fits[0] == noticed + FIRST_FIT
    assert error(made, weight, offset) < 0.05


def test_all_zeros_are_borne() -> None:
    made = RouterMap(FEATURES, SCORES)
    nothing = torch.zeros(100, FEATURES)
    made.learn(nothing, nothing[:, :SCORES])
    assert torch.equal(made.scores(nothing), nothing[:, :SCORES])
