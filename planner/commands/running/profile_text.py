"""A profile that was just taken, for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.hardware.local_machine import Clocks
    from planner.profile.profile import FamilyFit, Profile


def describe(profile: Profile, output: Path, wall_s: float) -> str:
    """What was measured, for people."""
    from planner.commands.shared.text import pairs
    from planner.cost.constants import spec_of
    from planner.foundation.units import format_seconds

    flops, copy = profile.constant("gemm_flops"), profile.constant("memory_bytes_per_s")
    facts: list[tuple[str, Any]] = [
        ("profile", str(output)),
        ("device", f"{profile.device} ({profile.devices_per_node} ranks, {profile.backend})"),
        ("layers", f"{len(profile.layers)} samples"),
        ("operators", f"{len(profile.rates)} samples" if profile.rates else None),
        ("collectives", f"{len(profile.comms)} samples"),
        ("constants", str(len(profile.constants))),
        ("products", f"{spec_of('gemm_flops').text(flops)} a rank" if flops else None),
        ("copies", spec_of("memory_bytes_per_s").text(copy) if copy else None),
        ("contention", ", ".join(f"{c.active}: {c.slowdown:.2f}x" for c in profile.contention)),
        *(("known to", _fit_text(fit, fit.error)) for fit in profile.fits if fit.error is not None),
        ("clocks", _clocks_text(profile.clocks) if profile.clocks else None),
        ("taken in", format_seconds(wall_s)),
    ]
    facts += [("skipped", text) for text in profile.skipped]
    return pairs(facts) + "\n"


def _clocks_text(clocks: Clocks) -> str:
    from planner.foundation.units import format_si

    held = "".join(f", held back {share:.0%} of the time by {why}" for why, share in clocks.throttled.items())
    lowest = format_si(clocks.sm_lowest_hz, "Hz")
    return f"{format_si(clocks.sm_hz, 'Hz')}, no lower than {lowest}, {clocks.power_w:.0f} W{held}"


def _fit_text(fit: FamilyFit, error: float) -> str:
    return f"{error:.1%}, {fit.family}: {fit.taken} of {fit.cases} cases measured"
