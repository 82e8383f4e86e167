"""What `plan profile` says at its end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from planner.commands.running.profile_text import describe
from planner.hardware.local_machine import Clocks
from planner.profile.profile import FamilyFit
from tests.profile_samples import cpu


def test_errors_of_families_and_clocks_are_told() -> None:
    clocks = Clocks(
        sm_hz=1.5e9,
        sm_lowest_hz=1.4e9,
        memory_hz=2.6e9,
        power_w=650.5,
        temperature_c=66,
        throttled={"power cap": 0.25},
        samples=40,
    )
    fits = (
        FamilyFit(family="layers of a model", cases=90, taken=30, error=0.042),
        FamilyFit(family="host", cases=5, taken=5),
    )
    profile = dataclasses.replace(cpu(), clocks=clocks, fits=fits, skipped=("host: it: died",))
    text = describe(profile, Path("p.json"), 12.5)
    assert "4.2%, layers of a model: 30 of 90 cases measured" in text and "host: 5" not in text
    assert "1.5 GHz, no lower than 1.4 GHz, 650 W, held back 25% of the time by power cap" in text
    assert "host: it: died" in text and "12.5 s" in text
