"""The formulas of MoESD (arXiv 2505.19645): when speculative decoding pays on a Mixture-of-Experts model.

Symbols: E experts per layer, K of them active for each token, rho = K/E; B sequences, gamma drafted tokens for each;
t tokens in a pass: B in a plain step, B * (gamma + 1) in a verification, which also runs the token before the draft;
alpha the probability that a drafted token is accepted, sigma the accepted share.
"""

from __future__ import annotations

import math


def expected_experts(experts: float, top_k: float, tokens: float) -> float:
    """N(t) = E * (1 - (1 - K/E)^t): expected experts of a layer that `tokens` tokens activate under uniform routing.

    `experts` may be an effective number, for routing that is not uniform. Raises ValueError unless
    0 < `top_k` <= `experts`.
    """
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k must be above 0 and at most the {experts} experts of a layer, not {top_k}")
    return float(experts * (1 - (1 - top_k / experts) ** tokens))


def full_activation(experts: int, top_k: int, share: float = 0.95) -> int:
    """T_thres = ceil(log_(1-rho)(1 - tau)): tokens from which a pass activates a `share` (tau) of a layer's experts."""
    if top_k >= experts:
        return 1
    return math.ceil(math.log(1 - share) / math.log(1 - top_k / experts))


def tokens_per_expert(top_k: float, tokens: float, activated: float) -> float:
    """T_exp(t) = K * t / N(t): tokens per expert when a layer's `tokens` tokens activate `activated` experts."""
    return top_k * tokens / activated


def growth(tokens: float, knee: float, base: float) -> float:
    """G(t; lambda * RP, s): growth of the time of a matrix product with its tokens.

    Up to the `knee` (lambda times the ridge point, in tokens) memory bounds the product: G is `base` (s, at least 1)
    to the power of t. Above it arithmetic does: G goes on along the tangent at the knee.
    """
    if tokens <= knee:
        return float(base**tokens)
    return float(base**knee * (1 + math.log(base) * (tokens - knee)))


def tokens_per_cycle(alpha: float, gamma: int) -> float:
    """sigma * (gamma + 1): mean tokens per cycle and sequence, with the verification's own token.

    sigma = [(1 - alpha^(gamma+1)) / (1 - alpha)] / (gamma + 1), for a draft that is a chain: each of its tokens is
    accepted with probability `alpha` once all before it are. Raises ValueError unless 0 <= `alpha` <= 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"the acceptance probability must be from 0 to 1, not {alpha}")
    return sum(alpha**depth for depth in range(gamma + 1))


def target_efficiency(plain: float, verify: float) -> float:
    """T_T(B, 1) / T_T(B, gamma): seconds of a plain step over those of a verification; 1 if verifying costs nothing."""
    return plain / verify


def speedup(tokens: float, plain: float, draft: float, verify: float, reject: float) -> float:
    """sigma * (gamma + 1) * T_AR / (gamma * T_D + T_verify + T_rej): tokens per second with drafts over without.

    `tokens` are those of a cycle (see `tokens_per_cycle`). The others are seconds: of a plain step, of all drafting in
    a cycle, of its verification, and of sampling and rollback.
    """
    return tokens * plain / (draft + verify + reject)
