"""What is left to do of an input: each line under an id of its own, less what has a result already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from edgemoe.cli.exits import FileTrouble
from edgemoe.cli.run.ledger import Ledger
from edgemoe.cli.run.requests import BadLine, Entry, RequestLine, RequestReader, default_id
from edgemoe.cli.run.source import Source
from edgemoe.sampling import Sampling


class Job(NamedTuple):
    """A request, or why a line is none, and the id that its record will have."""

    record_id: str
    request: RequestLine | BadLine


def settings_key(
    *,
    model: str | None,
    dtype: str | None,
    system: str | None,
    raw: bool,
    sampling: Sampling,
    template: Mapping[str, Any] | None = None,
) -> str:
    """A digest of the settings that decide a reply besides the request itself.

    What nobody set is left out, so that a setting which a later version adds changes no key.
    """
    neutral = asdict(Sampling())
    given = {name: value for name, value in asdict(sampling).items() if value != neutral[name]}
    key = {"model": model, "dtype": dtype, "system": system, "raw": raw, "sampling": given}
    return _digest(key | ({"template": dict(template)} if template else {}))


class Jobs:
    """The jobs of an input, in its order; they are gone through once.

    `skipped` counts those left out because `ledger` knows a result of theirs.
    """

    def __init__(self, source: Source, reader: RequestReader, key: str, ledger: Ledger, results_name: str) -> None:
        self.reader = reader
        self.skipped = 0
        self._source = source
        self._key = key
        self._ledger = ledger
        self._results_name = results_name

    def count(self) -> int | None:
        """How many there are, for which the input is read once more than else; None where it can be read only once.

        Raises what going through them raises.
        """
        if self._source.total is None:
            return None
        count = sum(1 for _ in self)
        self._source.rewind()
        self._ledger.forget_claims()
        return count

    def ready(self) -> bool:
        """Whether the next one can be had without waiting for whoever writes the input."""
        return self._source.ready()

    def __iter__(self) -> Iterator[Job]:
        """Raises FileTrouble for a result that answers another request, or no line at all, and when reading fails."""
        self.skipped = 0
        for entry in self.reader.read(self._source.lines(), jsonl=self._source.is_jsonl):
            request = self._under_its_own_id(entry)
            job = Job(self._record_id(entry, request.custom_id), request)
            if self._has_result(job):
                self.skipped += 1
            else:
                yield job
        stranger = self._ledger.unclaimed_result()
        if stranger is not None:
            raise FileTrouble(self._refusal(f"no line of {self._source.name} asks for the result of {stranger!r}"))

    def _under_its_own_id(self, entry: Entry) -> RequestLine | BadLine:
        """The entry's request; an error where another line gave the same id before."""
        request, line = entry.request, entry.line
        taken = self._ledger.claim(request.custom_id, line.number)
        if taken is None:
            return request
        free = self._free_id(entry)
        if request.custom_id == default_id(line):  # which nobody asked for
            return replace(request, custom_id=free)
        return BadLine(
            free,
            "duplicate_custom_id",
            f"line {line.number}: custom_id {request.custom_id!r} is that of line {taken}; give each line its own",
        )

    def _free_id(self, entry: Entry) -> str:
        name = free = default_id(entry.line)
        count = 1
        while self._ledger.claim(free, entry.line.number) is not None:
            count += 1
            free = f"{name}-{count}"
        return free

    def _record_id(self, entry: Entry, custom_id: str) -> str:
        """Proof of what a record answers: the line, the id, and the settings."""
        return f"batch_req_{_digest([entry.line.text, entry.is_json, custom_id, self._key])[:32]}"

    def _has_result(self, job: Job) -> bool:
        custom_id = job.request.custom_id
        found = self._ledger.result_of(custom_id)
        if found is None:
            return False
        if found != job.record_id:
            raise FileTrouble(
                self._refusal(f"the result of {custom_id!r} is that of another request, or of other settings")
            )
        return True

    def _refusal(self, why: str) -> str:
        return (
            f"{self._results_name} cannot be resumed: {why}; give the input and the settings it was made with, "
            "another file with -o, or --overwrite instead of --resume"
        )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
