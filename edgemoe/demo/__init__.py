"""The model that ships with edgemoe, and the tasks that it was trained for."""

from __future__ import annotations

from pathlib import Path

from edgemoe.errors import CheckpointError

DEMO_NAME = "edgemoe-demo"
"""What results and messages call the shipped model."""


def demo_folder() -> Path:
    """The folder of the shipped checkpoint; CheckpointError when the installation lacks it."""
    folder = Path(__file__).parent / "model"
    if not (folder / "model.safetensors").exists():
        raise CheckpointError(
            "the shipped model is missing from this installation: install edgemoe again, or give model="
        )
    return folder
