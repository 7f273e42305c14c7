"""One pass over the tokens of several sequences, laid end to end: every weight is read once, nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from edgemoe.errors import is_device_or_memory_error
from edgemoe.kernels.batch_invariant_mode import BatchInvariantMode, install_batch_invariance
from edgemoe.kernels.row_linear import BATCH_INVARIANT_TOKENS
from edgemoe.model import fused_attention, fused_layer
from edgemoe.model.packed_attention import MIN_THREADED_PAIRS, PackedAttention, Row
from edgemoe.model.pass_logits import LogitsRows, split_rows
from edgemoe.model.rewind.recurrent_mixers import (
    MixerRow,
    RecurrentMixers,
    find_mixers,
    parents_of,
    recurrent_kinds,
    write_states_in_place,
)
from edgemoe.model.sequential_runner import PROBE_TOKENS, PassInput, SequentialRunner, whole_logits
from edgemoe.quiet import quiet_transformers


class PackedRunner:
    """Runs several sequences in one pass, for models where `works` says that this is right."""

    def __init__(self, runner: SequentialRunner) -> None:
        """Attaches to the model's attention and probes packed passes, on a few tokens and without experts."""
        self._runner = runner
        self.attention, self._mixers = _attached(runner)
        """The attention of packed passes; None where the family has none such."""
        if self.attention is not None:
            install_batch_invariance(runner.model, partial(_batch_invariance, self.attention))
            fused_attention.install(runner.model, self.attention, runner.kernel_threads)
            fused_layer.install(runner.model)
        self.works = self.attention is not None and self._agrees()
        if not self.works:
            write_states_in_place(runner.start(1))

    def run(self, inputs: Sequence[PassInput]) -> list[torch.Tensor]:
        """As `SequentialRunner.run`, in one pass. Only where `works`."""
        return whole_logits(inputs, self.rows(inputs))

    def rows(self, inputs: Sequence[PassInput]) -> list[LogitsRows]:
        """As `SequentialRunner.rows`, in one pass. Only where `works`."""
        runner = self._runner
        assert self.attention is not None
        with runner.passing(inputs, kind="packed"):
            rows: list[Row] = []
            ids: list[int] = []
            positions: list[int] = []
            wanted: list[int] = []
            batch_invariant = runner.batch_invariant(inputs)
            for item in inputs:
                first, last = len(ids), len(ids) + len(item.tokens)
                short = len(item.tokens) <= BATCH_INVARIANT_TOKENS
                one_by_one = batch_invariant and short and (item.verifies or item.pairs < MIN_THREADED_PAIRS)
                rows.append(Row(item.cache.kv, first, last, item.tree_mask, one_by_one, item.outputs))
                positions += item.positions
                ids += item.tokens
                wanted += range(len(ids) - item.outputs, len(ids))
            device = runner.device
            index = torch.tensor(wanted).to(device, non_blocking=True)
            extra = {"logits_to_keep": index} if runner.keeps_last else {}
            with self.attention.running(rows, batch_invariant=batch_invariant), self._mixing(inputs, rows):
                logits = runner.model(
                    # From pageable memory, so that the host may go on at once.
                    input_ids=torch.tensor([ids]).to(device, non_blocking=True),
                    position_ids=torch.tensor([positions]).to(device, non_blocking=True),
                    use_cache=False,
                    **extra,
                ).logits[0]
            for item in inputs:
                item.cache.appended(len(item.tokens))
            return split_rows(logits if runner.keeps_last else logits[index], [item.outputs for item in inputs])

    def _mixing(self, inputs: Sequence[PassInput], rows: Sequence[Row]) -> AbstractContextManager[None]:
        """The context in which recurrent mixers work on `rows`, those of `inputs`."""
        if self._mixers is None or self.attention is None:
            return nullcontext()
        parts = []
        for item, row in zip(inputs, rows, strict=True):
            marked = item.cache.marked
            nodes = None if marked is None else item.cache.tokens - marked
            parents = parents_of(item) if item.verifies or marked is not None else []
            parts.append(MixerRow(row.kv, row.first, row.last, nodes, tuple(parents)))
        return self._mixers.running(parts, self.attention.batch_invariance)

    def _agrees(self) -> bool:
        """Whether two sequences get the same logits packed and alone, for their prompts and the tokens after them."""
        runner = self._runner
        vocabulary = runner.vocabulary
        tokens = [(17 * place + 3) % vocabulary for place in range(2 * PROBE_TOKENS)]
        parts = [tokens[:5], tokens[5:PROBE_TOKENS]]
        # The second round continues one sequence by a token and the other by several.
        rounds = [parts, [tokens[PROBE_TOKENS : PROBE_TOKENS + 1], tokens[PROBE_TOKENS + 1 :]]]
        alone, packed = ([runner.start(2 * PROBE_TOKENS) for _ in parts] for _ in range(2))
        with runner.layers.silenced(), quiet_transformers():
            for step in rounds:
                try:
                    expected = runner.run([PassInput(*pair) for pair in zip(alone, step, strict=True)])
                    found = self.run([PassInput(*pair) for pair in zip(packed, step, strict=True)])
                except Exception as error:
                    if is_device_or_memory_error(error):
                        raise
                    # The family's forward was not written for such a call, so the family is not packed.
                    return False
                if not all(map(runner.agree, expected, found)):
                    return False
                # A cache continues either way; one that holds latents is not what a packed pass appends to.
                alone, packed = packed, alone
        return True


def _attached(runner: SequentialRunner) -> tuple[PackedAttention | None, RecurrentMixers | None]:
    """The attention and the recurrent mixers of packed passes; None where there is none such, of both or the latter."""
    model, threads, cache = runner.model, runner.kernel_threads, runner.start(PROBE_TOKENS)
    mixers = None
    if cache.holds_rows_alone:
        attention = PackedAttention(model, threads)
    elif cache.can_roll_back and (others := recurrent_kinds(model, cache.kv)):
        attention = PackedAttention(model, threads, others)
        if attention.attached:
            with runner.layers.silenced(), quiet_transformers():
                mixers = RecurrentMixers(find_mixers(model, cache, runner.step))
    else:
        # A KV cache with layers of other kinds than `attend` appends to.
        return None, None
    return (attention, mixers) if attention.attached else (None, None)


def _batch_invariance(attention: PackedAttention) -> BatchInvariantMode | None:
    return attention.batch_invariance
