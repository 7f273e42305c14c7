"""What a measurement gives back, and where it may keep large files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One measured value against its bar. `ok` is None when it could not be measured; `detail` then says why."""

    name: str
    value: Any
    bar: str
    ok: bool | None
    detail: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON: the last thing that a measurement prints."""
        return json.dumps(asdict(self), default=str)


def work_folder() -> Path:
    """Where checkpoints made for measurements are kept: $EDGEMOE_BENCH_DIR, or .bench in the checkout."""
    folder = Path(os.environ.get("EDGEMOE_BENCH_DIR", Path(__file__).parent.parent / ".bench")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
