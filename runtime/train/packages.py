"""Packages that only some options need: asked for where the option is used, and named where missing."""

from __future__ import annotations

import importlib.util

from planner.foundation.errors import InputError, Problem


def require_package(module: str, extra: str, use: str) -> None:
    """Raises InputError, with the way to get it, where a package that an option needs is not installed."""
    if importlib.util.find_spec(module) is None:
        raise InputError(
            Problem(
                where=use,
                fault=f"needs the package {module}, which is not installed.",
                fix=f"pip install 'shardwise[{extra}]'",
            )
        )
