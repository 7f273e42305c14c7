"""Runs several sequences at once in the best way that is right for the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from edgemoe.model.draft_tree import DraftTree, TreeMask
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.packed_runner import PackedRunner, turning_points
from edgemoe.model.sequential_runner import PROBE_TOKENS, PassInput, SequentialRunner
from edgemoe.quiet import quiet_transformers


class ModelRunner:
    """One step over any number of sequences, in which every needed expert is acquired once.

    They run packed into one pass where the family allows it, else side by side, meeting at the experts.
    `sequential`, one after the other, is what both are tested against.
    """

    def __init__(self, sequential: SequentialRunner) -> None:
        self.sequential = sequential
        self._packed = PackedRunner(sequential)
        self._verifies: str | None = None
        self.refusal = ""
        """Why nothing can be verified, once `verifies` was asked for and says so."""
        self._turns = turning_points(sequential.model)

    @property
    def vocabulary(self) -> int:
        """Tokens that logits are given for."""
        return int(self.sequential.model.config.get_text_config(decoder=True).vocab_size)

    def rows_within(self, nbytes: int) -> int:
        """How many tokens' logits, as the model gives them and in float32, `nbytes` hold."""
        return nbytes // int((self.sequential.model.dtype.itemsize + torch.float32.itemsize) * self.vocabulary)

    @property
    def packs(self) -> bool:
        """Whether sequences run in one pass; the first look tries it on the model."""
        return self._packed.works()

    @property
    def verifies(self) -> str:
        """What one pass can verify: a "tree", a "chain", or "" where nothing drafted can be taken back.

        The first look tries it on the model, with a few tokens and without experts.
        """
        if self._verifies is None:
            self._verifies = next((shape for shape in ("tree", "chain") if self._verified(shape)), "")
        return self._verifies

    def max_depth(self, tokens: int) -> int | None:
        """How many tokens may be drafted one after the other, behind a past of `tokens` and one more; None is any.

        Where positions are scaled by how long a pass reaches, no draft may take one beyond the turn before its time.
        """
        return min((turn - tokens - 1 for turn in self._turns if turn > tokens), default=None)

    def start(self, capacity: int) -> SequenceCache:
        """An empty sequence with room for `capacity` tokens."""
        return self.sequential.start(capacity)

    def step(self, sequence: SequenceCache, tokens: Sequence[int]) -> torch.Tensor:
        """As `run` for one sequence."""
        return self.run([PassInput(sequence, tokens)])[0]

    def run(self, inputs: Sequence[PassInput]) -> list[torch.Tensor]:
        """Appends each item's tokens to its past; returns each one's last logits, float32 [vocabulary] on the CPU.

        When it raises, the pasts of `inputs` are of no use any more.
        """
        if self.packs:
            return self._packed.run(inputs)
        return self.sequential.run(inputs) if len(inputs) == 1 else self._side_by_side(inputs)

    def _side_by_side(self, inputs: Sequence[PassInput]) -> list[torch.Tensor]:
        with self.sequential.passing(inputs, kind="meeting"), self.sequential.layers.lockstep() as lockstep:
            return lockstep.run([partial(self.sequential.forward, item) for item in inputs])

    def _verified(self, shape: str) -> bool:
        """Whether drafted tokens get the logits that they get one after the other, and leave the same past."""
        sequential = self.sequential
        vocabulary = self.vocabulary
        prompt = [(17 * place + 3) % vocabulary for place in range(PROBE_TOKENS)]
        tree = DraftTree(5 % vocabulary)
        first = tree.add(0, 11 % vocabulary, 1.0)
        if shape == "tree":
            tree.add(0, 13 % vocabulary, 1.0)
        last = tree.add(first, 7 % vocabulary, 1.0)
        tree.add(last, 13 % vocabulary, 1.0)
        cache, other = sequential.start(4 * PROBE_TOKENS), sequential.start(4 * PROBE_TOKENS)
        if not cache.can_roll_back:
            self.refusal = "this family's past has a state that cannot be taken back"
            return False
        self.refusal = "this family does not give several tokens in one pass the logits of one after the other"
        with sequential.layers.silenced(), quiet_transformers():
            try:
                for each in (cache, other):
                    sequential.step(each, prompt)
                cache.mark()
                found = self.run([tree_input(cache, tree, range(len(tree)), [])])[0]
                path = tree.path(last)
                expected = [sequential.step(other, [tree.tokens[node]]) for node in path]
                cache.rollback(len(prompt), path)
                after = self.run([PassInput(cache, [3])])[0]
            except Exception:
                # Whatever a family's forward makes of masks and positions that it was not written for.
                return False
            pairs = [*zip(expected, found[path], strict=True), (sequential.step(other, [3]), after)]
        return all(sequential.agree(*pair) for pair in pairs)


def tree_input(cache: SequenceCache, tree: DraftTree, nodes: Sequence[int], drafted: Sequence[int]) -> PassInput:
    """The pass over `nodes` of `tree`, whose nodes `drafted` have been appended to `cache` already, in that order."""
    order = [*drafted, *nodes]
    tokens = [tree.tokens[node] for node in nodes]
    if order == list(range(len(order))) and tree.is_chain:
        return PassInput(cache, tokens, every=True)
    depths = [tree.depths[node] for node in order]
    seen = tree.ancestry()[list(nodes)][:, order]
    return PassInput(cache, tokens, True, TreeMask(cache.tokens - len(drafted), depths, seen))
