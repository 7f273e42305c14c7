"""The distance of one model's predictions from another's: the arithmetic on logits, and the result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch


class QualityMeter:
    """Compares a model's logits with an exact model's, token by token (the measures are those of MoE-Spec).

    Computes in float64 over the whole vocabulary, in nats.
    """

    def __init__(self) -> None:
        self._nats = 0.0
        self._exact_nats = 0.0
        self._agreed = 0
        self._divergences: list[float] = []

    def add(self, exact: torch.Tensor, found: torch.Tensor, following: torch.Tensor) -> None:
        """Adds both models' logits of the same tokens, [tokens, vocabulary], and the following ids, int64 [tokens].

        Raises ValueError if the shapes do not match.
        """
        if exact.shape != found.shape or following.shape != exact.shape[:1]:
            shapes = [[*each.shape] for each in (exact, found, following)]
            raise ValueError(f"logits {shapes[0]} and {shapes[1]} do not match the tokens {shapes[2]}")
        right, own = (logits.double().log_softmax(-1) for logits in (exact, found))
        self._divergences += divergences(right, own).tolist()
        index = following[:, None]
        self._exact_nats -= float(right.gather(-1, index).sum())
        self._nats -= float(own.gather(-1, index).sum())
        self._agreed += int((right.argmax(-1) == own.argmax(-1)).sum())

    @property
    def tokens(self) -> int:
        """Tokens compared so far; the other figures need at least one."""
        return len(self._divergences)

    @property
    def perplexity(self) -> float:
        """Perplexity of the measured model: e to the mean negative log-probability of the following tokens."""
        return _exp(self._nats / self.tokens)

    @property
    def exact_perplexity(self) -> float:
        """Perplexity of the exact model."""
        return _exp(self._exact_nats / self.tokens)

    @property
    def divergence(self) -> float:
        """Mean KL divergence from the exact model, in nats per token."""
        return math.fsum(self._divergences) / self.tokens

    @property
    def divergence_99(self) -> float:
        """99th percentile of the tokens' KL divergences, in nats, interpolated linearly."""
        return float(np.percentile(self._divergences, 99))

    @property
    def agreement(self) -> float:
        """Share of the tokens for which both models have the same most likely next token, from 0 to 1."""
        return self._agreed / self.tokens


def divergences(right: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The KL divergence of each row of `own` from `right`, in nats; both are log-probabilities [tokens, vocabulary]."""
    probabilities = right.exp()
    # A token of probability 0 adds nothing, even if both of its logits are minus infinity.
    terms = torch.where(probabilities > 0, probabilities * (right - own), 0.0)
    # A divergence is never negative, but rounding can make the sum so.
    return terms.sum(-1).clamp_min(0)


@dataclass(frozen=True)
class TaskQuality:
    """Right replies to the questions of one task, by the measured model and by the exact one."""

    task: str
    asked: int
    right: int
    exact_right: int


@dataclass(frozen=True)
class Quality:
    """The quality of an engine with its settings, against an exact model on the same text."""

    model: str
    lossy: str
    """The lossy settings, in words; empty for none."""
    against: str
    """"exact" for the same weights with exact settings, else the name of another checkpoint."""
    tokens: int
    """Tokens that both models predicted."""
    perplexity: float
    exact_perplexity: float
    kl_mean: float
    """Mean KL divergence from the exact model, in nats per token."""
    kl_99: float
    """99th percentile of the KL divergence, in nats."""
    agreement: float
    """Share of the tokens for which both models have the same most likely next token, from 0 to 1."""
    tasks: tuple[TaskQuality, ...] = ()
    """The tasks of the shipped model; empty where they were not asked."""

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object; infinite numbers are None."""
        known = asdict(self) | {"tasks": [asdict(task) for task in self.tasks]}
        return {name: None if value in (math.inf, -math.inf) else value for name, value in known.items()}

    def lines(self) -> list[tuple[str, str, str]]:
        """Rows for people: name, value, and its unit or what to compare it with."""
        rows = [
            ("model", self.model, f"lossy: {self.lossy}" if self.lossy else "exact: nothing is lossy"),
            ("against", self.against, "the same weights with nothing lossy" if self.against == EXACT else ""),
            ("text", str(self.tokens), "tokens predicted"),
            ("perplexity", f"{self.perplexity:.4f}", f"{self.exact_perplexity:.4f} exact"),
            ("KL divergence", f"{self.kl_mean:.5f}", "nats a token, mean"),
            ("", f"{self.kl_99:.5f}", "99th percentile"),
            ("top-1 agreement", f"{self.agreement:.2%}", "of the tokens have the same likeliest next one"),
        ]
        if self.tasks:
            asked, right, exact = (
                sum(getattr(task, name) for task in self.tasks) for name in ("asked", "right", "exact_right")
            )
            rows.append(("task score", f"{right / asked:.1%}", f"{right} of {asked} right, {exact} exact"))
            rows += [
                (f"  {task.task}", f"{task.right / task.asked:.1%}", f"{task.right} of {task.asked} right, "
                 f"{task.exact_right} exact")
                for task in self.tasks
            ]  # fmt: skip
        return rows


EXACT = "exact"
"""`Quality.against` for the same weights with exact settings."""


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
