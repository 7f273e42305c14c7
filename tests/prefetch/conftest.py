"""The cache's own stand-ins serve here as well: prefetching is tested over a real cache and a link that is told."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "cache"))
