"""Drafting for a batch: grows every sequence's tree, says which experts its verification will want, and learns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from edgemoe.controllers import Controllers
from edgemoe.cycle_cost import CycleCost
from edgemoe.decoder import Work
from edgemoe.draft_settings import DraftSettings
from edgemoe.draft_tree import Candidate, DraftTree
from edgemoe.foresight import Foresight
from edgemoe.generation import Generation
from edgemoe.growth import Growth
from edgemoe.hit_rates import HitRates
from edgemoe.joint_decoder import JointDecoder
from edgemoe.ngram_drafter import NgramCalibration, NgramDrafter
from edgemoe.pass_drafter import Branch, PassDrafter
from edgemoe.reply_memory import ReplyMemory

WIDTH = 4
"""Tokens that may follow a node, and nodes that a drafting pass runs for each sequence, in a tree."""
LEAST_PROBABILITY = 0.02
"""Path probability below which nothing is drafted, however much room there is ..."""
LIKELY = 0.5
"""... and below which n-grams leave a chain to a drafter that runs passes."""
MARGIN = 1.4
"""How many times its cost a priced node must be worth: prices and probabilities are estimates."""
MOST_PROMPTS = 2
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
        decoder: JointDecoder,
        passes: PassDrafter | None,
        foresight: Foresight,
        guess: Callable[[int], float] | None = None,
    ) -> None:
        """`guess` is what `CycleCost` begins with."""
        self.totals = SpeculationTotals()
        self.reason = settings.describe()
        """What drafts, or why nothing does."""
        self._settings = settings
        self._decoder = decoder
        self._passes = passes
        self._foresight = foresight
        self._cost = CycleCost(guess)
        self._plain = self._cost.of(1)
        self._ngrams: dict[Generation, NgramDrafter] = {}
        self._over: list[Generation] = []
        self._ngram_rates = NgramCalibration()
        self._replies = ReplyMemory()
        # How often a drafted token of each bin is the one: at first what its share says.
        self._shares = HitRates([(number + 0.5) / SHARE_BINS for number in range(SHARE_BINS)])
        self._bins: dict[DraftTree, dict[int, int]] = {}
        self._made: dict[Generation, int] = {}
        self._drafted: dict[Generation, int] = {}
        self._ran: set[Generation] = set()
        self._draft_seconds = 0.0
        self._controllers: Controllers | None = None

    @property
    def active(self) -> bool:
        """Whether anything drafts, and the model can take drafts back; the first look may try that on the model."""
        if not self._settings.drafters:
            return False
        if not self._decoder.verifies:
            self.reason = f"off: {self._decoder.refusal}"
        return bool(self._decoder.verifies)

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
    def most_nodes(self) -> int:
        """Nodes that a tree gets at most."""
        return self._settings.nodes

    def grow(self, rooms: Mapping[Generation, int], *, mixed: bool = False) -> dict[Generation, DraftTree]:
        """A tree for each sequence with at least one node drafted; `rooms` are the most nodes of each.

        `mixed` says that the step will run parts of prompts too.
        """
        if not rooms or not self.active:
            return {}
        started = time.perf_counter()
        self._drafted, self._made, self._ran = dict.fromkeys(rooms, 0), {}, set()
        self._plain = self._cost.of(len(rooms))
        # A plain step is measured without drafts and without prompts.
        growths = [] if self._settings.priced and not mixed and self._plain.is_due() else self._growths(rooms)
        worth = self._plain.seconds / len(rooms)
        if "ngram" in self._settings.drafters:
            self._read(rooms)
            for growth in growths:
                self._grow_ngrams(growth, worth)
        passes = self._passes
        if passes is not None:
            open_ = [each for each in growths if each.passes and not each.full and passes.takes(each.generation)]
            self._grow_by_passes(passes, open_, worth)
        self._bins = {growth.tree: growth.bins for growth in growths}
        # Passes that found nothing worth drafting took their time all the same.
        self._drafted |= {each.generation: max(each.tree.drafted, each.generation in self._ran) for each in growths}
        self._draft_seconds = time.perf_counter() - started
        self.totals.draft_seconds += self._draft_seconds
        return {growth.generation: growth.tree for growth in growths if growth.tree.drafted}

    def _growths(self, rooms: Mapping[Generation, int]) -> list[Growth]:
        """A tree to be grown for each sequence that is to be drafted for, within its setting."""
        if self._controllers is None:
            chains = "chain" in (self._decoder.verifies, self._settings.shape)
            self._controllers = Controllers(self._settings, 1 if chains else WIDTH)
        found = []
        for generation, room in rooms.items():
            setting = self._controllers.setting(generation)
            if setting is not None:
                found.append(Growth(generation, min(room, self._settings.nodes), setting))
        return found

    def learn(self, generation: Generation, tree: DraftTree, path: Sequence[int], made: int) -> None:
        """`path` are the nodes of `tree` that the reply has, root first; after the first `made` the model was heard."""
        self._made[generation] = made
        self.totals.cycles += 1
        self.totals.drafted += tree.drafted
        self.totals.accepted += len(path) - 1
        there, heard = set(path), set(path[:made])
        for node, number in self._bins.pop(tree, {}).items():
            # Only below what was accepted did the model say whether a node is right.
            if tree.parents[node] in heard:
                self._shares.saw(number, node in there)

    def stepped(self, work: Sequence[Work], verified: bool, seconds: float, waited: float) -> None:
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
        comparable = prompts <= MOST_PROMPTS * len(decoding)
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
        self._foresight.end_cycle()

    def forget(self, generation: Generation) -> None:
        """`generation` is over, or has lost its place: what it wrote last is learnt from, with what others write."""
        if generation.finished and generation in self._ngrams and generation not in self._over:
            self._over.append(generation)
        if generation.finished and self._controllers is not None:
            self._controllers.forget(generation)
        if self._passes is not None:
            self._passes.forget(generation)

    def close(self) -> None:
        """Lets go of the models that draft, and of what was written."""
        del self._decoder
        self._passes = None
        self._ngrams.clear()
        self._over.clear()
        self._replies = ReplyMemory()

    # --- n-grams -----------------------------------------------------------------------------------

    def _read(self, running: Iterable[Generation]) -> None:
        """Every sequence's drafter reads what it wrote, also those that are not drafted for now."""
        generations = [*self._over, *running]
        for generation in generations:
            drafter = self._ngrams.get(generation)
            if drafter is None:
                drafter = self._ngrams[generation] = NgramDrafter(self._ngram_rates, generation.ends, self._replies)
                drafter.read(generation.tokens[: generation.prompt_length])
            drafter.learn(generation.tokens[len(drafter) :])
        for generation in generations:
            self._ngrams[generation].tell()
        for generation in self._over:
            del self._ngrams[generation]
        self._over.clear()

    def _grow_ngrams(self, growth: Growth, worth: float) -> None:
        # In a chain there is room for one: what is less likely than not is left to the drafter that comes next.
        shared = growth.chain and growth.passes and self._passes is not None
        frontier = self._ngrams[growth.generation].frontier(
            growth.tree,
            branching=not growth.chain,
            most_depth=growth.most_depth,
            least_probability=LIKELY if shared else LEAST_PROBABILITY,
        )
        while not growth.full and (best := frontier.best()) is not None and self._pays(best.probability, worth):
            growth.add(best)

    # --- passes ------------------------------------------------------------------------------------

    def _grow_by_passes(self, passes: PassDrafter, growths: list[Growth], worth: float) -> None:
        if not growths or not self._round_pays(growths, worth):
            return
        self._foresight.begin_cycle()
        self._ran = {growth.generation for growth in growths}
        try:
            passes.begin([growth.generation for growth in growths])
            growing = self._round(passes, growths, worth)
            while growing and self._round_pays(growing, worth):
                growing = self._round(passes, growing, worth)
            self._run_leaves(passes, [growth for growth in growths if growth.fresh and growth.tree.drafted])
        finally:
            passes.end()

    def _round(self, passes: PassDrafter, growths: list[Growth], worth: float) -> list[Growth]:
        """Runs what is fresh and adds the best of what follows; the growths that have something fresh again."""
        started = time.perf_counter()
        branches = [Branch(growth.generation, growth.tree, growth.fresh) for growth in growths]
        logits = passes.run(branches)
        self._cost.saw_draft(len(growths), time.perf_counter() - started)
        self._foretell(passes, growths)
        for growth, after in zip(growths, logits, strict=True):
            self._offer(growth, after)
            growth.fresh = []
            # Not one more: what is taken out is not offered again.
            for candidate in islice(growth.best_offers(), growth.width):
                if not self._pays(candidate.probability, worth, growth.loads.get(candidate.parent)):
                    break
                growth.add(candidate)
        return [growth for growth in growths if any(map(growth.fits, growth.fresh))]

    def _run_leaves(self, passes: PassDrafter, growths: list[Growth]) -> None:
        """Runs what is still fresh for its routing alone, where cycles wait for the link more than for anything."""
        if growths and passes.foretells and self._foresight.link_bound:
            branches = [Branch(growth.generation, growth.tree, growth.fresh) for growth in growths]
            passes.run(branches)
            self._foretell(passes, growths)

    def _offer(self, growth: Growth, logits: torch.Tensor) -> None:
        """Offers what may follow the fresh nodes, given the logits after each of them."""
        tree = growth.tree
        for node, after in zip(growth.fresh, logits, strict=True):
            if node and tree.tokens[node] in growth.generation.ends:
                continue
            for token, share in growth.generation.candidates(tree, node, after, growth.width):
                number = min(int(share * SHARE_BINS), SHARE_BINS - 1)
                path = tree.probabilities[node] * self._shares.rate(number)
                growth.offer(Candidate(node, token, path, number))

    def _round_pays(self, growths: list[Growth], worth: float) -> bool:
        if not self._settings.priced:
            return True
        gain = sum(max(growth.tree.probabilities[node] for node in growth.fresh) for growth in growths) * worth
        return self._cost.draft_pays(len(growths), gain * self._shares.rate(SHARE_BINS - 1))

    def _pays(self, probability: float, worth: float, loads: int | None = None) -> bool:
        """Whether a node is worth more than it costs: S2-MoE's rule, with measured seconds on both sides.

        `loads` are the experts that it is likely to add to those that are resident or wanted already, where that is
        known; else it is taken to cost what nodes did on the average.
        """
        if probability < LEAST_PROBABILITY:
            return False
        if not self._settings.priced:
            return True
        cost = self._plain.token
        if loads is not None:
            cost = self._plain.computing + loads * self._foresight.load_seconds
        return 0 < MARGIN * cost <= probability * worth

    def _foretell(self, passes: PassDrafter, growths: Sequence[Growth]) -> None:
        """Tells the foresight which experts the nodes that were just run want, and notes which of these are new.

        Text that follows a node wants much of what the node wants, so that this prices the node's children.
        """
        if not passes.foretells:
            return
        nodes = [(growth, node) for growth in growths for node in growth.fresh]
        certain = torch.tensor([growth.tree.probabilities[node] for growth, node in nodes])
        loads = torch.zeros(len(nodes), dtype=torch.long)
        for layer, wanted in enumerate(passes.wanted):
            loads += self._foresight.foretell(layer, wanted, certain)
        for (growth, node), count in zip(nodes, loads.tolist(), strict=True):
            growth.loads[node] = count
        self._foresight.bring()
