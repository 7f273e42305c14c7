"""Builds the draft trees of a step: n-grams first, which cost nothing, then a drafter that runs passes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from edgemoe.draft.controller import Controllers
from edgemoe.draft.ngram_drafters import NgramDrafters
from edgemoe.draft.pass_drafter import Branch, PassDrafter
from edgemoe.draft.proposal import Proposal
from edgemoe.draft.settings import DraftSettings
from edgemoe.draft.step_cost import CycleCost, StepCost
from edgemoe.draft.tree_builder import TreeBuilder
from edgemoe.experts.expert_predictor import ExpertPredictor
from edgemoe.model.draft_tree import Candidate, DraftTree
from edgemoe.model.pass_logits import LogitsRows
from edgemoe.prefetch.calibration import CalibratedRates
from edgemoe.request.request import Request

MIN_PROBABILITY = 0.02
"""Path probability below which nothing is drafted, however many nodes are allowed."""
MIN_CHAIN_PROBABILITY = 0.5
"""Path probability below which n-grams leave a chain's next node to a drafter that runs passes."""
MARGIN = 1.4
"""Worth over cost from which a priced node is drafted: both are estimates."""
TOLERANCE = 1e-6
"""Rounding of sums, in plain steps."""
SHARE_BINS = 10
"""Bins of a drafted token's share of the softmax, each with its own acceptance rate."""


class DraftPrice(NamedTuple):
    """What a drafted token costs in a step, and what it is worth, both in seconds (the rule of S2-MoE)."""

    priced: bool
    """Whether a node must be worth its cost."""
    step: StepCost
    worth: float
    """Seconds that an accepted token saves: a plain step's time for one sequence."""
    load_seconds: float
    """Seconds that a pass waits for one missing expert."""

    def pays(self, probability: float, drafted: int, loads: int | None = None) -> bool:
        """Whether a node with this path probability is worth its cost in a tree of `drafted` nodes.

        `loads` is the number of experts that the node is likely to add to those resident or needed already; None
        where it is not known, and the average cost of a token is taken.
        """
        if probability < MIN_PROBABILITY:
            return False
        if not self.priced:
            return True
        step = self.step
        cost = step.next_token(drafted) if loads is None else step.computing + loads * self.load_seconds
        return 0 < MARGIN * cost <= probability * self.worth

    def best_size(self, tree: DraftTree) -> int:
        """The number of nodes, the first ones of the tree, that gain most: nodes may be taken for more to come.

        0 where no number of them is worth its cost.
        """
        if not self.priced:
            return tree.drafted
        gains, gain = [0.0], 0.0
        for nodes, probability in enumerate(tree.probabilities[1:], start=1):
            gain += probability * self.worth
            gains.append(gain - MARGIN * self.step.extra(nodes))
        # Rounding must not cut a tree off whose nodes all cost the same.
        best = max(gains)
        return max(nodes for nodes, each in enumerate(gains) if each >= best - TOLERANCE * self.worth)


