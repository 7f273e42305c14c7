from __future__ import annotations

import errno
import shutil
import tempfile
from collections import namedtuple
from contextlib import closing
from pathlib import Path

import pytest
import torch

from edgemoe import PlanError
from edgemoe.measure.logits_file import LogitsFile

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_rows_come_back_bit_for_bit_however_many_at_a_time(folder: Path) -> None:
    rows = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    rows[3, 2] = -torch.inf
    with closing(LogitsFile(7, 20)) as file:
        for start, end in ((0, 1), (1, 12), (12, 20)):
            file.append(rows[start:end])
        for _ in range(2):
            file.rewind()
            assert torch.equal(torch.cat([file.take(5), file.take(14), file.take(1)]), rows)
        with pytest.raises(ValueError, match="fewer than 1 rows are left"):
            file.take(1)
        assert list(folder.iterdir()) == [], "nobody sees it"


def test_rows_that_are_not_contiguous_and_rows_of_another_width() -> None:
    rows = torch.randn(7, 4).T
    with closing(LogitsFile(7, 4)) as file:
        file.append(rows)
        file.rewind()
        assert torch.equal(file.take(4), rows)
        with pytest.raises(ValueError, match="rows have 6 logits instead of 7"):
            file.append(torch.zeros(1, 6))


def test_a_disk_without_room_is_refused_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 4 * 1024 * 100 - 1))
    with pytest.raises(PlanError, match=r"the logits of 100 tokens take 400\.0 KiB in .*fewer with tokens=.*TMPDIR"):
        LogitsFile(1024, 100)
    LogitsFile(1024, 99).close()


def test_a_disk_that_becomes_full_raises_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """Accepts a few bytes, then raises: as a full disk does."""

        room = 10

        def write(self, data: memoryview) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, self.room = min(self.room, len(data)), 0
            return taken

    with closing(LogitsFile(7, 4)) as file, monkeypatch.context() as patched:
        patched.setattr(file, "_file", Full())
        with pytest.raises(PlanError, match="measure fewer with tokens="):
            file.append(torch.zeros(4, 7))
