"""Drafting for a batch: proposes each step's drafts and learns from what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgemoe.draft.controller import Controllers
from edgemoe.draft.ngram_drafters import NgramDrafters
from edgemoe.draft.pass_drafter import PassDrafter
from edgemoe.draft.proposal import Proposal, StepReport, Verified
from edgemoe.draft.proposer import SHARE_BINS, DraftProposer
from edgemoe.draft.settings import DraftSettings
from edgemoe.draft.step_cost import CycleCost
from edgemoe.experts.expert_predictor import ExpertPredictor
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.model_runner import ModelRunner
from edgemoe.prefetch.calibration import CalibratedRates
from edgemoe.request.request import Request

WIDTH = 4
"""Most children of a tree's node, and most nodes that a drafting pass runs for each sequence."""
MAX_PROMPT_TOKENS = 2
"""Prompt tokens in a step, for each sequence that decodes, up to which its time says what a token costs."""


@dataclass
class SpeculationTotals:
    """What was drafted and what came of it, since the engine was loaded."""

    cycles: int = 0
    """Verifications of at least one drafted token, each of one sequence."""
    drafted: int = 0
    accepted: int = 0
    """Drafted tokens that are in a reply."""
    drafted_by: Counter[str] = field(default_factory=Counter)
    """`drafted` by the drafter that proposed the token."""
    accepted_by: Counter[str] = field(default_factory=Counter)
    """`accepted` likewise."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    """Passes that verified something, whatever else they computed."""


class Speculation:
    """Proposes drafts and learns which ones pay. Used by one thread at a time; `telemetry` from any.

    A step calls `propose`, runs and verifies the proposal, and calls `learn` with it, or `abandon` where it failed.
    Between steps only rates, costs and settings are kept.
    """

    def __init__(
        self,
        settings: DraftSettings,
        runner: ModelRunner,
        passes: PassDrafter | None,
        predictor: ExpertPredictor,
        guess: Callable[[int], float] | None = None,
    ) -> None:
        """`passes` runs drafting passes, or nothing does. `guess` is the cost that `CycleCost` begins with."""
        self.totals = SpeculationTotals()
        self.active = bool(settings.drafters and runner.verifies)
        """Whether anything drafts, and the model can verify it."""
        self.reason = f"off: {runner.refusal}" if settings.drafters and not self.active else settings.describe()
        """What drafts, or why nothing does."""
        self.max_nodes = settings.nodes
        """Most nodes of a draft tree."""
        chains = "chain" in (runner.verifies, settings.shape)
        self._controllers = Controllers(settings, 1 if chains else WIDTH, lambda: not predictor.complete)
        self._costs = CycleCost(guess)
        # The acceptance rate of each bin of shares is at first the share itself.
        self._calibration = CalibratedRates([(number + 0.5) / SHARE_BINS for number in range(SHARE_BINS)])
        self._ngrams = NgramDrafters()
        self._passes = passes
        self._predictor = predictor
        self._proposer: DraftProposer | None = DraftProposer(
            settings, self._controllers, self._costs, self._calibration, self._ngrams, passes, predictor
        )

    def telemetry(self) -> dict[str, Any]:
        """What `Stats` tells of it, by name. May be called while a step runs."""
        controllers = self._controllers
        totals = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self.totals).items()}
        return totals | {
            "speculation": self.reason,
            "speculation_setting": controllers.describe() if self.active else self.reason,
            "speculation_changes": controllers.changes,
            "utility": controllers.utility,
        }

    def propose(self, limits: Mapping[Request, int], *, mixed: bool = False) -> Proposal:
        """The drafts of a step, at most `limits` nodes for each request that decodes. See `DraftProposer.propose`."""
        if not limits or not self.active or self._proposer is None:
            return Proposal()
        proposal = self._proposer.propose(limits, mixed=mixed)
        self.totals.draft_seconds += proposal.seconds
        return proposal

    def learn(self, proposal: Proposal, report: StepReport) -> None:
        """Learns from a step that ran `proposal`: acceptance rates, what tokens cost, and what drafting is worth."""
        for request, verified in report.verified.items():
            self._learn_path(proposal.trees[request], proposal.bins[request], verified)
            self._count(proposal.drafters.get(request, {}), verified)
        if report.verified:
            self.totals.verify_seconds += report.seconds
        made = {request: verified.tokens for request, verified in report.verified.items()}
        if self._passes is not None and proposal.passed:
            tokens = sum(made.get(request, 1) for request in proposal.passed)
            self._passes.observe(tokens, proposal.seconds + report.seconds)
        # With long prompts in the step its time does not tell what drafts have cost.
        comparable = report.prompt_tokens <= MAX_PROMPT_TOKENS * report.sequences
        if proposal.cost is not None:
            plain_steps = None
            if comparable and proposal.cost.seconds:
                spent = proposal.seconds + report.seconds - report.prompt_tokens * proposal.cost.token
                plain_steps = max(0.0, spent) / proposal.cost.seconds
            self._controllers.stepped(proposal.nodes, made, plain_steps)
        if comparable:
            self._costs.observe_step(report.sequences, report.tokens, report.seconds, report.waited)
        self._predictor.end_cycle()

    def abandon(self) -> None:
        """A step failed: what was predicted for it is not held against the next one."""
        self._predictor.end_cycle()

    def forget(self, request: Request) -> None:
        """Drops the state of a finished or preempted request.

        A finished one's last tokens still enter the reply memory at the next step.
        """
        if request.finished:
            self._ngrams.finish(request)
            self._controllers.forget(request)
        if self._passes is not None:
            self._passes.forget(request)

    def close(self) -> None:
        """Lets go of the models that draft, and of what was read."""
        self._passes = self._proposer = None
        self._ngrams.clear()

    def _count(self, drafters: Mapping[int, str], verified: Verified) -> None:
        """Counts a tree's nodes for the drafters that proposed them."""
        for node, drafter in drafters.items():
            self.totals.drafted_by[drafter] += 1
            self.totals.accepted_by[drafter] += node in verified.path

    def _learn_path(self, tree: DraftTree, bins: Mapping[int, int], verified: Verified) -> None:
        self.totals.cycles += 1
        self.totals.drafted += tree.drafted
        self.totals.accepted += len(verified.path) - 1
        accepted, heard = set(verified.path), set(verified.path[: verified.tokens])
        for node, number in bins.items():
            # The model judged a node only where it accepted the parent.
            if tree.parents[node] in heard:
                self._calibration.observe(number, node in accepted)
