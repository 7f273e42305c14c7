"""The values of one step: what was scheduled, what the pass returned, what was committed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from edgemoe.draft.proposal import Verified
from edgemoe.model.pass_logits import LogitsRows
from edgemoe.model.sequential_runner import PassInput
from edgemoe.request.request import Request


class ScheduledTokens(NamedTuple):
    """The tokens of one request in a step: the next `tokens` ones that its KV cache does not hold."""

    request: Request
    tokens: int


@dataclass(frozen=True)
class ScheduledStep:
    """What a step runs. Valid until the step is committed or fails."""

    parts: Sequence[ScheduledTokens]
    """One for each request; none where there is nothing to run."""
    draft_limits: Mapping[Request, int]
    """Most nodes that may be drafted for each request that decodes; its KV cache has the capacity for them."""

    @property
    def mixed(self) -> bool:
        """Whether the step runs parts of prompts beside the requests that decode."""
        return len(self.draft_limits) < len(self.parts)


@dataclass(frozen=True)
class StepOutputs:
    """What the pass of a step returned."""

    inputs: Sequence[PassInput]
    """One for each part of the step, as it was run."""
    logits: Sequence[LogitsRows]
    """For each input a row, or one for each node where a draft tree was verified."""
    bases: Mapping[Request, int]
    """Tokens in the KV cache before the pass, of requests whose drafts were verified."""
    hits: int
    misses: int
    nbytes_loaded: int
    """Expert bytes that the step moved, its drafts included."""
    link_wait_seconds: float
    lossy: bool
    """Whether verifications ran under a budget on experts."""


@dataclass(frozen=True)
class Committed:
    """What a step gave its requests."""

    tokens: int
    """Tokens that all replies got."""
    verified: Mapping[Request, Verified]
    """For each request whose drafts were verified."""