class DraftProposer:
    """Builds trees within each sequence's setting. Where nodes are priced, a node is added only while it pays."""

    def __init__(
        self,
        settings: DraftSettings,
        controllers: Controllers,
        costs: CycleCost,
        calibration: CalibratedRates,
        ngrams: NgramDrafters,
        passes: PassDrafter | None,
        predictor: ExpertPredictor,
    ) -> None:
        """`calibration` has a rate for each of `SHARE_BINS`; whoever learns updates it, `controllers` and `costs`."""
        self._settings = settings
        self._controllers = controllers
        self._costs = costs
        self._calibration = calibration
        self._ngrams = ngrams
        self._passes = passes
        self._predictor = predictor

    def propose(self, limits: Mapping[Request, int], *, mixed: bool) -> Proposal:
        """The drafts of a step, at most `limits` nodes for each request. `mixed`: the step runs parts of prompts too.

        Drafting passes append to KV caches and roll back. Predicted experts may be on the link afterwards.
        """
        started = time.perf_counter()
        step = self._costs.of(len(limits))
        price = DraftPrice(self._settings.priced, step, step.seconds / len(limits), self._predictor.load_seconds)
        # A plain step is measured without drafts and without prompts.
        builders = [] if self._settings.priced and not mixed and step.is_due() else self._builders(limits)
        if "ngram" in self._settings.drafters:
            self._ngrams.read(limits)
            for builder in builders:
                self._add_ngrams(builder, price)
        passed = self._add_by_passes(builders, price)
        for builder in builders:
            if builder.request not in passed:
                builder.tree.truncate(price.best_size(builder.tree))
        nodes = dict.fromkeys(limits, 0)
        # A pass takes its time also where it finds nothing that is worth drafting.
        nodes |= {each.request: max(each.tree.drafted, each.request in passed) for each in builders}
        return Proposal(
            trees={each.request: each.tree for each in builders if each.tree.drafted},
            bins={each.request: each.bins for each in builders},
            drafters={
                each.request: {node: name for node, name in each.drafters.items() if node < len(each.tree)}
                for each in builders
            },
            nodes=nodes,
            passed=passed,
            cost=step,
            seconds=time.perf_counter() - started,
        )

    def _builders(self, limits: Mapping[Request, int]) -> list[TreeBuilder]:
        """A builder for each request that is drafted for now."""
        settings = ((request, limit, self._controllers.setting(request)) for request, limit in limits.items())
        return [
            TreeBuilder(request, min(limit, self._settings.nodes), setting)
            for request, limit, setting in settings
            if setting is not None
        ]

    def _add_ngrams(self, builder: TreeBuilder, price: DraftPrice) -> None:
        # A chain has one node at each depth: an unlikely one is left to the drafter that comes next.
        passes = self._passes if builder.passes else None
        shared = passes is not None and (builder.chain or passes.takes_over)
        frontier = self._ngrams.frontier(
            builder.request,
            builder.tree,
            branching=not builder.chain,
            max_depth=builder.max_depth,
            min_probability=MIN_CHAIN_PROBABILITY if shared else MIN_PROBABILITY,
        )
        while not builder.full and (best := frontier.best()) is not None:
            if not price.pays(best.probability, builder.tree.drafted):
                break
            builder.add(best)

    # --- drafting passes ---------------------------------------------------------------------------

    def _add_by_passes(self, builders: Sequence[TreeBuilder], price: DraftPrice) -> frozenset[Request]:
        """Rounds of drafting passes while they pay; the requests that they were run for."""
        passes = self._passes
        if passes is None:
            return frozenset()
        begun = [each for each in builders if each.passes and not each.full and passes.takes(each.request)]
        growing = [(each, [0]) for each in begun]
        if not growing or not self._round_pays(growing, price):
            return frozenset()
        self._predictor.begin_cycle()
        try:
            passes.begin([builder.request for builder in begun])
            growing = self._growing(passes, begun)
            while growing and self._round_pays(growing, price):
                self._round(passes, growing, price)
                growing = self._growing(passes, begun)
            self._run_leaves(passes, [each for each in begun if each.unexpanded and each.tree.drafted])
        finally:
            passes.end()
        return frozenset(builder.request for builder in begun)

    @staticmethod
    def _growing(passes: PassDrafter, builders: Sequence[TreeBuilder]) -> list[tuple[TreeBuilder, list[int]]]:
        """The builders that a round is for, each with the nodes to run."""
        found = []
        for builder in builders:
            nodes = [node for node in builder.unexpanded if passes.can_run(builder.request, builder.tree, node)]
            if any(map(builder.fits, nodes)):
                found.append((builder, nodes))
        return found

    def _round(self, passes: PassDrafter, growing: Sequence[tuple[TreeBuilder, list[int]]], price: DraftPrice) -> None:
        """Runs the nodes of each builder and adds their best children."""
        started = time.perf_counter()
        logits = passes.run([Branch(builder.request, builder.tree, nodes) for builder, nodes in growing])
        self._costs.observe_draft(len(growing), time.perf_counter() - started)
        self._add_predictions(passes, growing)
        for (builder, nodes), after in zip(growing, logits, strict=True):
            self._propose_children(builder, nodes, after, passes.name)
            builder.unexpanded = [node for node in builder.unexpanded if node not in nodes]
            # Exactly the width: a candidate that is taken out is not proposed again.
            for candidate in islice(builder.best_proposals(), builder.width):
                if not price.pays(candidate.probability, builder.tree.drafted, builder.loads.get(candidate.parent)):
                    break
                builder.add(candidate)

    def _run_leaves(self, passes: PassDrafter, builders: list[TreeBuilder]) -> None:
        """Runs the last nodes for their routing alone, where cycles wait for the link more than they compute."""
        if builders and passes.predicts_experts and self._predictor.link_bound:
            leaves = [(builder, builder.unexpanded) for builder in builders]
            passes.run([Branch(builder.request, builder.tree, nodes) for builder, nodes in leaves])
            self._add_predictions(passes, leaves)

    def _propose_children(self, builder: TreeBuilder, nodes: Sequence[int], logits: LogitsRows, drafter: str) -> None:
        """Proposes what may follow `nodes`, given the logits of `drafter` after each."""
        tree = builder.tree
        for node, after in zip(nodes, logits, strict=True):
            if node and tree.tokens[node] in builder.request.ends:
                continue
            for token, share in builder.request.candidates(tree, node, after, builder.width):
                number = min(int(share * SHARE_BINS), SHARE_BINS - 1)
                path = tree.probabilities[node] * self._calibration.rate(number)
                builder.propose(Candidate(node, token, path, number, drafter))

    def _round_pays(self, growing: Sequence[tuple[TreeBuilder, list[int]]], price: DraftPrice) -> bool:
        """Whether one more drafting pass is likely to save more time than it takes, with the tokens that it gives.

        Where n-grams have drafted what comes next, passes may be needed until one gives a new token, which pays for
        all of them.
        """
        if not price.priced:
            return True
        gain, rate = 0.0, self._calibration.rate(SHARE_BINS - 1)
        for builder, nodes in growing:
            cost = MARGIN * price.step.next_token(builder.tree.drafted)
            gains = (
                ((builder.tree.probabilities[node] * rate - covered) * price.worth - cost) / passes
                for node, covered, passes in builder.openings(nodes)
            )
            gain += max(0.0, max(gains, default=0.0))
        return self._costs.draft_pays(len(growing), gain)

    def _add_predictions(self, passes: PassDrafter, growing: Sequence[tuple[TreeBuilder, Sequence[int]]]) -> None:
        """Predicts the experts of the nodes that were just run, and counts those that each node adds.

        A child needs much of what its parent needs, so the count prices the children.
        """
        if not passes.predicts_experts:
            return
        nodes = [(builder, node) for builder, own in growing for node in own]
        certain = torch.tensor([builder.tree.probabilities[node] for builder, node in nodes])
        loads = torch.zeros(len(nodes), dtype=torch.long)
        for layer, wanted in enumerate(passes.wanted):
            loads += self._predictor.add_prediction(layer, wanted, certain)
        for (builder, node), count in zip(nodes, loads.tolist(), strict=True):
            builder.loads[node] = count
        self._predictor.issue()
