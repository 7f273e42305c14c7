"""An online linear map from features of a token at one layer to its router scores at the next."""

from __future__ import annotations

import torch

RIDGE = 1e-2
"""Ridge penalty of each feature, as a fraction of its sum of squares."""
SMALL_SAMPLE_RIDGE = 0.25
"""Additional penalty, times features per token: with few tokens a map without it would fit noise."""
FIRST_FIT = 64
"""Tokens before the first fit. Each later fit comes after half as many tokens again."""
MEMORY = 16384
"""Maximum number of tokens that count. Beyond it, older tokens fade."""


class RouterMap:
    """Ridge regression from features to the residual of a baseline, refitted ever more rarely.

    The last `scores` of the `features` must be the baseline: a first estimate of the scores. It is the prediction until
    the first fit, and the limit under strong regularisation.
    """

    def __init__(self, features: int, scores: int) -> None:
        size = features + 1
        self._squares = torch.zeros(size, size)
        self._products = torch.zeros(size, scores)
        self._tokens = 0.0
        self._next_fit = float(FIRST_FIT)
        self._map: torch.Tensor | None = None

    def learn(self, features: torch.Tensor, scores: torch.Tensor) -> None:
        """Adds tokens with known scores: float32 [tokens, features] and [tokens, scores] on the CPU."""
        rows = _with_one(features)
        self._squares += rows.t() @ rows
        self._products += rows.t() @ (scores - self._baseline(features))
        self._tokens += len(rows)
        if self._tokens >= self._next_fit:
            self._fit()

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """The predicted scores, float32 [tokens, scores]."""
        baseline = self._baseline(features)
        return baseline if self._map is None else baseline + _with_one(features) @ self._map

    def _baseline(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, -self._products.shape[1] :]

    def _fit(self) -> None:
        penalty = RIDGE + SMALL_SAMPLE_RIDGE * len(self._squares) / self._tokens
        ridge = torch.diag(penalty * self._squares.diagonal() + 1e-6)
        fitted = torch.linalg.solve(self._squares + ridge, self._products)
        if not bool(fitted.isfinite().all()):
            # A token overflowed its dtype, and spoilt the sums.
            self._squares.zero_()
            self._products.zero_()
            self._tokens, self._next_fit = 0.0, float(FIRST_FIT)
            return
        self._map = fitted
        if self._tokens > MEMORY:
            for sums in (self._squares, self._products):
                sums *= MEMORY / self._tokens
            self._tokens = float(MEMORY)
        self._next_fit = self._tokens * 1.5


def _with_one(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)
