"""Numbers and tables as text for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from edgemoe.results import hit_rate
from edgemoe.sizes import format_bytes

if TYPE_CHECKING:
    from edgemoe import Stats, Timings


@dataclass(frozen=True)
class Counts:
    """What an engine counted over a stretch of work, or since it was loaded."""

    hits: int
    misses: int
    bytes_demanded: int
    bytes_prefetched_used: int
    bytes_prefetched_late: int
    bytes_prefetched_wasted: int
    link_wait_seconds: float
    steps: int
    cycles: int
    drafted: int
    accepted: int
    draft_seconds: float
    verify_seconds: float

    @classmethod
    def of(cls, stats: Stats) -> Counts:
        """Since the engine was loaded."""
        return cls(**{entry.name: getattr(stats, entry.name) for entry in fields(cls)})

    def since(self, before: Counts) -> Counts:
        """What was counted after `before`."""
        return Counts(*(getattr(self, entry.name) - getattr(before, entry.name) for entry in fields(self)))

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were resident."""
        return hit_rate(self.hits, self.misses)

    def a_step(self, total: float) -> float:
        """A total of these, divided by the steps."""
        return total / max(1, self.steps)

    def a_cycle(self, total: float) -> float:
        """A total of these, divided by the cycles."""
        return total / max(1, self.cycles)


def duration(seconds: float) -> str:
    """A time, such as `0.42 s`, `12.3 s` or `3 min 05 s`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def milliseconds(seconds: float) -> str:
    """A short time, such as `0.42 ms` or `12.3 ms`."""
    return f"{seconds * 1000:.{2 if seconds < 0.01 else 1}f} ms"


def counted(number: int, noun: str) -> str:
    """A number and its noun, such as `1 request` or `2 requests`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def experts(timings: Timings) -> str:
    """What the expert cache did, such as `hit rate 93.1 %, 1.2 MiB a token`."""
    return f"hit rate {timings.hit_rate:.1%}, {format_bytes(timings.bytes_per_token)} a token"


def speeds(timings: Timings) -> str:
    """How fast it was, such as `prompt 12 tokens at 340.0/s, generated 34 tokens at 56.7/s, hit rate …`."""
    said = (
        f"prompt {counted(timings.prompt_tokens, 'token')} at {timings.prompt_per_second:.1f}/s, generated "
        f"{counted(timings.generated_tokens, 'token')} at {timings.generated_per_second:.1f}/s, {experts(timings)}"
    )
    if timings.drafted:
        said += f", {timings.accepted} of {counted(timings.drafted, 'drafted token')} accepted"
    return said


def steps(counts: Counts) -> str:
    """What a step moved and waited for, such as `120 steps, each 1.2 MiB demanded, …, link wait 2.10 ms`."""
    moved = (
        (counts.bytes_demanded, "demanded"),
        (counts.bytes_prefetched_used, "prefetched in time"),
        (counts.bytes_prefetched_late, "late"),
        (counts.bytes_prefetched_wasted, "in vain"),
    )
    sizes = ", ".join(f"{format_bytes(counts.a_step(nbytes))} {word}" for nbytes, word in moved)
    wait = milliseconds(counts.a_step(counts.link_wait_seconds))
    return f"{counted(counts.steps, 'step')}, each {sizes}, link wait {wait}"


def drafts(counts: Counts, speculation: str) -> str:
    """What a cycle gave, such as `45 cycles of speculation, each 3.40 tokens drafted, …`, or why there was none."""
    if not counts.cycles:
        off = speculation.startswith("off")
        return f"speculation {speculation}" if off else f"speculation by {speculation}: nothing drafted"
    each = counts.a_cycle
    return (
        f"{counted(counts.cycles, 'cycle')} of speculation, each {each(counts.drafted):.2f} tokens drafted, "
        f"{each(counts.accepted):.2f} accepted, {each(counts.accepted + counts.cycles):.2f} generated, "
        f"draft {milliseconds(each(counts.draft_seconds))}, verify {milliseconds(each(counts.verify_seconds))}"
    )


def measured(timings: Timings, stats: Stats, before: Counts) -> list[str]:
    """Everything about one reply: its own timings, and what the engine has counted since `before`."""
    counts = Counts.of(stats).since(before)
    lines = [speeds(timings), steps(counts), drafts(counts, stats.speculation)]
    if counts.cycles:
        lines.append(f"speculation now: {stats.speculation_setting}, utility {stats.utility:.2f}")
    return lines


