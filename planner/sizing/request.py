"""SizingRequest: what is asked of a sizing: the run, its limits, and which hardware may do it."""

from __future__ import annotations

from planner.foundation.frozen import frozen
from planner.job.objective import Goal
from planner.job.overheads import NOTHING_SAID, Upkeep
from planner.model.spec import ModelSpec
from planner.model.workload import Precision, Workload
from planner.profile.profile import Profile
from planner.sizing.offer import Offer


@frozen
class SizingRequest:
    """A run, and the offers that may do it.

    `workload.tokens` is the whole run; where `precision` is None, each device computes in its usual one.
    What `upkeep` does not say is as usual (planner.sizing.usual_overheads). `counts` are numbers of nodes to
    try; None: a ladder up to `most_devices`, of which `least` asks for the fewest that keep the deadline and
    the cheapest; unless `thorough`, what can neither be the cheapest nor the smallest even at its devices'
    peak is not planned then. `profile` counts for the device it was measured on, or if it was fitted for all;
    other devices have their shipped ones.
    """

    model: ModelSpec
    workload: Workload
    offers: tuple[Offer, ...]
    goal: Goal
    tokens_note: str = ""
    precision: Precision | None = None
    upkeep: Upkeep = NOTHING_SAID
    counts: tuple[int, ...] | None = None
    most_devices: int = 16384
    least: bool = False
    thorough: bool = True
    memory_limit_bytes: int | None = None
    profile: Profile | None = None
