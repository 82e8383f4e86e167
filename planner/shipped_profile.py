"""The shipped profile that fits a device best: measured on it, else fitted to runs on it among others."""

from __future__ import annotations

import functools

from planner.catalog import profile_files
from planner.profile import Profile, load_profile


def shipped_profile(device: str) -> Profile | None:
    """The profile for a device's name; None where none is shipped."""
    fitting = [profile for profile in shipped_profiles() if device in profile.devices]
    return max(fitting, key=lambda profile: (profile.device == device, profile.created), default=None)


@functools.cache
def shipped_profiles() -> tuple[Profile, ...]:
    """All shipped profiles."""
    return tuple(load_profile(path) for path in profile_files())
