"""Where the requests are: a file or standard input, as numbered lines of text, never held whole."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from io import BufferedReader, FileIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from edgemoe.cli.exits import FileTrouble, why

STANDARD_INPUT = "-"


class Line(NamedTuple):
    """A line that is not blank, without its ending, and its number from 1."""

    number: int
    text: str


class Source:
    """An open file of requests. `total` is its number of lines that are not blank, where that could be counted."""

    def __init__(self, name: str, file: BinaryIO, total: int | None) -> None:
        self.name = name
        self.total = total
        self._file = file

    @classmethod
    def open(cls, path: str) -> Source:
        """Open and, for a regular file, check every line. Raises FileTrouble."""
        if path == STANDARD_INPUT:
            return cls("standard input", sys.stdin.buffer, None)
        try:
            if Path(path).is_dir():
                raise FileTrouble(f"{path} is a folder; give a file of requests, or - for standard input")
            source = cls(path, BufferedReader(FileIO(path)), None)
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
                raw = self._file.readline()
            except OSError as error:
                raise FileTrouble(f"cannot read {self.name} after line {number}: {why(error)}") from error
            if not raw:
                return
            number += 1
            text = self._decode(raw, number)
            if text.strip():
                yield Line(number, text.rstrip("\r\n"))

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self._file is not sys.stdin.buffer:
            self._file.close()

    def _check(self) -> None:
        """Read a regular file once through, so that what is wrong with it shows before a model is loaded."""
        if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self.total = sum(1 for _ in self.lines())
            self._file.seek(0)

    def _decode(self, raw: bytes, number: int) -> str:
        try:
            # The mark that some editors put at the very start is not part of the text.
            return raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise FileTrouble(
                f"{self.name} is not UTF-8 text (line {number}); convert it, for example with 'iconv -t UTF-8'"
            ) from None
