"""What every test starts from: one compute thread, no network, nothing kept, `bench` importable from the checkout."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
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


@pytest.fixture(autouse=True)
def _the_modes_of_the_thread_are_left_as_they_were() -> Iterator[None]:
    """A test that left one behind would let others fail, far away and only in that order."""
    yield
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
