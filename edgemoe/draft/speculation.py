"""Drafting for a batch: grows every sequence's tree, says which experts its verification will want, and learns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from edgemoe.draft.controller import Controllers
from edgemoe.draft.ngram_drafter import NgramCalibration, NgramDrafter
from edgemoe.draft.pass_drafter import Branch, PassDrafter
from edgemoe.draft.reply_memory import ReplyMemory
from edgemoe.draft.settings import DraftSettings
from edgemoe.draft.step_cost import CycleCost
from edgemoe.draft.tree_builder import TreeBuilder
from edgemoe.experts.expert_predictor import ExpertPredictor
from edgemoe.model.draft_tree import Candidate, DraftTree
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.sequential_runner import PassInput
from edgemoe.prefetch.calibration import CalibratedRates
from edgemoe.request.request import Request

WIDTH = 4
"""Tokens that may follow a node, and nodes that a drafting pass runs for each sequence, in a tree."""
MIN_PROBABILITY = 0.02
"""Path probability below which nothing is drafted, however much room there is ..."""
LIKELY = 0.5
"""... and below which n-grams leave a chain to a drafter that runs passes."""
MARGIN = 1.4
"""How many times its cost a priced node must be worth: prices and probabilities are estimates."""
MAX_PROMPTS = 2
"""Tokens of prompts in a step, for each sequence that decodes, up to which its time tells what tokens cost."""
SHARE_BINS = 10
"""Bins of how far a drafted token stands out among the others."""


@dataclass
class SpeculationTotals:
    """What was drafted and what came of it, since the engine was loaded."""

    cycles: int = 0
    """Verifications of at least one drafted token, each of one sequence."""
    drafted: int = 0
    accepted: int = 0
    """Drafted tokens that are in a reply."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    """Passes that verified something, whatever else they computed."""


class Speculation:
    """Grows draft trees and learns from what became of them. Used by one thread at a time.

    The trees of a step: n-grams first, which cost nothing, then rounds of the drafter that runs passes, where there
    is one. Where nodes are priced, one is added only while its path probability, times what a token is worth, is
    more than what it adds to the step.
    """

    def __init__(
        self,
        settings: DraftSettings,
        runner: ModelRunner,
        passes: PassDrafter | None,
        predictor: ExpertPredictor,
        guess: Callable[[int], float] | None = None,
    ) -> None:
        """`guess` is what `CycleCost` begins with."""
        self.totals = SpeculationTotals()
        self.reason = settings.describe()
        """What drafts, or why nothing does."""
        self._settings = settings
        self._runner = runner
        self._passes = passes
        self._predictor = predictor
        self._cost = CycleCost(guess)
        self._plain = self._cost.of(1)
        self._ngrams: dict[Request, NgramDrafter] = {}
        self._over: list[Request] = []
        self._ngram_rates = NgramCalibration()
        self._replies = ReplyMemory()
        # How often a drafted token of each bin is the one: at first what its share says.
        self._calibration = CalibratedRates([(number + 0.5) / SHARE_BINS for number in range(SHARE_BINS)])
        self._bins: dict[DraftTree, dict[int, int]] = {}
        self._made: dict[Request, int] = {}
        self._drafted: dict[Request, int] = {}
        self._ran: set[Request] = set()
        self._draft_seconds = 0.0
        self._controllers: Controllers | None = None

    @property
    def active(self) -> bool:
        """Whether anything drafts, and the model can take drafts back; the first look may try that on the model."""
        if not self._settings.drafters:
            return False
        if not self._runner.verifies:
            self.reason = f"off: {self._runner.refusal}"
        return bool(self._runner.verifies)

    def telemetry(self) -> dict[str, Any]:
        """What `Stats` tells of it, by name. May be called while a step runs."""
        controllers = self._controllers
        return vars(self.totals) | {
            "speculation": self.reason,
            "speculation_setting": controllers.describe() if controllers else self.reason,
            "speculation_changes": controllers.changes if controllers else 0,
            "utility": controllers.utility if controllers else float(self._settings.priced),
        }

    @property
    def max_nodes(self) -> int:
        """Nodes that a tree gets at most."""
        return self._settings.nodes

    def grow(self, rooms: Mapping[Request, int], *, mixed: bool = False) -> dict[Request, DraftTree]:
        """A tree for each sequence with at least one node drafted; `rooms` are the most nodes of each.

        `mixed` says that the step will run parts of prompts too.
        """
        if not rooms or not self.active:
            return {}
        started = time.perf_counter()
        self._drafted, self._made, self._ran = dict.fromkeys(rooms, 0), {}, set()
        self._plain = self._cost.of(len(rooms))
        # A plain step is measured without drafts and without prompts.
        builders = [] if self._settings.priced and not mixed and self._plain.is_due() else self._builders(rooms)
        worth = self._plain.seconds / len(rooms)
        if "ngram" in self._settings.drafters:
            self._read(rooms)
            for builder in builders:
                self._grow_ngrams(builder, worth)
        passes = self._passes
        if passes is not None:
            open_ = [each for each in builders if each.passes and not each.full and passes.takes(each.request)]
            self._grow_by_passes(passes, open_, worth)
        self._bins = {builder.tree: builder.bins for builder in builders}
        # Passes that found nothing worth drafting took their time all the same.
        self._drafted |= {each.request: max(each.tree.drafted, each.request in self._ran) for each in builders}
        self._draft_seconds = time.perf_counter() - started
        self.totals.draft_seconds += self._draft_seconds
        return {builder.request: builder.tree for builder in builders if builder.tree.drafted}

    def _builders(self, rooms: Mapping[Request, int]) -> list[TreeBuilder]:
        """A tree to be grown for each sequence that is to be drafted for, within its setting."""
        if self._controllers is None:
            chains = "chain" in (self._runner.verifies, self._settings.shape)
            self._controllers = Controllers(self._settings, 1 if chains else WIDTH)
        found = []
        for request, room in rooms.items():
            setting = self._controllers.setting(request)
            if setting is not None:
                found.append(TreeBuilder(request, min(room, self._settings.nodes), setting))
        return found

    def learn(self, request: Request, tree: DraftTree, path: Sequence[int], made: int) -> None:
        """`path` are the nodes of `tree` that the reply has, root first; after the first `made` the model was heard."""
        self._made[request] = made
        self.totals.cycles += 1
        self.totals.drafted += tree.drafted
        self.totals.accepted += len(path) - 1
        there, heard = set(path), set(path[:made])
        for node, number in self._bins.pop(tree, {}).items():
            # Only below what was accepted did the model say whether a node is right.
            if tree.parents[node] in heard:
                self._calibration.saw(number, node in there)

    def stepped(self, work: Sequence[PassInput], verified: bool, seconds: float, waited: float) -> None:
        """A step ran `work` in `seconds`, `waited` of them for the link; `verified`: there was a draft in it.

        What became of the tokens is part of these seconds; drafting is not, which came before.
        """
        if verified:
            self.totals.verify_seconds += seconds
        if self._passes is not None and self._ran:
            self._passes.saw(sum(self._made.get(each, 1) for each in self._ran), self._draft_seconds + seconds)
        decoding = [item for item in work if item.every or len(item.tokens) == 1]
        tokens = sum(len(item.tokens) for item in work)
        prompts = tokens - sum(len(item.tokens) for item in decoding)
        # With long prompts in the step nobody can tell what drafts have cost.
        comparable = prompts <= MAX_PROMPTS * len(decoding)
        if self._controllers is not None:
            plain_steps = None
            if comparable and self._plain.seconds:
                spent = self._draft_seconds + seconds - prompts * self._plain.token
                plain_steps = max(0.0, spent) / self._plain.seconds
            self._controllers.stepped(self._drafted, self._made, plain_steps)
        if comparable:
            self._cost.saw_step(len(decoding), tokens, seconds, waited)
        self.end_cycle()

    def end_cycle(self) -> None:
        """A step is over, or came to nothing: what was drafted and foretold for it is not held against the next one."""
        self._made, self._drafted, self._ran, self._draft_seconds = {}, {}, set(), 0.0
        self._predictor.end_cycle()

    def forget(self, request: Request) -> None:
        """`request` is over, or has lost its place: what it wrote last is learnt from, with what others write."""
        if request.finished and request in self._ngrams and request not in self._over:
            self._over.append(request)
        if request.finished and self._controllers is not None:
            self._controllers.forget(request)
        if self._passes is not None:
            self._passes.forget(request)

    def close(self) -> None:
        """Lets go of the models that draft, and of what was written."""
        del self._runner
        self._passes = None
        self._ngrams.clear()
        self._over.clear()
        self._replies = ReplyMemory()

    # --- n-grams -----------------------------------------------------------------------------------

    def _read(self, running: Iterable[Request]) -> None:
        """Every sequence's drafter reads what it wrote, also those that are not drafted for now."""
        requests = [*self._over, *running]
        for request in requests:
            drafter = self._ngrams.get(request)
            if drafter is None:
                drafter = self._ngrams[request] = NgramDrafter(self._ngram_rates, request.ends, self._replies)
                drafter.read(request.tokens[: request.prompt_length])
            drafter.learn(request.tokens[len(drafter) :])
        for request in requests:
            self._ngrams[request].tell()
        for request in self._over:
            del self._ngrams[request]
        self._over.clear()

    def _grow_ngrams(self, builder: TreeBuilder, worth: float) -> None:
        # In a chain there is room for one: what is less likely than not is left to the drafter that comes next.
        shared = builder.chain and builder.passes and self._passes is not None
        frontier = self._ngrams[builder.request].frontier(
            builder.tree,
            branching=not builder.chain,
            max_depth=builder.max_depth,
            min_probability=LIKELY if shared else MIN_PROBABILITY,
        )
        while not builder.full and (best := frontier.best()) is not None and self._pays(best.probability, worth):
            builder.add(best)

    # --- passes ------------------------------------------------------------------------------------

    def _grow_by_passes(self, passes: PassDrafter, builders: list[TreeBuilder], worth: float) -> None:
        if not builders or not self._round_pays(builders, worth):
            return
        self._predictor.begin_cycle()
        self._ran = {builder.request for builder in builders}
        try:
            passes.begin([builder.request for builder in builders])
            growing = self._round(passes, builders, worth)
            while growing and self._round_pays(growing, worth):
                growing = self._round(passes, growing, worth)
            self._run_leaves(passes, [builder for builder in builders if builder.unexpanded and builder.tree.drafted])
        finally:
            passes.end()

    def _round(self, passes: PassDrafter, builders: list[TreeBuilder], worth: float) -> list[TreeBuilder]:
        """Runs what is fresh and adds the best of what follows; the growths that have something fresh again."""
        started = time.perf_counter()
        branches = [Branch(builder.request, builder.tree, builder.unexpanded) for builder in builders]
        logits = passes.run(branches)
        self._cost.saw_draft(len(builders), time.perf_counter() - started)
        self._add_predictions(passes, builders)
        for builder, after in zip(builders, logits, strict=True):
            self._propose(builder, after)
            builder.unexpanded = []
            # Not one more: what is taken out is not offered again.
            for candidate in islice(builder.best_proposals(), builder.width):
                if not self._pays(candidate.probability, worth, builder.loads.get(candidate.parent)):
                    break
                builder.add(candidate)
        return [builder for builder in builders if any(map(builder.fits, builder.unexpanded))]

    def _run_leaves(self, passes: PassDrafter, builders: list[TreeBuilder]) -> None:
        """Runs what is still fresh for its routing alone, where cycles wait for the link more than for anything."""
        if builders and passes.predicts_experts and self._predictor.link_bound:
            branches = [Branch(builder.request, builder.tree, builder.unexpanded) for builder in builders]
            passes.run(branches)
            self._add_predictions(passes, builders)

    def _propose(self, builder: TreeBuilder, logits: torch.Tensor) -> None:
        """Offers what may follow the fresh nodes, given the logits after each of them."""
        tree = builder.tree
        for node, after in zip(builder.unexpanded, logits, strict=True):
            if node and tree.tokens[node] in builder.request.ends:
                continue
            for token, share in builder.request.candidates(tree, node, after, builder.width):
                number = min(int(share * SHARE_BINS), SHARE_BINS - 1)
                path = tree.probabilities[node] * self._calibration.rate(number)
                builder.propose(Candidate(node, token, path, number))

    def _round_pays(self, builders: list[TreeBuilder], worth: float) -> bool:
        if not self._settings.priced:
            return True
        gain = sum(max(builder.tree.probabilities[node] for node in builder.unexpanded) for builder in builders) * worth
        return self._cost.draft_pays(len(builders), gain * self._calibration.rate(SHARE_BINS - 1))

    def _pays(self, probability: float, worth: float, loads: int | None = None) -> bool:
        """Whether a node is worth more than it costs: S2-MoE's rule, with measured seconds on both sides.

        `loads` are the experts that it is likely to add to those that are resident or wanted already, where that is
        known; else it is taken to cost what nodes did on the average.
        """
        if probability < MIN_PROBABILITY:
            return False
        if not self._settings.priced:
            return True
        cost = self._plain.token
        if loads is not None:
            cost = self._plain.computing + loads * self._predictor.load_seconds
        return 0 < MARGIN * cost <= probability * worth

    def _add_predictions(self, passes: PassDrafter, builders: Sequence[TreeBuilder]) -> None:
        """Tells the foresight which experts the nodes that were just run want, and notes which of these are new.

        Text that follows a node wants much of what the node wants, so that this prices the node's children.
        """
        if not passes.predicts_experts:
            return
        nodes = [(builder, node) for builder in builders for node in builder.unexpanded]
        certain = torch.tensor([builder.tree.probabilities[node] for builder, node in nodes])
        loads = torch.zeros(len(nodes), dtype=torch.long)
        for layer, wanted in enumerate(passes.wanted):
            loads += self._predictor.add_prediction(layer, wanted, certain)
        for (builder, node), count in zip(nodes, loads.tolist(), strict=True):
            builder.loads[node] = count
        self._predictor.issue()
