"""Where the requests are: a file or standard input, as numbered lines of text, never held whole."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections import deque
from collections.abc import Iterator
from io import BufferedReader, FileIO
from pathlib import Path
from typing import NamedTuple

from edgemoe.cli.exits import FileTrouble, why
from edgemoe.sizes import format_bytes

STANDARD_INPUT = "-"
MAX_LINE = 16 << 20
"""Bytes of a line that is read; of a longer one only the beginning is kept."""
MAX_SKIPPED = 1 << 30
"""Bytes after which an input without a line feed is given up."""
_KEPT = 256
"""Bytes of the beginning of a line that is too long."""
_BLOCK = 1 << 16
_NOT_UTF8 = "it is not UTF-8 text; convert the input, for example with 'iconv -t UTF-8'"


class Line(NamedTuple):
    """A line that is not blank, without its ending, and its number from 1."""

    number: int
    text: str
    trouble: str = ""
    """Why the line cannot be read, of which `text` is the beginning; empty where it can."""


class _EndlessLine(Exception):
    """A line has no end within `MAX_SKIPPED` bytes."""


class Source:
    """An open file of requests.

    `total` is its number of lines that are not blank; None for a pipe or a terminal, which can be read only once.
    """

    def __init__(self, name: str, file: BufferedReader) -> None:
        self.name = name
        self.total: int | None = None
        self._file = file
        self._whole: deque[tuple[bytes, int]] = deque()
        """Lines that were read and not yet taken, and their lengths: of lines that are too long only the beginnings."""
        self._begun: list[bytes] = []
        """Pieces of a line whose end was not read yet."""
        self._begun_nbytes = 0
        """The length of that line so far."""

    @classmethod
    def open(cls, path: str) -> Source:
        """Open and, for a regular file, check every line. Raises FileTrouble."""
        if path == STANDARD_INPUT:
            if sys.stdin is None:
                raise FileTrouble("standard input is closed; give a file of requests")
            return cls("standard input", sys.stdin.buffer)  # type: ignore[arg-type]
        try:
            if Path(path).is_dir():
                raise FileTrouble(f"{path} is a folder; give a file of requests, or - for standard input")
            source = cls(path, BufferedReader(FileIO(path)))
        except FileNotFoundError:
            raise FileTrouble(f"there is no file {path}; give a file of requests, or - for standard input") from None
        except OSError as error:
            raise FileTrouble(f"cannot read {path}: {why(error)}") from error
        try:
            source._check()
        except FileTrouble:
            source.close()
            raise
        return source

    @property
    def is_jsonl(self) -> bool:
        """Whether the name alone says that every line is JSON."""
        return self.name.lower().endswith(".jsonl")

    def is_file(self, path: str) -> bool:
        """Whether a path leads to the very file that is read here."""
        try:
            mine, other = os.fstat(self._file.fileno()), os.stat(path)
        except OSError:
            return False
        return stat.S_ISREG(mine.st_mode) and os.path.samestat(mine, other)

    def lines(self) -> Iterator[Line]:
        """The lines that are not blank. Raises FileTrouble when reading fails or a line has no end."""
        number = 0
        while True:
            try:
                raw = self._next()
            except OSError as error:
                raise FileTrouble(f"cannot read {self.name} after line {number}: {why(error)}") from error
            except _EndlessLine:
                raise FileTrouble(
                    f"line {number + 1} of {self.name} has no end within {format_bytes(MAX_SKIPPED)}; "
                    "give a file with a request on each line"
                ) from None
            if raw is None:
                return
            number += 1
            line = self._decode(*raw, number)
            if line.text.strip() or line.trouble:
                yield line

    def ready(self) -> bool:
        """Whether the next line can be had without waiting for whoever writes it (or at least begins to come)."""
        if self._whole or self.total is not None:
            return True
        try:
            return bool(select.select([self._file], [], [], 0)[0])
        except (OSError, ValueError):  # what cannot be asked is waited for
            return True

    def rewind(self) -> None:
        """Begin again at the first line. Only where `total` is known."""
        self._file.seek(0)
        self._whole.clear()
        self._take_begun()

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if sys.stdin is None or self._file is not sys.stdin.buffer:
            self._file.close()

    def _check(self) -> None:
        """Read a regular file once through, so that what is wrong with it shows before a model is loaded."""
        if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            total = 0
            for line in self.lines():
                if line.trouble == _NOT_UTF8:
                    raise FileTrouble(
                        f"{self.name} is not UTF-8 text (line {line.number}); convert it, for example with "
                        "'iconv -t UTF-8'"
                    )
                total += 1
            self.total = total
            self.rewind()

    def _next(self) -> tuple[bytes, int] | None:
        """The next line without its line feed, or its beginning, and its length in bytes; None at the end."""
        while not self._whole:
            block = self._file.read1(_BLOCK)
            if not block:
                rest = self._take_begun()
                return rest if rest[1] else None
            first, *more = block.split(b"\n")
            self._begin(first)
            if more:
                self._whole.append(self._take_begun())
                self._whole.extend((line, len(line)) for line in more[:-1])
                self._begin(more[-1])
        return self._whole.popleft()

    def _begin(self, piece: bytes) -> None:
        """Adds a piece to the line whose end was not read yet, of which little is kept once it is too long."""
        was_too_long = self._begun_nbytes > MAX_LINE
        self._begun_nbytes += len(piece)
        if self._begun_nbytes > MAX_SKIPPED:
            raise _EndlessLine
        if was_too_long:
            return
        self._begun.append(piece)
        if self._begun_nbytes > MAX_LINE:
            self._begun = [b"".join(self._begun)[:_KEPT]]

    def _take_begun(self) -> tuple[bytes, int]:
        line = b"".join(self._begun), self._begun_nbytes
        self._begun, self._begun_nbytes = [], 0
        return line

    @staticmethod
    def _decode(raw: bytes, nbytes: int, number: int) -> Line:
        # The mark that some editors put at the very start is not part of the text.
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        if nbytes > len(raw):
            trouble = f"it has {format_bytes(nbytes)}, more than the {format_bytes(MAX_LINE)} that a line may have"
            return Line(number, raw.decode(encoding, "replace"), trouble)
        try:
            return Line(number, raw.decode(encoding).rstrip("\r"))
        except UnicodeDecodeError:
            return Line(number, raw.decode(encoding, "replace")[:_KEPT], _NOT_UTF8)
