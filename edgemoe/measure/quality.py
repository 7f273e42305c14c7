"""How far one model's predictions are from another's: the arithmetic over their logits, and the result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch


class QualityMeter:
    """Compares two models token by token, as MoE-Spec's authors and others compare an approximation with its original.

    Everything is computed in float64 over the whole vocabulary, in nats.
    """

    def __init__(self) -> None:
        self._nats = 0.0
        self._exact_nats = 0.0
        self._agreed = 0
        self._divergences: list[float] = []

    def add(self, exact: torch.Tensor, found: torch.Tensor, following: torch.Tensor) -> None:
        """Logits of the same tokens, both [tokens, vocabulary], and the ids that follow them, int64 [tokens].

        Raises ValueError when these are not of one shape.
        """
        if exact.shape != found.shape or following.shape != exact.shape[:1]:
            raise ValueError(f"logits {[*exact.shape]} and {[*found.shape]} are not of the tokens {[*following.shape]}")
        right, own = (logits.double().log_softmax(-1) for logits in (exact, found))
        probabilities = right.exp()
        # A token that the exact model rules out adds nothing, also where both logits are minus infinity.
        terms = torch.where(probabilities > 0, probabilities * (right - own), 0.0)
        # It cannot be negative; the sum's rounding can.
        self._divergences += terms.sum(-1).clamp_min(0).tolist()
        index = following[:, None]
        self._exact_nats -= float(right.gather(-1, index).sum())
        self._nats -= float(own.gather(-1, index).sum())
        self._agreed += int((right.argmax(-1) == own.argmax(-1)).sum())

    @property
    def tokens(self) -> int:
        """Tokens compared so far; the other figures need one at least."""
        return len(self._divergences)

    @property
    def perplexity(self) -> float:
        """Of the model that is looked at: e to the mean of minus the log-probability of what follows."""
        return _exp(self._nats / self.tokens)

    @property
    def exact_perplexity(self) -> float:
        """The same of the exact model."""
        return _exp(self._exact_nats / self.tokens)

    @property
    def divergence(self) -> float:
        """KL divergence of the model from the exact one, nats a token, the mean."""
        return math.fsum(self._divergences) / self.tokens

    @property
    def divergence_99(self) -> float:
        """Its 99th percentile over the tokens, linear between neighbours."""
        return float(np.percentile(self._divergences, 99))

    @property
    def agreement(self) -> float:
        """Share of the tokens after which both find the same token likeliest."""
        return self._agreed / self.tokens


@dataclass(frozen=True)
class TaskQuality:
    """Right replies of one documented task, with the settings as they are and by the exact model."""

    task: str
    asked: int
    right: int
    exact_right: int


@dataclass(frozen=True)
class Quality:
    """What an engine's settings cost in quality, measured against an exact model on the same text."""

    model: str
    lossy: str
    """What is lossy about its settings; empty where nothing is."""
    against: str
    """"exact", the same weights with nothing lossy, or the name of another checkpoint."""
    tokens: int
    """Tokens of text that were predicted by both."""
    perplexity: float
    exact_perplexity: float
    kl_mean: float
    """KL divergence from the exact model's predictions, nats a token."""
    kl_99: float
    """Its 99th percentile."""
    agreement: float
    """Share of the tokens after which both find the same token likeliest."""
    tasks: tuple[TaskQuality, ...] = ()
    """The documented tasks of the shipped model, where they were asked."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it: a number that is infinite is None."""
        known = asdict(self) | {"tasks": [asdict(task) for task in self.tasks]}
        return {name: None if value in (math.inf, -math.inf) else value for name, value in known.items()}

    def lines(self) -> list[tuple[str, str, str]]:
        """Rows for people: what, how much, and what that is or is to be compared with."""
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
"""What `Quality.against` calls the same weights with nothing lossy."""


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
