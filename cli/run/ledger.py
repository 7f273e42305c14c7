"""The ids of an input and of its results, kept on disk: a million of them take no more memory than ten."""

from __future__ import annotations

import sqlite3
from typing import Any

from edgemoe.cli.exits import FileTrouble

_SETUP = (
    "PRAGMA journal_mode = OFF",
    "PRAGMA synchronous = OFF",
    "PRAGMA cache_size = -2048",  # KiB
    "CREATE TABLE claims (custom_id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID",
    "CREATE TABLE results (custom_id TEXT PRIMARY KEY, record_id TEXT, line INTEGER) WITHOUT ROWID",
    "BEGIN",
)


class Ledger:
    """The ids of one run. Every method raises FileTrouble when the temporary file cannot take more.

    The file belongs to SQLite, which removes it however the process ends.
    """

    def __init__(self) -> None:
        self._connection = sqlite3.connect("", isolation_level=None)
        for statement in _SETUP:
            self._execute(statement)

    def claim(self, custom_id: str, line: int) -> int | None:
        """Give an id to a line of the input; the line that has it already, if there is one."""
        if self._execute("INSERT OR IGNORE INTO claims VALUES (?, ?)", custom_id, line).rowcount:
            return None
        (taken,) = self._execute("SELECT line FROM claims WHERE custom_id = ?", custom_id).fetchone()
        return int(taken)

    def forget_claims(self) -> None:
        """Take back every claim, for reading the input once more."""
        self._execute("DELETE FROM claims")

    def add_result(self, custom_id: str, record_id: str, line: int) -> bool:
        """Note a line of the results; False when the id has a result already."""
        added = self._execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?)", custom_id, record_id, line)
        return bool(added.rowcount)

    def result_of(self, custom_id: str) -> str | None:
        """The id of an id's record, where it has a result."""
        row = self._execute("SELECT record_id FROM results WHERE custom_id = ?", custom_id).fetchone()
        return None if row is None else str(row[0])

    def unclaimed_result(self) -> str | None:
        """The id of the first result that no line of the input has claimed."""
        query = "SELECT custom_id FROM results WHERE custom_id NOT IN (SELECT custom_id FROM claims) ORDER BY line"
        row = self._execute(query + " LIMIT 1").fetchone()
        return None if row is None else str(row[0])

    def close(self) -> None:
        """Remove the file."""
        self._connection.close()

    def _execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise FileTrouble(
                f"the ids of the requests cannot be kept in a temporary file: {error}; "
                "make room, or give another folder with the environment variable SQLITE_TMPDIR"
            ) from error
