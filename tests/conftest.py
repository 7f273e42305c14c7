"""What every test starts from: one compute thread, no network, nothing kept, `bench` importable from the checkout."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read by huggingface_hub when it is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd"))):
    # Read by Triton when it is first imported, by others too: without a card its kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

import shutil
import threading

import pytest
import torch

from bench.support.byte_tokenizer import with_tokenizer
from tests.support.checkpoints import Zoo

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


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    """A closed engine has ended every thread that it started."""
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("edgemoe")]
    assert left == []


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def talker(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixtral with a byte tokenizer and a chat template; not to be changed."""
    folder = tmp_path_factory.mktemp("talker")
    shutil.copytree(zoo("mixtral", vocab_size=264), folder, dirs_exist_ok=True)
    return with_tokenizer(folder)
