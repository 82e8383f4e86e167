"""Collectives of a world on this machine, as a family of the profiler."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from planner.profile import CommSample
from runtime.families import Reading, readings
from runtime.measure_comm import CommCase, comm_cases, measure_comm
from runtime.timing import Effort


@dataclass(frozen=True)
class CommFamily:
    """Every collective over every layout of groups at several sizes. A single device has none."""

    world: int
    device_type: str
    sizes_bytes: tuple[int, ...]
    effort: Effort

    @property
    def name(self) -> str:
        return f"collectives of {self.world} ranks"

    def cases(self) -> Sequence[CommCase]:
        return comm_cases(self.world, self.sizes_bytes)

    def together(self, case: CommCase) -> Hashable:
        return None

    def measure(self, cases: Sequence[CommCase]) -> Iterator[Reading]:
        return readings(CommSample, measure_comm(cases, self.world, self.device_type, self.effort))
