"""When speculation pays on a Mixture-of-Experts model: the formulas of MoESD (arXiv 2505.19645), and no measuring.

Symbols: E experts a layer, K of them active for a token, rho = K/E, B sequences, gamma tokens drafted for each, t
tokens in a pass (B for a plain step, B * (gamma + 1) for a verification, which also runs the token before the draft),
alpha the probability that a drafted token is accepted, sigma the accepted share.
"""

from __future__ import annotations

import math


def expected_experts(experts: float, top_k: float, tokens: float) -> float:
    """N(t): experts of a layer that `tokens` tokens activate, when each takes `top_k` of `experts` evenly.

    N(t) = E * (1 - (1 - K/E)^t). `experts` may be an effective number, for routing that prefers some.
    """
    if not 0 < top_k <= experts:
        raise ValueError(f"a token takes some of a layer's {experts} experts, not {top_k}")
    return float(experts * (1 - (1 - top_k / experts) ** tokens))


def full_activation(experts: int, top_k: int, share: float = 0.95) -> int:
    """T_thres: tokens from which a pass activates `share` (tau) of a layer's experts, ceil(log_(1-rho)(1 - tau))."""
    if top_k >= experts:
        return 1
    return math.ceil(math.log(1 - share) / math.log(1 - top_k / experts))


def tokens_per_expert(experts: float, top_k: float, tokens: float) -> float:
    """T_exp(t): tokens that each activated expert gets, rho * t / (1 - (1 - rho)^t)."""
    return top_k * tokens / expected_experts(experts, top_k, tokens)


def growth(tokens: float, knee: float, base: float) -> float:
    """G(t; lambda * RP, s): how the time of a matrix product grows with its tokens.

    `base` (s, at least 1) to the power of t up to the `knee` (lambda times the ridge point, in tokens), where memory
    bounds the product, and above it, where arithmetic does, the tangent at the knee.
    """
    if tokens <= knee:
        return float(base**tokens)
    return float(base**knee * (1 + math.log(base) * (tokens - knee)))


def tokens_per_cycle(alpha: float, gamma: int) -> float:
    """sigma * (gamma + 1): tokens that a cycle gives a sequence on the average, the verification's own included.

    sigma = [(1 - alpha^(gamma+1)) / (1 - alpha)] / (gamma + 1), for drafts in a chain whose every token is accepted
    with probability `alpha` where the ones before it were.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"a probability of acceptance is from 0 to 1, not {alpha}")
    return sum(alpha**depth for depth in range(gamma + 1))


def target_efficiency(plain: float, verify: float) -> float:
    """T_T(B, 1) / T_T(B, gamma): what is left of the target's speed when it verifies; 1 where that costs nothing."""
    return plain / verify


def speedup(tokens: float, plain: float, draft: float, verify: float, reject: float) -> float:
    """sigma * (gamma + 1) * T_AR / (gamma * T_D + T_verify + T_rej): tokens a second with drafts over those without.

    `tokens` are those of a cycle (see `tokens_per_cycle`), the others seconds: of a plain step, of all the drafting
    of a cycle, of its verification, and of choosing and taking back.
    """
    return tokens * plain / (draft + verify + reject)
