from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.cache_fakes import FakeStreams
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    """Links and stores end every thread that they start."""
    before = set(threading.enumerate())
    yield

    def all_ended() -> bool:
        return not [one for one in set(threading.enumerate()) - before if one.name.startswith("edgemoe")]

    wait_until(all_ended, seconds=2)


@pytest.fixture
def streams() -> Iterator[FakeStreams]:
    made = FakeStreams()
    yield made
    made.end()
