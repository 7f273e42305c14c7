"""One pass over the tokens of several sequences, laid end to end: every weight is read once, nothing is padded.

Everything in a model but attention looks at each token alone, so that a row of tokens may come from any
sequences. Attention is handed over through transformers' registry: our function splits the row, lets each
sequence append its keys and values to its own past, and calls the family's own attention for each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgemoe.kernels.cpu import batch_invariant_linear
from edgemoe.model.draft_tree import TreeMask
from edgemoe.model.draft_tree import additive as added
from edgemoe.model.sequential_runner import PROBE_TOKENS, PassInput, SequentialRunner
from edgemoe.quiet import quiet_transformers

NAME = "edgemoe_packed"
"""Our entry in transformers' registry of attention functions. It keeps no state: every model brings its own."""

KINDS = {"full_attention", "sliding_attention"}
"""The kinds of attention whose masks we can make."""


class Row(NamedTuple):
    """A sequence's part of the row of tokens: its past, and where it begins and ends."""

    kv: DynamicCache
    first: int
    last: int
    tree_mask: TreeMask | None
    batch_invariant: bool = False
    """Whether each of several tokens attends as it does in a step of its own, to the same bits."""


class Pack:
    """What the attention modules of one model find during a packed pass: its rows, and masks made once for all."""

    def __init__(self) -> None:
        self.rows: Sequence[Row] = ()
        self._masks: dict[object, torch.Tensor] = {}
        self._picks: dict[object, list[slice | torch.Tensor]] = {}

    @property
    def batch_invariant(self) -> bool:
        """Whether some row's tokens shall have the bits of single steps."""
        return any(row.batch_invariant for row in self.rows)

    @contextmanager
    def holding(self, rows: Sequence[Row]) -> Iterator[None]:
        """In the block the model's attention works on `rows`."""
        self.rows = rows
        try:
            yield
        finally:
            self.rows = ()
            self._masks.clear()
            self._picks.clear()

    def mask(self, row: Row, keys: torch.Tensor, window: int | None, *, additive: bool) -> torch.Tensor | None:
        """Which of `keys`, [1, heads, keys, width], each token of `row` sees; None where that is plain.

        Bool [1, 1, queries, keys], or 0 and the smallest number of the dtype where `additive`.
        """
        queries, count = row.last - row.first, keys.shape[-2]
        plain = queries == 1 or (queries == count and not additive)
        if row.tree_mask is None and plain and (window is None or count <= window):
            return None
        # Rows without branches that are equally long share a mask.
        key = (row.first if row.tree_mask else -queries, count, window)
        if key not in self._masks:
            seen = row.tree_mask.visible(count, window) if row.tree_mask else _causal(queries, count, window)
            seen = seen.to(keys.device)
            self._masks[key] = (added(seen, keys.dtype) if additive else seen)[None, None]
        return self._masks[key]

    def picks(self, row: Row, count: int, window: int | None) -> list[slice | torch.Tensor]:
        """For each token of `row` which of the last `count` keys it sees, as a slice where they follow one another."""
        key = (row.first, count, window)
        if key not in self._picks:
            if row.tree_mask:
                self._picks[key] = [_pick(each.nonzero()[:, 0]) for each in row.tree_mask.visible(count, window)]
            else:
                ends = range(count - (row.last - row.first) + 1, count + 1)
                self._picks[key] = [slice(max(0, end - window) if window else 0, end) for end in ends]
        return self._picks[key]


def _pick(positions: torch.Tensor) -> slice | torch.Tensor:
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions


def _causal(queries: int, count: int, window: int | None) -> torch.Tensor:
    """Bool [queries, count]: the last `queries` of `count` tokens, each of which sees what came before it."""
    positions = torch.arange(count)
    own = positions[count - queries :, None]
    return positions <= own if window is None else (positions <= own) & (positions > own - window)


