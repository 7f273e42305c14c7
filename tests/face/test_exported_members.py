from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import edgemoe

EXPORTED = [
    "AsyncEngine",
    "ChatPrompt",
    "CheckpointError",
    "Chunk",
    "Completion",
    "EdgeMoEError",
    "Engine",
    "EngineConfig",
    "FoundModel",
    "LogitsError",
    "ModelHost",
    "Plan",
    "PlanError",
    "Progress",
    "RequestError",
    "Sampling",
    "Stats",
    "Stream",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "__version__",
    "find_models",
]


def test_the_public_names_are_these_and_no_more() -> None:
    assert edgemoe.__all__ == EXPORTED
    assert len(edgemoe.__all__) <= 24


@pytest.mark.parametrize("name", EXPORTED)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(edgemoe, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        edgemoe.Motor  # noqa: B018


def test_errors_are_one_tree() -> None:
    for error in (edgemoe.CheckpointError, edgemoe.PlanError, edgemoe.RequestError):
        assert error.__bases__ == (edgemoe.EdgeMoEError,)
    assert edgemoe.LogitsError.__bases__ == (edgemoe.RequestError,)
    assert edgemoe.EdgeMoEError.__bases__ == (Exception,)


@pytest.mark.parametrize(
    "statement", ["import edgemoe", "from edgemoe import Sampling, EdgeMoEError; Sampling(top_k=3)"]
)
def test_importing_is_cheap(statement: str, tmp_path: Path) -> None:
    heavy = {"torch", "transformers", "numpy", "numba", "safetensors", "huggingface_hub", "psutil"}
    program = f"{statement}\nimport sys\nprint(sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")
