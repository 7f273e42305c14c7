"""A linear map from what one router sees of a token to what the next one will, learnt while running."""

from __future__ import annotations

import torch

RIDGE = 1e-2
"""Share of each feature's own spread by which the map is held small, as ridge regression does ..."""
DOUBT = 0.25
"""... and as many more tokens for each feature in which the guess was right: with few tokens a map fits anything."""
FIRST_FIT = 64
"""Tokens before the first fit; each later one is made when there are half as many again ..."""
MEMORY = 16384
"""... up to so many, of which older ones then fade."""


class RouterMap:
    """Least squares from features to what a guess of the scores lacks, over all tokens, refitted ever more rarely.

    The last part of the features must be that guess. It is what is said until enough was seen, and what holding the
    map small leads back to, where features outnumber the tokens.
    """

    def __init__(self, features: int, scores: int) -> None:
        size = features + 1
        self._squares = torch.zeros(size, size)
        self._products = torch.zeros(size, scores)
        self._seen = 0.0
        self._next_fit = float(FIRST_FIT)
        self._map: torch.Tensor | None = None

    def learn(self, features: torch.Tensor, scores: torch.Tensor) -> None:
        """Tokens of which both are known now: float32 [tokens, features] and [tokens, scores]."""
        rows = _with_one(features)
        self._squares += rows.t() @ rows
        self._products += rows.t() @ (scores - self._guess(features))
        self._seen += len(rows)
        if self._seen >= self._next_fit:
            self._fit()

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """The scores to be expected, float32 [tokens, scores]."""
        guess = self._guess(features)
        return guess if self._map is None else guess + _with_one(features) @ self._map

    def _guess(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, -self._products.shape[1] :]

    def _fit(self) -> None:
        share = RIDGE + DOUBT * len(self._squares) / self._seen
        ridge = torch.diag(share * self._squares.diagonal() + 1e-6)
        fitted = torch.linalg.solve(self._squares + ridge, self._products)
        if not bool(fitted.isfinite().all()):
            # A token overflowed its dtype: what was summed up with it is of no use any more.
            self._squares.zero_()
            self._products.zero_()
            self._seen, self._next_fit = 0.0, float(FIRST_FIT)
            return
        self._map = fitted
        if self._seen > MEMORY:
            for kept in (self._squares, self._products):
                kept *= MEMORY / self._seen
            self._seen = float(MEMORY)
        self._next_fit = self._seen * 1.5


def _with_one(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)
