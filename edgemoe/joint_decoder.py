"""Runs several sequences at once in the best way that is right for the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from edgemoe.decoder import Decoder, Work
from edgemoe.packed import PackedDecoder
from edgemoe.past import Past


class JointDecoder:
    """One step over any number of sequences, in which every needed expert is acquired once.

    They run packed into one pass where the family allows it, else side by side, meeting at the experts.
    `plain`, one after the other, is what both are tested against.
    """

    def __init__(self, plain: Decoder) -> None:
        self.plain = plain
        self._packed = PackedDecoder(plain)

    @property
    def packs(self) -> bool:
        """Whether sequences run in one pass; the first look tries it on the model."""
        return self._packed.works()

    def start(self, room: int) -> Past:
        """An empty sequence with room for `room` tokens."""
        return self.plain.start(room)

    def step(self, sequence: Past, tokens: Sequence[int]) -> torch.Tensor:
        """As `run` for one sequence."""
        return self.run([Work(sequence, tokens)])[0]

    def run(self, work: Sequence[Work]) -> list[torch.Tensor]:
        """Appends each item's tokens to its past; returns each one's last logits, float32 [vocabulary] on the CPU.

        When it raises, the pasts of `work` are of no use any more.
        """
        if self.packs:
            return self._packed.run(work)
        return self.plain.run(work) if len(work) == 1 else self._side_by_side(work)

    def _side_by_side(self, work: Sequence[Work]) -> list[torch.Tensor]:
        with self.plain.passing(work, kind="meeting"), self.plain.layers.meeting() as meeting:
            return meeting.run([partial(self.plain.forward, *item) for item in work])
