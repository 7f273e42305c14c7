"""Run Mixture-of-Experts language models that are larger than the device they run on.

Importing this package is cheap: what needs PyTorch is imported when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from edgemoe.errors import CheckpointError, EdgeMoEError, LogitsError, PlanError, RequestError
from edgemoe.sampling import Sampling
from edgemoe.version import __version__

if TYPE_CHECKING:
    from edgemoe.async_engine import AsyncEngine
    from edgemoe.checkpoint.chat_template import ChatPrompt
    from edgemoe.config import EngineConfig
    from edgemoe.engine import Engine
    from edgemoe.found_model import FoundModel, find_models
    from edgemoe.model_host import ModelHost
    from edgemoe.plan.plan import Plan
    from edgemoe.results import Chunk, Completion, Progress, Stats, Timings, TokenLogprob, ToolCall
    from edgemoe.stream import Stream

__all__ = [
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

_HERE = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_HERE, "cache")):
    # Python was started in a checkout, and has found this folder there: `cache`, `prefetch` and `cli` lie beside it.
    __path__.append(os.path.dirname(_HERE))

_LAZY = {
    "AsyncEngine": "async_engine",
    "ChatPrompt": "checkpoint.chat_template",
    "Engine": "engine",
    "ModelHost": "model_host",
    "EngineConfig": "config",
    "FoundModel": "found_model",
    "find_models": "found_model",
    "Plan": "plan.plan",
    "Chunk": "results",
    "Completion": "results",
    "Progress": "results",
    "Stats": "results",
    "Stream": "stream",
    "Timings": "results",
    "TokenLogprob": "results",
    "ToolCall": "results",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"edgemoe.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'edgemoe' has no attribute {name!r}")
