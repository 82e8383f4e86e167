"""The shipped profile that fits a device best: measured on it, else fitted to runs on it among others."""

from __future__ import annotations

import functools
from pathlib import Path

from planner.hardware.catalog import profile_files
from planner.profile.profile import Profile, load_profile


@functools.cache
def shipped_profile(device: str) -> Profile | None:
    """The profile for a device's name; None where none is shipped."""
    named = (path for path in profile_files() if device in path.read_text(encoding="utf-8"))
    fitting = [profile for profile in map(_loaded, named) if device in profile.devices]
    return max(fitting, key=lambda profile: (profile.device == device, profile.created), default=None)


@functools.cache
def _loaded(path: Path) -> Profile:
    return load_profile(path)


def shipped_profiles() -> tuple[Profile, ...]:
    """All shipped profiles."""
    return tuple(map(_loaded, profile_files()))
