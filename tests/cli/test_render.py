from __future__ import annotations

import unicodedata

import pytest

from edgemoe.cli.render import columns, harmless, harmless_line, print_table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é ☕ 漢字 عربى\n\tx", "plain é ☕ 漢字 عربى\n\tx"),
        ("\x1b]0;x\x07", "\\x1b]0;x\\x07"),
        ("\x00\x08\x7f\x9b31m", "\\x00\\x08\\x7f\\x9b31m"),
        ("one\r\ntwo\rthree", "one\ntwo\\x0dthree"),
        ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),
        ("\udcff", "\\udcff"),
        ("👩\u200d🚀 \u200f", "👩\u200d🚀 \u200f"),
    ],
)
def test_text_is_shown_as_text(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_no_control_character_is_left() -> None:
    text = harmless("".join(map(chr, range(0x3000))))
    assert {character for character in text if unicodedata.category(character) == "Cc"} == {"\n", "\t"}


def test_a_line_is_one_line() -> None:
    assert harmless_line("a\nb\u2028c\td") == "a\\nb\\u2028c\td"


def test_the_cells_of_a_table_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    assert columns([("a\x1b[2J", "b\nc"), ("d", "e")]) == "a\\x1b[2J  b\\nc\nd         e"
    print_table(("what", "how"), [("[red]x\x1b", "1")], right=1)
    out = capsys.readouterr().out
    assert "[red]x\\x1b" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("width", [40, 60, 200])
def test_a_table_fits_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [("experts", "23.6 MiB", "read from the checkpoint's files as they are needed, through the page cache")]
    print_table(("what", "how much", "where and why"), rows, right=1)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width
