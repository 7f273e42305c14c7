"""Silences libraries while edgemoe uses them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context without transformers' progress bars and warnings; restores both settings at its end."""
    from transformers.utils import logging as told

    verbosity, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(verbosity)
        if bars:
            told.enable_progress_bar()


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """A context in which the logger `name` drops what is below an error; restores its level at the end."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
