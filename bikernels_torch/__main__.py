"""The command line: python -m bikernels_torch doctor | audit | bench."""

from __future__ import annotations

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
