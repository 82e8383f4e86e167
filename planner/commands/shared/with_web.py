"""What `plan web` needs before it may serve: the framework and the server installed."""

from __future__ import annotations

import importlib.util

from planner.foundation.errors import InputError, Problem

PACKAGES = ("starlette", "uvicorn")


def require_web(command: str) -> None:
    """Raises InputError where the extra `web` is not installed. Call it before importing
    planner.report.web."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            Problem(
                where=f"plan {command}",
                fault=f"needs {' and '.join(missing)}, not installed; plan compare --html needs neither.",
                fix="pip install 'shardwise[web]'",
            )
        )
