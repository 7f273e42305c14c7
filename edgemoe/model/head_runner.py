"""Runs a checkpoint's own draft head: on the model's hidden states, and on its own for tokens further ahead."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from edgemoe.checkpoint.draft_head import HEAD, DraftHead
from edgemoe.errors import is_device_or_memory_error, reason
from edgemoe.model.draft_tree import TreeMask
from edgemoe.model.head_cache import HeadCache
from edgemoe.model.kv_cache import cache_argument, new_cache
from edgemoe.model.packed_attention import PackedAttention, Row
from edgemoe.model.pass_logits import LogitsRows, split_rows
from edgemoe.model.sequential_runner import PROBE_TOKENS, PassInput, SequentialRunner
from edgemoe.quiet import quiet_transformers

BEFORE, AFTER = 0, 1
"""Kinds of hidden states: before the last norm of the model or of the head, and after it."""


class HeadInput(NamedTuple):
    """Rows to append to one sequence's `HeadCache` in a pass of the head."""

    cache: HeadCache
    tokens: Sequence[int]
    """The tokens whose embeddings the rows are made of."""
    hidden: torch.Tensor
    """The hidden state that comes before each of them, [tokens, hidden size], on the model's device."""
    outputs: int
    """How many of the last rows give logits and hidden states."""
    tree_mask: TreeMask | None = None
    """The rows as nodes of a draft tree; None where each follows the one before it."""

    @property
    def pairs(self) -> int:
        """See `PassInput.pairs`."""
        return len(self.tokens) * (self.cache.rows + len(self.tokens))

    @property
    def positions(self) -> list[int]:
        """The positions of the tokens in their sequence: row i has token i + 1."""
        rows = range(self.cache.rows, self.cache.rows + len(self.tokens))
        return [row + 1 for row in (self.tree_mask.positions if self.tree_mask else rows)]


class HeadOutput(NamedTuple):
    """What the head gives for the last rows of one input."""

    logits: LogitsRows
    """A row for each output."""
    hidden: torch.Tensor
    """[outputs, 2, hidden size]: before and after the head's norm, on the model's device."""


