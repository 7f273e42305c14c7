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

STANDARD_INPUT = "-"
_BLOCK = 1 << 16


class Line(NamedTuple):
    """A line that is not blank, without its ending, and its number from 1."""

    number: int
    text: str


class Source:
    """An open file of requests.

    `total` is its number of lines that are not blank; None for a pipe or a terminal, which can be read only once.
    """

    def __init__(self, name: str, file: BufferedReader) -> None:
        self.name = name
        self.total: int | None = None
        self._file = file
        self._whole: deque[bytes] = deque()
        """Lines that were read and not yet taken."""
        self._begun: list[bytes] = []
        """Pieces of a line whose end was not read yet."""

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
        """The lines that are not blank. Raises FileTrouble when reading fails or a line is not UTF-8."""
        number = 0
        while True:
            try:
                raw = self._next()
            except OSError as error:
                raise FileTrouble(f"cannot read {self.name} after line {number}: {why(error)}") from error
            if raw is None:
                return
            number += 1
            text = self._decode(raw, number)
            if text.strip():
                yield Line(number, text.rstrip("\r"))

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
        self._begun.clear()

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if sys.stdin is None or self._file is not sys.stdin.buffer:
            self._file.close()

    def _check(self) -> None:
        """Read a regular file once through, so that what is wrong with it shows before a model is loaded."""
        if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self.total = sum(1 for _ in self.lines())
            self.rewind()

    def _next(self) -> bytes | None:
        """The next line without its line feed; None at the end."""
        while not self._whole:
            block = self._file.read1(_BLOCK)
            if not block:
                rest = b"".join(self._begun)
                self._begun.clear()
                return rest or None
            first, *more = block.split(b"\n")
            self._begun.append(first)
            if more:
                self._whole.append(b"".join(self._begun))
                self._whole.extend(more[:-1])
                self._begun = [more[-1]]
        return self._whole.popleft()

    def _decode(self, raw: bytes, number: int) -> str:
        try:
            # The mark that some editors put at the very start is not part of the text.
            return raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise FileTrouble(
                f"{self.name} is not UTF-8 text (line {number}); convert it, for example with 'iconv -t UTF-8'"
            ) from None
