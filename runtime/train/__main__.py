"""`python -m runtime.train PLAN ...` is `plan train PLAN ...`, for launchers that start Python modules."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from planner.cli import cli

    cli.main(["train", *sys.argv[1:]])
