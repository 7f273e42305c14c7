"""The model that ships with edgemoe, and the tasks that it was trained for."""

from __future__ import annotations

from pathlib import Path

from edgemoe.errors import CheckpointError

DEMO_NAME = "edgemoe-demo"
"""The name of the shipped model in results and messages."""


def demo_folder() -> Path:
    """The folder of the shipped checkpoint. Raises CheckpointError if the installation lacks it."""
    folder = Path(__file__).parent / "model"
    if not (folder / "model.safetensors").exists():
        raise CheckpointError(
            "the shipped model is missing from this installation: install edgemoe again, or give model="
        )
    return folder
