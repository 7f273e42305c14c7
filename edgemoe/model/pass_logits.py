"""The logits of a pass. Those of a device stay there: the best few of every row are read, all only where asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch

BEST = 64
"""Logits of a row that are read from a device: 768 bytes a row instead of 600 KB for 152,000 tokens.

More than samplers keep by default, so that several that equal the last one kept are there too.
"""


class Best(NamedTuple):
    """The largest logits of rows, largest first; on the CPU. Equal ones come in any order."""

    values: torch.Tensor
    """float32 [..., best]."""
    ids: torch.Tensor
    """The tokens, int64 [..., best]."""
    log_shares: torch.Tensor
    """The logarithms of the tokens' probabilities among all, float32 [..., best]."""


class PassLogits:
    """The logits of one pass, on a device. Valid until the next pass. Everything is read at most once.

    This has been tested with tensors of the CPU in the place of a card's, and not run on a card.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        """`rows` are [rows, vocabulary], of any floating dtype up to float32."""
        self._rows = rows

    @property
    def vocabulary(self) -> int:
        """Number of logits of a row."""
        return int(self._rows.shape[-1])

    @cached_property
    def best(self) -> Best:
        """The `BEST` largest of every row, in one copy to the CPU."""
        values, ids = self._rows.topk(min(BEST, self.vocabulary), dim=-1)
        shares = self._rows.log_softmax(-1, dtype=torch.float32).gather(-1, ids)
        # Float32 has all integers up to 2^24, more than any vocabulary has tokens.
        values, shares, numbers = self._read(torch.stack([values.float(), shares, ids.float()]))
        return Best(values, numbers.long(), shares)

    @cached_property
    def whole(self) -> torch.Tensor:
        """All logits, float32 [rows, vocabulary] on the CPU, in one copy."""
        return self._read(self._rows).float()

    def split(self, counts: Sequence[int]) -> list[DeviceRows]:
        """The rows, divided into parts of `counts` rows."""
        parts, first = [], 0
        for count in counts:
            parts.append(DeviceRows(self, range(first, first + count)))
            first += count
        return parts

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()


class DeviceRow(NamedTuple):
    """The logits of one token, on a device."""

    logits: PassLogits
    row: int

    @property
    def whole(self) -> torch.Tensor:
        """All logits, float32 [vocabulary] on the CPU; reads those of the whole pass."""
        return self.logits.whole[self.row]

    def largest(self, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The `count` largest logits, and those that equal the last of them: exactly what all logits would give.

        Returns values, float32, and tokens, int64 and ascending, both [kept]; None where not all of them are sure to
        have been read, or where a logit is not a number.
        """
        best, size = self.logits.best, self.logits.vocabulary
        values, ids = best.values[self.row], best.ids[self.row]
        count = min(count, size)
        if count > len(values) or bool(values.isnan().any()):
            return None
        # Of several that equal the last one read, others may not have been read.
        if len(values) < size and not float(values[count - 1]) > float(values[-1]):
            return None
        kept = values >= values[count - 1]
        ids, order = ids[kept].sort()
        return values[kept][order], ids

    def likeliest(self, count: int) -> list[tuple[int, float]]:
        """The `count` most probable tokens, at most `BEST`, and their probabilities among all; none of 0."""
        best = self.logits.best
        found = zip(best.ids[self.row].tolist(), best.log_shares[self.row].exp().tolist(), strict=True)
        return [(token, share) for token, share in list(found)[:count] if share > 0]

    @property
    def argmax(self) -> int:
        """The token of the largest logit; of equal ones the lowest."""
        found = self.largest(1)
        return int(self.whole.argmax()) if found is None else int(found[1][0])


class DeviceRows(Sequence[DeviceRow]):
    """The logits of several tokens, on a device."""

    def __init__(self, logits: PassLogits, rows: range) -> None:
        self._logits = logits
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> DeviceRow:  # type: ignore[override]
        """One row: there are no slices."""
        return DeviceRow(self._logits, self._rows[place])

    def __iter__(self) -> Iterator[DeviceRow]:
        return (DeviceRow(self._logits, row) for row in self._rows)

    @property
    def whole(self) -> torch.Tensor:
        """All logits, float32 [rows, vocabulary] on the CPU; reads those of the whole pass."""
        return self._logits.whole[self._rows.start : self._rows.stop]

    def read_best(self) -> None:
        """Reads the best few of the whole pass, unless that was done. Raises what the pass raises on the device."""
        self._logits.best  # noqa: B018


LogitsRow: TypeAlias = torch.Tensor | DeviceRow
"""The logits of one token: float32 [vocabulary] on the CPU, or on a device."""
LogitsRows: TypeAlias = torch.Tensor | DeviceRows
"""The logits of several tokens: float32 [rows, vocabulary] on the CPU, or on a device."""


def split_rows(logits: torch.Tensor, counts: Sequence[int]) -> list[LogitsRows]:
    """`logits` of a pass, [rows, vocabulary] of any floating dtype, divided into parts of `counts` rows.

    Those of a CPU are tensors; those of a device stay there.
    """
    if logits.device.type == "cpu":
        return list(logits.float().split(list(counts)))
    return list(PassLogits(logits).split(counts))


def on_host(logits: LogitsRow | LogitsRows) -> torch.Tensor:
    """All of `logits`, float32 on the CPU."""
    return logits if isinstance(logits, torch.Tensor) else logits.whole
