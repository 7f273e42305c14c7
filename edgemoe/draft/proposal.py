"""The values that drafting passes on: what was proposed for a step, and what the step said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edgemoe.draft.step_cost import StepCost
from edgemoe.model.draft_tree import DraftTree
from edgemoe.request.request import Request


@dataclass(frozen=True)
class Proposal:
    """The drafts of one step. An empty one is for a step in which nothing may be drafted."""

    trees: Mapping[Request, DraftTree] = field(default_factory=dict)
    """A tree with at least one drafted node for each request whose draft is to be verified."""
    bins: Mapping[Request, Mapping[int, int]] = field(default_factory=dict)
    """For each tree the calibration bin of its nodes, where they have one."""
    drafters: Mapping[Request, Mapping[int, str]] = field(default_factory=dict)
    """For each tree the drafter that proposed each node."""
    nodes: Mapping[Request, int] = field(default_factory=dict)
    """Drafted nodes of every request that might have had a draft; at least 1 where a pass was run for it."""
    passed: frozenset[Request] = frozenset()
    """Requests for which drafting passes were run, whatever came of them."""
    cost: StepCost | None = None
    """What steps for so many requests cost; None in an empty proposal."""
    seconds: float = 0.0
    """Time spent drafting."""


class Verified(NamedTuple):
    """What a verification gave one request."""

    path: Sequence[int]
    """Nodes of its draft tree whose tokens are in the reply, root first."""
    tokens: int
    """Tokens that the reply got; the logits after so many nodes of the path were used."""


class StepReport(NamedTuple):
    """What drafting learns of a step."""

    verified: Mapping[Request, Verified]
    sequences: int
    """Sequences that decode, with or without a draft."""
    tokens: int
    """All tokens of the pass."""
    prompt_tokens: int
    """Tokens of prompts among them."""
    seconds: float
    """Time of the pass and of choosing tokens, without drafting."""
    waited: float
    """Seconds of them in which the pass waited for the link."""
