"""Constants of host and device, and contention, as families of the profiler."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from planner.foundation.decode import decode
from planner.foundation.frozen import frozen
from planner.model.spec import ModelSpec
from planner.model.workload import Precision
from planner.profile.profile import Constant, ContentionSample
from runtime.profiler.measure_contention import Contended, measure_contention
from runtime.profiler.measure_device import OF_CUDA, measure_communicators
from runtime.profiler.measure_host import CONSTANTS, measure_host
from runtime.profiler.profile_cases import Reading, readings
from runtime.profiler.timing import Effort


@frozen
class HostCase:
    """One group of constants that are measured together."""

    group: str

    def label(self) -> str:
        return f"constants of {self.group}"


@dataclass(frozen=True)
class HostFamily:
    """Rates, wrappers, pipeline actions, optimizer."""

    device_type: str
    precision: Precision
    effort: Effort

    @property
    def name(self) -> str:
        return "host"

    def cases(self) -> Sequence[HostCase]:
        groups = [group for group in CONSTANTS if self.device_type == "cuda" or group not in OF_CUDA]
        return [HostCase(group=group) for group in groups]

    def together(self, case: HostCase) -> Hashable:
        return None

    def measure(self, cases: Sequence[HostCase]) -> Iterator[Reading]:
        groups = [case.group for case in cases]
        for message in measure_host(groups, self.device_type, self.precision, self.effort):
            constants = (
                decode(Constant, each, source="a measuring process") for each in message["constants"]
            )
            yield Reading(samples=tuple(constants))


@frozen
class CommunicatorCase:
    """One more process group over `ranks` devices of this node."""

    ranks: int

    def label(self) -> str:
        return f"a communicator of {self.ranks} ranks"


@dataclass(frozen=True)
class CommunicatorFamily:
    """Device memory of communicators; they take none on a CPU, and one device has none."""

    ranks: int
    on_cuda: bool

    @property
    def name(self) -> str:
        return "communicators"

    def cases(self) -> Sequence[CommunicatorCase]:
        return [CommunicatorCase(ranks=self.ranks)] if self.on_cuda and self.ranks > 1 else []

    def together(self, case: CommunicatorCase) -> Hashable:
        return None

    def measure(self, cases: Sequence[CommunicatorCase]) -> Iterator[Reading]:
        for case in cases:
            yield from readings(Constant, measure_communicators(case.ranks))


@frozen
class ContentionCase:
    """Up to `ranks` ranks of a node at work at once."""

    ranks: int

    def label(self) -> str:
        return f"contention of up to {self.ranks} ranks"


@dataclass(frozen=True)
class ContentionFamily:
    """Slowdown of compute by the number of ranks at work on `cores`. Accelerators do not share theirs."""

    model: ModelSpec
    seq: int
    ranks: int
    cores: int
    precision: Precision
    window_s: float
    on_cuda: bool

    @property
    def name(self) -> str:
        return "contention"

    def cases(self) -> Sequence[ContentionCase]:
        return [ContentionCase(ranks=self.ranks)]

    def together(self, case: ContentionCase) -> Hashable:
        return None

    def measure(self, cases: Sequence[ContentionCase]) -> Iterator[Reading]:
        for case in cases:
            yield Reading(samples=tuple(self._free(case) if self.on_cuda else self._measured(case)))

    def _free(self, case: ContentionCase) -> list[ContentionSample]:
        return [ContentionSample(active=n, slowdown=1.0) for n in range(1, case.ranks + 1)]

    def _measured(self, case: ContentionCase) -> list[ContentionSample]:
        taken = measure_contention(
            self.model, self.seq, case.ranks, self.cores, self.precision, self.window_s
        )
        return contention(list(taken), self.cores)


def contention(taken: Sequence[Contended], cores: int) -> list[ContentionSample]:
    """The slowdown with each number of ranks at work: of rounds, each against its block alone, the median."""
    rounds: dict[int, dict[int, list[float]]] = {}
    for each in taken:
        rounds.setdefault(each.active, {}).setdefault(each.turn, []).append(each.seconds)
    alone = {turn: statistics.fmean(seconds) for turn, seconds in rounds.pop(0).items()}
    samples: list[ContentionSample] = []
    most = 1.0
    for active, turns in sorted(rounds.items()):
        ratios = [statistics.fmean(seconds) / alone[turn] for turn, seconds in turns.items()]
        most = max(most, statistics.median(ratios))  # more ranks never slow each other less: that is noise
        samples.append(ContentionSample(active=active, slowdown=max(1.0, active / cores) * most))
    return samples
