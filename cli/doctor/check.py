"""What the doctor finds."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Check:
    """One thing looked at: how it is, what was found, and what to do unless all is well."""

    name: str
    status: str
    """`OK`, `NOTE` (it works, and something makes it slower or may surprise) or `PROBLEM`."""
    found: str
    advice: str = ""

    @property
    def told(self) -> str:
        """What was found and what to do, in one line."""
        return f"{self.found}; {self.advice}" if self.advice else self.found
