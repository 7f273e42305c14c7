"""`python -m edgemoe`: the command `edgemoe` of this very Python."""

from __future__ import annotations

import sys

from edgemoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