def totals(stats: Stats) -> list[tuple[str, str, str]]:
    """All that an engine counted, as rows of what, how much, and what that is of or for each."""
    counts = Counts.of(stats)
    asked, shared = counts.hits + counts.misses, stats.prefix_tokens
    rows = [
        ("requests", str(stats.requests), f"{stats.preemptions} computed again" if stats.preemptions else ""),
        ("prompt tokens", str(stats.tokens_prompt), f"{shared} shared with another request" if shared else ""),
        ("generated tokens", str(stats.tokens_generated), ""),
        ("batch", str(stats.batch), stats.batch_reason),
        ("steps", str(counts.steps), f"in {duration(stats.seconds)}"),
        ("expert cache", counted(stats.slots, "slot"), f"for {counted(stats.experts, 'expert')}"),
        ("hit rate", f"{counts.hit_rate:.1%}", f"{counts.hits} of {counted(asked, 'expert')} asked for"),
    ]
    for what, nbytes in (
        ("demanded", counts.bytes_demanded),
        ("prefetched in time", counts.bytes_prefetched_used),
        ("prefetched late", counts.bytes_prefetched_late),
        ("prefetched in vain", counts.bytes_prefetched_wasted),
    ):
        rows.append((what, format_bytes(nbytes), f"{format_bytes(counts.a_step(nbytes))} a step"))
    rows.append(("filled", format_bytes(stats.bytes_filled), "brought at the start, and asked for or evicted since"))
    wait = counts.link_wait_seconds
    return [
        *rows,
        ("link wait", duration(wait), f"{milliseconds(counts.a_step(wait))} a step"),
        *_foretold(
            "lookahead",
            stats.lookahead_recall,
            stats.lookahead_precision,
            (stats.lookahead_bytes_useful, stats.lookahead_bytes_late, stats.lookahead_bytes_wasted),
        ),
        *_drafts(counts, stats),
    ]


def _drafts(counts: Counts, stats: Stats) -> list[tuple[str, str, str]]:
    what, _, why = stats.speculation.partition(": " if stats.speculation.startswith("off") else ", ")
    rows = [("speculation", what, why)]
    if stats.device_passes:
        replayed = stats.device_passes == "graphs"
        rows.append(("passes", "graphs" if replayed else "no graphs", "" if replayed else stats.device_passes))
    if not counts.cycles:
        return rows
    each = counts.a_cycle
    if stats.utility:
        times = counted(stats.speculation_changes, "change")
        rows.append(("utility", f"{stats.utility:.2f}", f"{stats.speculation_setting}, after {times}"))
    rows.append(("cycles", str(counts.cycles), ""))
    for name, tokens in (("drafted", counts.drafted), ("accepted", counts.accepted)):
        rows.append((name, counted(tokens, "token"), f"{each(tokens):.2f} a cycle"))
    for drafter, drafted in stats.drafted_by.items():
        accepted = stats.accepted_by.get(drafter, 0)
        rows.append((f"from {drafter}", counted(drafted, "token"), f"{accepted / max(1, drafted):.0%} accepted"))
    given = counts.accepted + counts.cycles
    rows.append(("generated by cycles", counted(given, "token"), f"{each(given):.2f} a cycle"))
    for name, seconds in (("draft", counts.draft_seconds), ("verify", counts.verify_seconds)):
        rows.append((name, duration(seconds), f"{milliseconds(each(seconds))} a cycle"))
    if stats.budget_choices:
        share = stats.budget_dropped / stats.budget_choices
        rows.append(("budget", f"{share:.1%}", "of the experts chosen in verifications of drafts were left out: lossy"))
    moved = (stats.forecast_bytes_useful, stats.forecast_bytes_late, stats.forecast_bytes_wasted)
    return [*rows, *_foretold("forecast", stats.forecast_recall, stats.forecast_precision, moved)]


def _foretold(name: str, recall: float, precision: float, moved: tuple[int, int, int]) -> list[tuple[str, str, str]]:
    """What a predictor of experts was worth, where it had anything to say; `moved` for it in time, late, in vain."""
    if not recall and not precision:
        return []
    rows = [(name, f"{recall:.1%}", f"of the missing experts foretold, {precision:.1%} of the foretold asked for")]
    if any(moved):
        useful, late, wasted = map(format_bytes, moved)
        rows.append(("brought for it", format_bytes(sum(moved)), f"{useful} in time, {late} late, {wasted} in vain"))
    return rows


_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys instead of showing them: controls but line end and tab, and those that turn the
direction of text. Lone surrogates stand for bytes of a file name that are no text."""


def harmless(text: str) -> str:
    """`text` with every character that a terminal would obey written out, such as `\\x1b` for an escape."""
    return _HARMFUL.sub(_written_out, text.replace("\r\n", "\n"))


def harmless_line(text: str) -> str:
    """The same on one line: line ends are written out too."""
    return harmless(text).replace("\n", "\\n").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text, without a trailing newline; the last column is not padded."""
    rows = [tuple(map(harmless_line, row)) for row in rows]
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]) - 1)] if rows else []
    lines = ("  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: int) -> None:
    """Rows as a table on a terminal, as wide as that is; the column with the index `right` has its numbers so."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings)
    table.columns[right].justify = "right"
    for row in rows:
        table.add_row(*map(harmless_line, row))
    Console(markup=False, highlight=False).print(table)
