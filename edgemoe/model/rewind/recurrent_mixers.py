"""Recurrent mixers in packed passes: each sequence's tokens enter its own states, one at a time where they are drafts.

A mixer is a module that reads or replaces states of the KV cache: linear attention, a state-space layer, a short
convolution. Everything else in a layer treats each token alone, or is attention (`packed_attention`). Mixers are found
by running, and their forward is the family's own: for a sequence's tokens at once where that is a prompt, else for one
token after the other, which is what single steps compute. The weights are then still read once: a linear layer of the
mixer's input is computed for all tokens before the first one, and the one that gives its output after the last one.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from edgemoe.cache import accelerator
from edgemoe.kernels.batch_invariant_linear import matrix_of
from edgemoe.kernels.batch_invariant_mode import BatchInvariantMode
from edgemoe.kernels.packed_layers import PackedLinear
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.rewind.kept_states import MARK, Slot
from edgemoe.model.rewind.state_layers import RecurrentLayer
from edgemoe.model.sequential_runner import PassInput

READS = ("get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state")
"""Methods of transformers' caches that a mixer calls."""


class MixerRow(NamedTuple):
    """One sequence's part of a packed row, as mixers see it."""

    kv: Any
    first: int
    last: int
    nodes: int | None
    """The number of its first token among the nodes since the mark of its cache; None where there is none."""
    parents: Sequence[int]
    """Of each token, the node that it follows, in a marked cache."""

    @property
    def one_by_one(self) -> bool:
        """Whether its tokens enter the states as those of single steps do."""
        return self.nodes is not None or self.last - self.first == 1 or bool(self.parents)


class Mixer(NamedTuple):
    """A module with states, and how it is called."""

    module: nn.Module
    layer: int
    slots: tuple[Slot, ...]
    cache_argument: str


class LastLinear(NamedTuple):
    """The linear layer that gives a mixer's output, and the width of that."""

    module: nn.Module
    width: int


