"""What tests of several folders share: stand-ins, checkpoints, workloads."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout, from which code in other processes finds `tests.support`."""
