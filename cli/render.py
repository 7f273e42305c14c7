"""Numbers and tables as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgemoe.sizes import format_bytes

if TYPE_CHECKING:
    from edgemoe import Timings


def duration(seconds: float) -> str:
    """A time, such as `0.42 s`, `12.3 s` or `3 min 05 s`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def counted(number: int, noun: str) -> str:
    """A number and its noun, such as `1 request` or `2 requests`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def experts(timings: Timings) -> str:
    """What the expert cache did, such as `hit rate 93.1 %, 1.2 MiB a token`."""
    return f"hit rate {timings.hit_rate:.1%}, {format_bytes(timings.bytes_per_token)} a token"


def speeds(timings: Timings) -> str:
    """How fast it was, such as `prompt 12 tokens at 340.0/s, generated 34 tokens at 56.7/s, hit rate …`."""
    return (
        f"prompt {counted(timings.prompt_tokens, 'token')} at {timings.prompt_per_second:.1f}/s, generated "
        f"{counted(timings.generated_tokens, 'token')} at {timings.generated_per_second:.1f}/s, {experts(timings)}"
    )


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text, without a trailing newline; the last column is not padded."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]) - 1)] if rows else []
    lines = ("  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
