"""What every test starts from: one compute thread, no network, nothing kept, `bench` importable from the checkout."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from pathlib import Path

# Read by huggingface_hub when it is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))
torch.set_num_threads(1)

# What edgemoe keeps between runs is never kept in the user's own folder: here for engines that outlive a test ...
CACHES = tempfile.TemporaryDirectory(prefix="edgemoe-tests-")
os.environ["XDG_CACHE_HOME"] = os.path.join(CACHES.name, "session")
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _nothing_is_kept_from_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """... and a folder of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join(CACHES.name, str(next(NUMBERS))))
