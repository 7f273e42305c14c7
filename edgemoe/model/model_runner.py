"""Runs passes over any number of sequences, in the best way that is right for the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from edgemoe.cache import accelerator
from edgemoe.checkpoint.draft_head import HEAD
from edgemoe.errors import is_device_or_memory_error
from edgemoe.model.draft_tree import DraftTree, TreeMask
from edgemoe.model.head_runner import HeadRunner, HiddenStates
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.packed_attention import configs_of
from edgemoe.model.packed_runner import PackedRunner
from edgemoe.model.pass_logits import LogitsRows, split_rows
from edgemoe.model.rewind.token_lockstep import TokenLockstep, by_token
from edgemoe.model.rope import rescaling_lengths
from edgemoe.model.sequential_runner import PROBE_TOKENS, PassInput, SequentialRunner, whole_logits
from edgemoe.quiet import quiet_transformers

if TYPE_CHECKING:
    from edgemoe.model.graph_runner import GraphRunner


class ModelRunner:
    """Passes over several sequences, in which every needed expert is acquired once. Holds no sequence itself.

    Sequences run packed into one pass where the family allows it, else in lockstep, side by side. `sequential`, one
    sequence a pass, is the plain form that both are tested against.
    """

    packs: bool
    """Whether sequences share one pass."""
    verifies: str
    """What one pass can verify: a "tree", a "chain", or "" where drafted tokens cannot be taken back."""
    refusal: str
    """Why nothing can be verified; empty where something can."""
    head_refusal: str = ""
    """Why the model's own draft head cannot be run; empty where it can, or there is none."""

    def __init__(self, sequential: SequentialRunner) -> None:
        """Probes what the model can do, with a few tokens and without experts.

        Raises what the device or the memory raises meanwhile; any other error means that the family cannot do it.
        """
        self.sequential = sequential
        self.head: HeadRunner | None = None
        """Runs the model's own draft head; None where there is none, or nothing drafted could be verified."""
        self.can_chunk = sequential.can_chunk
        self._packed = PackedRunner(sequential)
        self.packs = self._packed.works
        self._rescaling = rescaling_lengths(configs_of(sequential.model))
        self._states = HiddenStates(sequential.model) if hasattr(sequential.model, HEAD) else None
        self._graphs = self._graph_runner()
        self.graph_refusal = self._why_no_graphs()
        """Why passes of few tokens are not replayed on a device that could; empty where they are, or there is none."""
        self.tokens_side_by_side: TokenLockstep | None = None
        """Verifies token by token, where a pass over several tokens does not serve."""
        self.verifies, self.refusal = self._probe_verification()
        self.head = self._head_runner()

    @property
    def vocabulary(self) -> int:
        """Number of tokens that logits are given for."""
        return self.sequential.vocabulary

    def rows_within(self, nbytes: int) -> int:
        """How many tokens' logits fit in `nbytes`, as the model computes them and in float32."""
        return nbytes // int((self.sequential.model.dtype.itemsize + torch.float32.itemsize) * self.vocabulary)

    def max_depth(self, tokens: int) -> int | None:
        """Depth up to which drafts may follow `tokens` cached tokens and the last one; None is no limit.

        LongRoPE rescales all positions once a pass crosses the original context, so a draft must not cross it.
        """
        return min((length - tokens - 1 for length in self._rescaling if length > tokens), default=None)

    def start(self, capacity: int) -> SequenceCache:
        """The KV cache of a new sequence, with buffers for `capacity` tokens. The caller owns it."""
        cache = self.sequential.start(capacity)
        if self.head is not None:
            cache.head = self.head.start(capacity)
        return cache

    def step(self, cache: SequenceCache, tokens: Sequence[int]) -> torch.Tensor:
        """As `run` for one sequence."""
        return self.run([PassInput(cache, tokens)])[0]

    def run(self, inputs: Sequence[PassInput]) -> list[torch.Tensor]:
        """Appends each input's tokens to its cache; returns each one's last logits, float32 [vocabulary] on the CPU.

        With `every` they are those of all its tokens, [tokens, vocabulary]. After an error the caches are invalid.
        """
        return whole_logits(inputs, self.run_on_device(inputs))

    def run_sampled(self, inputs: Sequence[PassInput]) -> list[LogitsRows]:
        """As `run`, for logits that tokens are sampled from: each input's as rows, one or one a token.

        Those of a device stay there until the next pass, and the best few of every row are read, in one copy.
        """
        found = self.run_on_device(inputs)
        for rows in found:
            if not isinstance(rows, torch.Tensor):
                # Now, so that an error of the pass is raised by the pass, and its time is that of the pass.
                rows.read_best()
        return found

    def _graph_runner(self) -> GraphRunner | None:
        passes, attention = self.sequential.device_passes, self._packed.attention
        if passes is None or attention is None or not self.packs:
            return None
        # Imported late: it needs Triton.
        from edgemoe.model.graph_runner import GraphRunner

        return GraphRunner(self.sequential, attention, passes, self._states)

    def _why_no_graphs(self) -> str:
        if self._graphs is not None:
            return self._graphs.refusal
        return "" if self.sequential.device_passes is None else "sequences of this family do not share a pass"

    def run_on_device(self, inputs: Sequence[PassInput]) -> list[LogitsRows]:
        """As `run_sampled`, without reading any logits of a device. Heads' caches get the hidden states."""
        if self.head is None:
            return self._run_on_device(inputs)
        with self.head.states.taking() as taken:
            found = self._run_on_device(inputs)
        hidden = taken[0] if len(taken) == 1 else torch.cat(taken)
        for item, own in zip(inputs, hidden.split([len(item.tokens) for item in inputs]), strict=True):
            if item.cache.head is not None:
                item.cache.head.give(own)
        return found

    def _head_runner(self) -> HeadRunner | None:
        if not self.verifies or self._states is None:
            return None
        head = HeadRunner(self.sequential, self._packed.attention if self.packs else None, self._states)
        self.head_refusal = head.refusal
        return None if head.refusal else head

    def _run_on_device(self, inputs: Sequence[PassInput]) -> list[LogitsRows]:
        if self._graphs is not None and self._graphs.fits(inputs):
            return self._graphs.rows(inputs)
        if self.packs:
            return self._packed.rows(inputs)
        if self.tokens_side_by_side is not None and (len(inputs) > 1 or by_token(inputs[0])):
            return self.tokens_side_by_side.rows(inputs)
        return self.sequential.rows(inputs) if len(inputs) == 1 else self._in_lockstep(inputs)

    def _in_lockstep(self, inputs: Sequence[PassInput]) -> list[LogitsRows]:
        with self.sequential.passing(inputs, kind="lockstep"), self.sequential.layers.lockstep() as lockstep:
            logits = lockstep.run([partial(self.sequential.forward, item) for item in inputs])
            return split_rows(torch.cat(logits), [item.outputs for item in inputs])

    def _probe_verification(self) -> tuple[str, str]:
        """What a pass can verify, and why it is nothing."""
        if self.packs or self.start(1).holds_rows_alone:
            for shape in ("tree", "chain"):
                if self._verified(shape):
                    return shape, ""
            return "", "this family does not give several tokens in one pass the logits of one after the other"
        self.tokens_side_by_side = TokenLockstep(self.sequential)
        if not accelerator.is_accelerator(self.sequential.device) and self._verified("chain", to_the_bit=True):
            return "chain", ""
        # What a device multiplies has other bits among several tokens.
        self.tokens_side_by_side.shares_linears = False
        if self._verified("chain"):
            return "chain", ""
        self.tokens_side_by_side = None
        return "", "this family's cache has a state that cannot be rolled back"

    def _verified(self, shape: str, *, to_the_bit: bool = False) -> bool:
        """Whether drafted tokens get the logits that they get one by one, and leave the same cache."""
        sequential = self.sequential
        prompt = [(17 * place + 3) % self.vocabulary for place in range(PROBE_TOKENS)]
        tree, last = _probe_tree(shape, self.vocabulary)
        cache, other = sequential.start(4 * PROBE_TOKENS), sequential.start(4 * PROBE_TOKENS)
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
            except Exception as error:
                if is_device_or_memory_error(error):
                    raise
                # The family's forward was not written for these masks and positions.
                return False
            pairs = [*zip(expected, found[path], strict=True), (sequential.step(other, [3]), after)]
        agree = torch.equal if to_the_bit else sequential.agree
        return all(agree(*pair) for pair in pairs)


def _probe_tree(shape: str, vocabulary: int) -> tuple[DraftTree, int]:
    """A small tree, or chain, and the node at the end of the path that is kept."""
    tree = DraftTree(5 % vocabulary)
    first = tree.add(0, 11 % vocabulary, 1.0)
    if shape == "tree":
        tree.add(0, 13 % vocabulary, 1.0)
    last = tree.add(first, 7 % vocabulary, 1.0)
    tree.add(last, 13 % vocabulary, 1.0)
    return tree, last


def tree_input(cache: SequenceCache, tree: DraftTree, nodes: Sequence[int], drafted: Sequence[int]) -> PassInput:
    """The input that runs `nodes` of `tree`; its nodes `drafted` are in `cache` already, in that order."""
    order = [*drafted, *nodes]
    tokens = [tree.tokens[node] for node in nodes]
    if order == list(range(len(order))) and tree.is_chain:
        return PassInput(cache, tokens, every=True)
    depths = [tree.depths[node] for node in order]
    ancestors = tree.ancestry()[list(nodes)][:, order]
    return PassInput(cache, tokens, True, TreeMask(cache.tokens - len(drafted), depths, ancestors))