class PackedRunner:
    """Runs several sequences in one pass, for models where that is known to be right."""

    def __init__(self, runner: SequentialRunner) -> None:
        self._runner = runner
        self._pack = Pack()
        self._configs = _configs(runner.model)
        self._bases = [config._attn_implementation for config in self._configs]
        self._works: bool | None = None if self._attach() else False

    def works(self) -> bool:
        """Whether packed passes are right for this model: tried once, on a few tokens, without experts."""
        if self._works is None:
            self._works = self._agrees()
        return self._works

    def run(self, inputs: Sequence[PassInput]) -> list[torch.Tensor]:
        """As `SequentialRunner.run`, in one pass. Only where `works`."""
        runner = self._runner
        with runner.passing(inputs, kind="packed"):
            rows: list[Row] = []
            ids: list[int] = []
            positions: list[int] = []
            wanted: list[int] = []
            batch_invariant = runner.batch_invariant(inputs)
            for item in inputs:
                first, last = len(ids), len(ids) + len(item.tokens)
                rows.append(Row(item.cache.kv, first, last, item.tree_mask, batch_invariant and item.verifies))
                positions += item.positions
                ids += item.tokens
                wanted += range(len(ids) - item.outputs, len(ids))
            device = runner.device
            index = torch.tensor(wanted, device=device)
            extra = {"logits_to_keep": index} if runner.keeps_last else {}
            with self._pack.holding(rows), self._attending():
                logits = runner.model(
                    input_ids=torch.tensor([ids], device=device),
                    position_ids=torch.tensor([positions], device=device),
                    use_cache=False,
                    **extra,
                ).logits[0]
            for item in inputs:
                item.cache.tokens += len(item.tokens)
            logits = (logits if runner.keeps_last else logits[index]).float().cpu()
            parts = logits.split([item.outputs for item in inputs])
            return [part if item.every else part[0] for item, part in zip(inputs, parts, strict=True)]

    def _attach(self) -> bool:
        """Tells the attention modules where to look; False where the model cannot be packed at all."""
        model = self._runner.model
        kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or KINDS)
        plain = self._runner.start(1).can_roll_back
        # Positions that are scaled by how long the longest sequence is would tie companions together.
        scaled = any(_scales_with_length(config) for config in self._configs)
        if not plain or scaled or not kinds <= KINDS or not getattr(model, "_supports_attention_backend", False):
            return False
        modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
        for module in modules:
            base = _base_attention(module)
            if base is not None:
                vars(module)["edgemoe_attention"] = (self._pack, *base)
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        batch_invariant_linear.install_row_by_row(model, lambda: self._pack.batch_invariant)
        return True

    @contextmanager
    def _attending(self) -> Iterator[None]:
        try:
            for config in self._configs:
                config._attn_implementation = NAME
            yield
        finally:
            # Outer configurations come first: setting one sets those inside of it, which are set again then.
            for config, base in zip(self._configs, self._bases, strict=True):
                config._attn_implementation = base

    def _agrees(self) -> bool:
        """Whether two sequences come out the same together and alone, their prompts and the tokens after them."""
        runner = self._runner
        vocabulary = runner.model.config.get_text_config(decoder=True).vocab_size
        tokens = [(17 * place + 3) % vocabulary for place in range(2 * PROBE_TOKENS)]
        parts = [tokens[:5], tokens[5:PROBE_TOKENS]]
        # The second round continues one sequence by a token and the other by several.
        rounds = [parts, [tokens[PROBE_TOKENS : PROBE_TOKENS + 1], tokens[PROBE_TOKENS + 1 :]]]
        alone, together = ([runner.start(2 * PROBE_TOKENS) for _ in parts] for _ in range(2))
        with runner.layers.silenced(), quiet_transformers():
            for step in rounds:
                try:
                    expected = runner.run([PassInput(*pair) for pair in zip(alone, step, strict=True)])
                    found = self.run([PassInput(*pair) for pair in zip(together, step, strict=True)])
                except Exception:
                    # Whatever a family's forward makes of a call that it was not written for: it is not packed then.
                    return False
                if not all(map(runner.agree, expected, found)):
                    return False
                # A past goes on in either way: one that holds latents is not what a packed pass appends to.
                alone, together = together, alone
        return True


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attention with transformers' signature over a packed row: `query` is [1, heads, tokens, width].

    Appends to every row's past. Returns [1, tokens, heads, width].
    """
    pack, base, additive = vars(module)["edgemoe_attention"]
    outputs = []
    for row in pack.rows:
        first, last = row.first, row.last
        keys, values = row.kv.update(key[:, :, first:last], value[:, :, first:last], module.layer_idx)
        layer = row.kv.layers[module.layer_idx]
        window = layer.sliding_window if layer.is_sliding else None
        folds = not additive and keys.device.type == "cpu" and options.get("position_bias") is None
        if row.batch_invariant or (folds and last - first == 1):
            single = _single_sdpa if folds else base
            for place, pick in enumerate(pack.picks(row, keys.shape[-2], window), first):
                own = query[:, :, place : place + 1]
                outputs.append(single(module, own, keys[:, :, pick], values[:, :, pick], None, **options)[0])
        else:
            mask = pack.mask(row, keys, window, additive=additive)
            outputs.append(base(module, query[:, :, first:last], keys, values, mask, **options)[0])
    return torch.cat(outputs, dim=1), None


def _single_sdpa(
    module: Any,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA for a single query that sees all keys, on a CPU.

    The heads that share keys are put into the places of queries: left to PyTorch that takes fifteen times as long.
    """
    heads, width = query.shape[1], query.shape[-1]
    folded = query.reshape(1, keys.shape[1], heads // keys.shape[1], width)
    output = F.scaled_dot_product_attention(folded, keys, values, scale=scaling)
    return output.reshape(1, 1, heads, values.shape[-1]), None


def _base_attention(module: Any) -> tuple[Callable[..., Any], bool] | None:
    """The attention that `module` uses by itself, and whether its masks are added; None where it has none."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation == "sdpa":
        return ALL_ATTENTION_FUNCTIONS["sdpa"], False
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return (eager, True) if implementation == "eager" and eager is not None else None


def _configs(model: Any) -> list[Any]:
    """Every configuration that a module of `model` looks at, outer ones first."""
    found = {id(module.config): module.config for module in model.modules() if getattr(module, "config", None)}
    return list(found.values())


def turning_points(model: Any) -> list[int]:
    """Lengths beyond which all positions of a pass are scaled otherwise, as Phi-3.5-MoE's are ("longrope")."""
    kinds = [kind for config in _configs(model) for kind in _rope_kinds(config) if kind.get("rope_type") == "longrope"]
    return sorted({int(kind["original_max_position_embeddings"]) for kind in kinds})


def _scales_with_length(config: Any) -> bool:
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in _rope_kinds(config))


def _rope_kinds(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of `config`: one, or one for each kind of attention."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(each for each in rope.values() if isinstance(each, dict))]
