"""Every error that edgemoe raises on purpose.

EdgeMoEError
├── CheckpointError   a checkpoint that cannot be used
├── PlanError         what was asked for does not fit this machine
└── RequestError      a prompt or a setting that cannot be served

Each message is one sentence for the user: the value, the limit, and the flag or command that mends it.
"""

from __future__ import annotations


class EdgeMoEError(Exception):
    """The root: catching it catches everything that edgemoe raises on purpose."""


class CheckpointError(EdgeMoEError):
    """A checkpoint is missing, damaged, unsupported or unsafe."""


class PlanError(EdgeMoEError):
    """The model, context or expert cache asked for does not fit the memory that is there."""


class RequestError(EdgeMoEError):
    """A prompt or sampling setting that cannot be served; the engine stays usable."""
