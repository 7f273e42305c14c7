from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgemoe.cli.exits import FileTrouble
from edgemoe.cli.run.ledger import Ledger


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_an_id_is_claimed_once_until_the_claims_are_forgotten(ledger: Ledger) -> None:
    assert [ledger.claim("a", 1), ledger.claim("b", 2), ledger.claim("a", 3), ledger.claim("a", 4)] == [
        None, None, 1, 1,
    ]  # fmt: skip
    ledger.forget_claims()
    assert ledger.claim("a", 5) is None


def test_results_and_the_first_that_nobody_claims(ledger: Ledger) -> None:
    assert ledger.unclaimed_result() is None
    assert [ledger.add_result(each, f"r{line}", line) for line, each in enumerate("zaybz")] == [True] * 4 + [False]
    assert (ledger.result_of("a"), ledger.result_of("A")) == ("r1", None)
    ledger.claim("z", 1)
    assert ledger.unclaimed_result() == "a"
    for line, each in enumerate("ayb"):
        ledger.claim(each, line)
    assert ledger.unclaimed_result() is None


MANY = """
import resource
from edgemoe.cli.run.ledger import Ledger
ledger = Ledger()
def claim(numbers):
    for number in numbers:
        assert ledger.claim(f"{number * 2654435761 % 2**32:08x}-request", number) is None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(claim(range(40_000)), claim(range(40_000, 120_000)))
"""


def test_many_ids_take_no_more_memory_and_leave_no_file(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", MANY], env=os.environ | {"SQLITE_TMPDIR": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    few, many = map(int, done.stdout.split())
    assert many - few < 1024  # KiB; the texts alone are 1.3 MB, and a set of them takes 10 MB
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_named(ledger: Ledger) -> None:
    ledger.close()
    with pytest.raises(FileTrouble, match="cannot be kept in a temporary file: .*; make room, or give another folder"):
        ledger.claim("a", 1)
