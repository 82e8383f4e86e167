"""What a command needs before it may use the runtime: torch installed, and its chatter off."""

from __future__ import annotations

import importlib.util
import os

from planner.foundation.errors import InputError, Problem

_QUIET = {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Read by torch's libraries as they load: without it, each use of the profiler prints lines to stderr."""


def require_torch(command: str) -> None:
    """Raises InputError where torch is not installed. Call it before the first import of the runtime."""
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            Problem(
                where=f"plan {command}",
                fault="needs torch, which is not installed; planning alone does not.",
                fix="pip install 'shardwise[runtime]'",
            )
        )
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