class RecurrentMixers:
    """The recurrent mixers of one model. Used by one thread at a time."""

    def __init__(self, mixers: Sequence[Mixer]) -> None:
        """Wraps the forward of each of `mixers` and of its linear layers, for passes in `running` only."""
        self._rows: Sequence[MixerRow] = ()
        self._mode: BatchInvariantMode | None = None
        self._tokens: _SteppedTokens | None = None
        for mixer in mixers:
            for child in mixer.module.modules():
                if _shares(child):
                    child.forward = types.MethodType(self._shared(child.forward), child)
            mixer.module.forward = types.MethodType(self._by_rows(mixer, mixer.module.forward), mixer.module)

    @contextmanager
    def running(self, rows: Sequence[MixerRow], mode: BatchInvariantMode | None) -> Iterator[None]:
        """In the block mixers work on `rows`; `mode` is the pass's, with a span for each of them, where it has one."""
        self._rows, self._mode = rows, mode
        try:
            yield
        finally:
            self._rows, self._mode = (), None

    def _shared(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(module: nn.Module, input: torch.Tensor) -> torch.Tensor:
            tokens = self._tokens
            return forward(input) if tokens is None else tokens.linear(module, forward, input)

        return run

    def _by_rows(self, mixer: Mixer, forward: Callable[..., Any]) -> Callable[..., Any]:
        last: list[LastLinear | None] = []
        """The linear layer whose output is the mixer's, or None where there is none such, once that is known."""

        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self._rows:
                return forward(*args, **kwargs)
            call = _Call(forward, mixer, args, kwargs)
            tokens = _SteppedTokens(call.hidden, [row for row in self._rows if row.one_by_one], last)
            outputs: list[list[Any]] = []
            for number, row in enumerate(self._rows):
                if row.one_by_one:
                    self._tokens = tokens
                    try:
                        outputs.append(list(_steps(call, mixer, row, tokens)))
                    finally:
                        self._tokens = None
                else:
                    with self._mode.within(number) if self._mode else nullcontext():
                        outputs.append([call.run(row.kv, call.hidden[:, row.first : row.last], row.first)])
            tokens.finish([part for row, part in zip(self._rows, outputs, strict=True) if row.one_by_one])
            return _joined([each for part in outputs for each in part])

        return run


class _Call:
    """A call of a mixer for a packed row, to be made for parts of it."""

    def __init__(self, forward: Callable[..., Any], mixer: Mixer, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._forward = forward
        self._cache_argument = mixer.cache_argument
        self._kwargs = _named(mixer.module, args, kwargs)
        self._kwargs.pop(mixer.cache_argument, None)
        self._name = next(iter(self._kwargs))
        self.hidden = self._kwargs.pop(self._name)

    def run(self, kv: Any, hidden: torch.Tensor, first: int) -> Any:
        """The mixer's output for the tokens `hidden`, [1, tokens, width], from `first` on, of the cache `kv`."""
        named = {name: self._part(value, first, hidden.shape[1]) for name, value in self._kwargs.items()}
        named[self._cache_argument] = kv
        return self._forward(**{self._name: hidden}, **named)

    def _part(self, value: Any, first: int, tokens: int) -> Any:
        """What belongs to some tokens of an argument with a value for each; others as they are."""
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == self.hidden.shape[:2]:
            return value[:, first : first + tokens]
        return value


class _SteppedTokens:
    """The tokens that a mixer runs one by one, and what its linear layers compute for all of them at once."""

    def __init__(self, hidden: torch.Tensor, rows: Sequence[MixerRow], last: list[LastLinear | None]) -> None:
        parts = [hidden[:, row.first : row.last] for row in rows]
        self.inputs = torch.cat(parts, 1) if parts else hidden[:, :0]
        self.number = 0
        """Of the token under way, among those of all rows."""
        self._last = last
        self._first_products: dict[nn.Module, torch.Tensor] = {}
        self._deferred: list[torch.Tensor] = []
        self._forward: Callable[..., torch.Tensor] | None = None
        self._latest: tuple[nn.Module, torch.Tensor] | None = None

    @property
    def current(self) -> torch.Tensor:
        """The input of the token under way, [1, 1, width]."""
        return self.inputs[:, self.number : self.number + 1]

    def linear(self, module: nn.Module, forward: Callable[..., torch.Tensor], input: torch.Tensor) -> torch.Tensor:
        """The output of the linear layer `module` for one token, or, where it is deferred, what takes its place."""
        if input.data_ptr() == self.current.data_ptr() and input.shape == self.current.shape:
            if module not in self._first_products:
                self._first_products[module] = forward(self.inputs)
            output = self._first_products[module][:, self.number : self.number + 1]
        elif self._last and self._last[0] is not None and self._last[0].module is module:
            self._deferred.append(input)
            self._forward = forward
            output = input.new_empty(*input.shape[:-1], self._last[0].width)
        else:
            output = forward(input)
        self._latest = module, output
        return output

    def returned(self, output: Any) -> None:
        """Learns from the first token which linear layer gives the mixer's output."""
        if self._last:
            return
        same = (
            isinstance(output, torch.Tensor)
            and self._latest is not None
            and output.data_ptr() == self._latest[1].data_ptr()
            and output.shape == self._latest[1].shape
            and self._latest[0] not in self._first_products
        )
        self._last.append(LastLinear(self._latest[0], output.shape[-1]) if same and self._latest is not None else None)

    def finish(self, outputs: Sequence[list[Any]]) -> None:
        """Puts the deferred outputs in the places of what stands for them in `outputs`, by row and token."""
        if not self._deferred or self._forward is None:
            return
        product = self._forward(torch.cat(self._deferred, 1))
        places = [(row, place) for row in outputs for place in range(len(row))]
        for number, (row, place) in enumerate(places[len(places) - len(self._deferred) :]):
            row[place] = product[:, number : number + 1]


def _steps(call: _Call, mixer: Mixer, row: MixerRow, tokens: _SteppedTokens) -> Iterator[Any]:
    """The mixer's output for each token of `row`, whose state is that after the one that it follows."""
    layer = row.kv.layers[mixer.layer]
    before = None
    for place in range(row.last - row.first):
        node = None if row.nodes is None else row.nodes + place
        if node is not None and row.parents[place] != before:
            layer.kept.go_back(layer, row.parents[place], mixer.slots)
        output = call.run(row.kv, tokens.current, row.first + place)
        tokens.returned(output)
        if node is not None:
            layer.kept.keep(layer, node, mixer.slots)
        before = node
        tokens.number += 1
        yield output


def _named(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `module` by their names, those given by position first."""
    _, *names = inspect.signature(type(module).forward).parameters
    return dict(zip(names, args, strict=False)) | kwargs


def _joined(outputs: Sequence[Any]) -> Any:
    """The outputs of parts of a row laid end to end; of each of several, where there are several."""
    if isinstance(outputs[0], tuple):
        return tuple(_joined(each) for each in zip(*outputs, strict=True))
    return torch.cat(list(outputs), 1) if isinstance(outputs[0], torch.Tensor) else outputs[0]


def _shares(module: nn.Module) -> bool:
    """Whether a linear layer's product of several tokens may stand for those of each: to the same bits, on a CPU."""
    if matrix_of(module) is not None:
        return True
    if isinstance(module, PackedLinear):
        return accelerator.is_accelerator(next(iter(module.packed.parts.values())).device)
    return type(module) is nn.Linear and accelerator.is_accelerator(module.weight.device)


def find_mixers(model: Any, cache: SequenceCache, step: Callable[[SequenceCache, Sequence[int]], Any]) -> list[Mixer]:
    """The modules of `model` that reach for states of `cache` while `step` appends a few tokens to it."""
    found: dict[nn.Module, tuple[int, set[Slot], str]] = {}
    running: list[tuple[nn.Module, str]] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        named = _named(module, args, kwargs)
        running.append((module, next((name for name, value in named.items() if value is cache.kv), "")))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    def note(layer: int, slots: Sequence[Slot]) -> None:
        module, name = running[-1]
        found.setdefault(module, (layer, set(), name))[1].update(slots)

    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in model.modules()]
    try:
        with _noting(cache.kv, note):
            step(cache, [3, 5])
            step(cache, [7])
    finally:
        for hook in hooks:
            hook.remove()
    _try_replacing(cache, step)
    return [Mixer(module, layer, tuple(sorted(slots, key=str)), name) for module, (layer, slots, name) in found.items()]


def _try_replacing(cache: SequenceCache, step: Callable[[SequenceCache, Sequence[int]], Any]) -> None:
    """Lets new recurrent states take the places of old ones, in all caches, where no mixer writes into the old ones."""
    layers = [layer for layer in cache.kv.layers if isinstance(layer, RecurrentLayer)]
    before = [state for layer in layers for state in layer.recurrent_states.values() if state is not None]
    if any(accelerator.is_accelerator(state.device) for state in before):
        return
    copies = [state.clone() for state in before]
    for layer in layers:
        layer.pool.replaces = True
    step(cache, [9])
    unwritten = all(torch.equal(*pair) for pair in zip(before, copies, strict=True))
    for layer in layers:
        layer.pool.replaces = unwritten


def write_states_in_place(cache: SequenceCache) -> None:
    """Lets all caches of the model of `cache` copy new recurrent states into the old ones, as transformers' do."""
    for layer in getattr(cache.kv, "layers", ()):
        if isinstance(layer, RecurrentLayer):
            layer.pool.replaces = False


@contextmanager
def _noting(kv: Any, note: Callable[[int, Sequence[Slot]], None]) -> Iterator[None]:
    """In the block `note` is told whenever a state of `kv` is read or replaced."""

    def noted(method: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            positional = list(args) if kind.startswith("get") else list(args[1:])
            layer = kwargs["layer_idx"] if "layer_idx" in kwargs else positional.pop(0)
            number = kwargs["state_idx"] if "state_idx" in kwargs else positional[0] if positional else 0
            note(layer, [("conv_states" if "conv" in kind else "recurrent_states", number)])
            return method(*args, **kwargs)

        return call

    for name in READS:
        setattr(kv, name, noted(getattr(kv, name), name))
    try:
        yield
    finally:
        for name in READS:
            delattr(kv, name)


def recurrent_kinds(model: Any, kv: Any) -> set[str]:
    """The kinds of `model`'s layers whose cache is one of states, or that cache nothing."""
    kinds = list(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    return {
        kind
        for kind, layer in zip(kinds, kv.layers, strict=False)
        if isinstance(layer, LinearAttentionCacheLayerMixin) or not hasattr(layer, "get_seq_length")
    }


def parents_of(item: PassInput) -> list[int]:
    """Of each token of a pass that verifies or drafts, the node that it follows."""
    first = 0 if item.cache.marked is None else item.cache.tokens - item.cache.marked
    if item.tree_mask is None:
        return [first + place - 1 for place in range(len(item.tokens))]
    ancestors = item.tree_mask.ancestors.clone()
    parents = []
    for place, seen in enumerate(ancestors):
        seen[first + place] = False
        before = seen.nonzero().flatten().tolist()
        parents.append(before[-1] if before else MARK)
    return parents