class _Skip(nn.Module):
    """Stands in for the layers that a head does not have."""

    def __init__(self, layer: nn.Module, outputs: int | None) -> None:
        """As `layer`, which returns so many values in a tuple, or one by itself where it is None."""
        super().__init__()
        self._outputs = outputs
        # Models ask their layers what they are.
        vars(self).update(
            {name: value for name, value in vars(layer).items() if isinstance(value, (str, int, bool, float))}
        )

    def forward(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> Any:
        return hidden_states if self._outputs is None else (hidden_states, *[None] * (self._outputs - 1))


class _LastNorm(nn.Module):
    """The head's norm, which keeps what comes in and what goes out."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(hidden_states)
        self.kept = hidden_states, found
        return found


class HiddenStates:
    """Takes the hidden states of a model's passes, before and after its last norm."""

    def __init__(self, model: Any) -> None:
        """Registers hooks on the model's stack of layers, and on the norms beside them."""
        decoder = model.get_decoder()
        self.kind: int | None = None
        """The kind that passes give; both where it is None."""
        self._taken: list[torch.Tensor] | None = None
        self._before: torch.Tensor | None = None
        for child in decoder.children():
            weight = getattr(child, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.dim() == 1:
                child.register_forward_hook(self._norm_ran)
        decoder.register_forward_hook(self._pass_ran)

    @contextmanager
    def taking(self) -> Iterator[list[torch.Tensor]]:
        """In the block the list gets [tokens, kinds, hidden size] for every pass of the stack, as passes end."""
        taken: list[torch.Tensor] = []
        before, self._taken = self._taken, taken
        try:
            yield taken
        finally:
            self._taken = before

    def add(self, hidden: torch.Tensor) -> None:
        """Takes those of a pass that was replayed."""
        if self._taken is not None:
            self._taken.append(hidden)

    def _norm_ran(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._taken is not None:
            # The last norm of a pass is the one that counts.
            self._before = inputs[0]

    def _pass_ran(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._taken is not None:
            after = output[0]
            before = after if self._before is None or self._before.shape != after.shape else self._before
            kinds = [before[0], after[0]]
            self._taken.append(torch.stack(kinds if self.kind is None else [kinds[self.kind]], dim=1))
            self._before = None


class HeadRunner:
    """Passes of a model's draft head, for models where `refusal` is empty. Sequences' states are in their caches."""

    def __init__(
        self, runner: SequentialRunner, attention: PackedAttention | None, states: HiddenStates | None = None
    ) -> None:
        """Probes the head on a few tokens, without experts. `attention` is that of packed passes, where there are any.

        `states` are the hidden states of the model's passes, where they are taken already. Raises what the device or
        the memory raises.
        """
        self._runner = runner
        self._attention = attention
        self._head: DraftHead = getattr(runner.model, HEAD)
        self._cache_argument = cache_argument(runner.model)
        self._first_hidden = bool(getattr(runner.model.config.get_text_config(), "mtp_hidden_states_first", False))
        self.states = states or HiddenStates(runner.model)
        """The hidden states of the model's passes."""
        self.refusal = self._why_not()
        """Why the head cannot be run, in a sentence; empty where it can."""

    def start(self, capacity: int) -> HeadCache:
        """The head's cache of a new sequence, with buffers for `capacity` tokens. The caller owns it."""
        kv = new_cache(self._runner.model, capacity)
        kv.layers = [kv.layers[layer] for layer in self._head.like]
        return HeadCache(kv)

    def run(self, inputs: Sequence[HeadInput]) -> list[HeadOutput]:
        """Appends each input's rows to its cache; logits and hidden states of its last rows, on the model's device."""
        runner = self._runner
        with runner.passing(inputs, kind="head"):
            if self._attention is None:
                return [self._alone(item) for item in inputs]
            rows, wanted, first = [], list[int](), 0
            for item in inputs:
                last = first + len(item.tokens)
                rows.append(Row(item.cache.kv, first, last, item.tree_mask))
                wanted += range(last - item.outputs, last)
                first = last
            with self._attention.running(rows):
                return self._outputs(inputs, wanted, use_cache=False)

    def _alone(self, item: HeadInput) -> HeadOutput:
        extra: dict[str, Any] = {self._cache_argument: item.cache.kv}
        if item.tree_mask is not None:
            layer = next(each for each in item.cache.kv.layers if hasattr(each, "get_mask_sizes"))
            extra["attention_mask"] = self._runner.layer_mask(layer, item.tree_mask)
        count = len(item.tokens)
        return self._outputs([item], range(count - item.outputs, count), use_cache=True, **extra)[0]

    def _outputs(self, inputs: Sequence[HeadInput], wanted: Sequence[int], **named: Any) -> list[HeadOutput]:
        """Runs the rows of `inputs`, laid end to end; what the `wanted` ones of them give."""
        index = torch.tensor(list(wanted)).to(self._runner.device, non_blocking=True)
        with self._computing(index, sum(len(item.tokens) for item in inputs)):
            logits = self._forward(inputs, index, **named)
        for item in inputs:
            item.cache.rows += len(item.tokens)
        assert self._norm.kept is not None
        hidden = torch.stack([each[0, index] for each in self._norm.kept], dim=1)
        self._norm.kept = None
        counts = [item.outputs for item in inputs]
        parts = zip(split_rows(logits, counts), hidden.split(counts), strict=True)
        return [HeadOutput(*part) for part in parts]

    def _computing(self, wanted: torch.Tensor, rows: int) -> AbstractContextManager[None]:
        """In the block the experts of a head's only layer are computed for the `wanted` ones of the rows alone.

        Of the others nothing is needed but keys and values, which come before the experts.
        """
        if len(wanted) == rows or len(self._head.blocks) > 1:
            return nullcontext()
        return self._runner.layers.computing(wanted)

    def _forward(self, inputs: Sequence[HeadInput], keep: torch.Tensor, **named: Any) -> torch.Tensor:
        """The logits of the rows to keep."""
        device, head = self._runner.device, self._head
        ids = torch.tensor([[token for item in inputs for token in item.tokens]]).to(device, non_blocking=True)
        positions = torch.tensor([[place for item in inputs for place in item.positions]])
        hidden = torch.cat([item.hidden for item in inputs])[None]
        embedding = head.embedding or self._runner.model.get_input_embeddings()
        parts = [head.enorm(embedding(ids)), head.hnorm(hidden)]
        entered = head.eh_proj(torch.cat(parts[::-1] if self._first_hidden else parts, dim=-1))
        if self._runner.keeps_last:
            named["logits_to_keep"] = keep
        found: torch.Tensor = self._model(
            inputs_embeds=entered, position_ids=positions.to(device, non_blocking=True), **named
        ).logits[0]
        return found if self._runner.keeps_last else found[keep]

    def _why_not(self) -> str:
        with self._runner.layers.silenced(), quiet_transformers():
            try:
                tokens = [(17 * place + 3) % self._runner.vocabulary for place in range(PROBE_TOKENS)]
                hidden, outputs = self._of_model(tokens)
                self._norm = _LastNorm(self._head.norm or _last_norm(self._runner.model.get_decoder()))
                self._model = _with_head(self._runner.model, self._head, self._norm, outputs)
                return (
                    "" if self._agrees(tokens, hidden) else "the head gives other logits for several rows than for one"
                )
            except Exception as error:
                if is_device_or_memory_error(error):
                    raise
                # The family's forward was not written for such a call.
                return f"the head cannot be run ({reason(error)})"

    def _of_model(self, tokens: Sequence[int]) -> tuple[torch.Tensor, int | None]:
        """The model's last hidden states of `tokens`, and how many values its layers return, if a tuple."""
        runner, outputs = self._runner, list[int | None]()
        layer = runner.model.get_decoder().layers[self._head.like[0]]
        hook = layer.register_forward_hook(
            lambda module, inputs, output: outputs.append(len(output) if isinstance(output, tuple) else None)
        )
        try:
            with self.states.taking() as taken:
                runner.run([PassInput(runner.start(len(tokens)), tokens)])
        finally:
            hook.remove()
        return taken[0][:, AFTER], outputs[0]

    def _agrees(self, tokens: Sequence[int], hidden: torch.Tensor) -> bool:
        """Whether rows get the same logits at once and one by one, and drafts of a tree those of a chain."""
        runner = self._runner
        whole, single = self.start(2 * PROBE_TOKENS), self.start(2 * PROBE_TOKENS)
        (together,) = self.run([HeadInput(whole, tokens[1:], hidden[:-1], PROBE_TOKENS - 1)])
        for place in range(PROBE_TOKENS - 1):
            item = HeadInput(single, tokens[place + 1 : place + 2], hidden[place : place + 1], 1)
            (alone,) = self.run([item])
            if not runner.agree(_values(alone.logits)[0], _values(together.logits)[place]):
                return False
        for cache in (whole, single):
            cache.mark_rows()
        last, base = together.hidden[-1:, AFTER], whole.rows
        mask = TreeMask(base, [0, 0], torch.eye(2, dtype=torch.bool))
        if self._attention is None:
            whole.drop_rows(base)
            return True
        (both,) = self.run([HeadInput(whole, [5, 7], last.expand(2, -1), 2, mask)])
        (other,) = self.run([HeadInput(single, [7], last, 1)])
        return runner.agree(_values(other.logits)[0], _values(both.logits)[1])


def _values(rows: LogitsRows) -> torch.Tensor:
    return rows if isinstance(rows, torch.Tensor) else rows.whole


def _last_norm(decoder: Any) -> nn.Module:
    """The norm after the last layer: the last one beside the layers."""
    norms: list[nn.Module] = [
        child for name, child in decoder.named_children() if "norm" in name and not list(child.children())
    ]
    return norms[-1]


def _with_head(model: Any, head: DraftHead, norm: _LastNorm, outputs: int | None) -> Any:
    """`model` with the layers of `head` in the place of its own: it shares everything else with it.

    The family's own forward then makes masks, positions and logits as for the model. `outputs` is what `_Skip` takes.
    Raises LookupError where the stack of layers is no direct part of the model.
    """
    decoder = model.get_decoder()
    layers = nn.ModuleList([_Skip(layer, outputs) for layer in decoder.layers])
    for place, block in zip(head.like, head.blocks, strict=True):
        layers[place] = block
    last = next(name for name, child in decoder.named_children() if child is _last_norm(decoder))
    stack = _shallow(decoder, {"layers": layers, last: norm})
    own: dict[str, nn.Module] = {name: stack for name, child in model.named_children() if child is decoder}
    if not own:
        raise LookupError("the model has its layers in a part of a part")
    if head.output is not None:
        output = model.get_output_embeddings()
        own |= {name: head.output for name, child in model.named_children() if child is output}
    return _shallow(model, own)


def _shallow(module: Any, children: dict[str, nn.Module]) -> Any:
    """A copy of `module` that shares its parts, but for `children`, and has no hooks."""
    other = copy.copy(module)
    vars(other)["_modules"] = {**module._modules, **children}
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        vars(other)[name] = OrderedDict()
    return other
