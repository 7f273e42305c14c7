"""What a measurement takes and gives back, and where it may keep large files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parent.parent
PICTURES = CHECKOUT / "docs" / "benchmarks"


@dataclass(frozen=True, kw_only=True)
class BaseSize:
    """How much is measured. Every measurement has a `Size` of its own: the defaults, and `SMALL` for the tests."""

    small: bool = False
    """Whether this is a run of seconds on a tiny model, which nothing is concluded from."""

    def picture(self, name: str) -> Path:
        """Where a picture goes: into the documentation, or beside the checkpoints where it is of a small run."""
        return (work_folder() if self.small else PICTURES) / f"{name}.svg"

    def keep(self, name: str, data: object) -> None:
        """Writes what the picture `name` is drawn from beside it, so that it can be drawn again."""
        self.picture(name).with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")


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
    folder = Path(os.environ.get("EDGEMOE_BENCH_DIR", CHECKOUT / ".bench")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
