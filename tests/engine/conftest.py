from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import Zoo

from bench.byte_tokenizer import with_tokenizer


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
