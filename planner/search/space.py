"""Which global shapes exist for a problem: every legal combination of degrees, and why others are not.

Candidates come from divisors; each is then asked to every rule, and the first rule that it breaks is
counted. Pins narrow the candidates before they are made. Schedules that the runtime does not execute are
candidates only where they are pinned (`--fix schedule=zb-h1`), so that a plan can be trained by default.
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.codec import noun
from planner.divisors import divisors
from planner.errors import InputError, Problem
from planner.estimate import Rejected
from planner.execution import EXECUTED_SCHEDULES
from planner.problem import PlanningProblem
from planner.rules import broken_rule
from planner.strategy import CpExchange, Degrees, Offload, Recompute, Schedule, Zero

MAX_MICRO_BATCH = 64
"""Larger micro-batches than this are not tried: products are at full rate long before, memory is not."""
MAX_CHUNKS = 4
"""More stages a rank than this cost more messages than the bubble that they save."""


@noun
class Pins:
    """Choices that the user fixed; None leaves one open."""

    tp: int | None = None
    pp: int | None = None
    chunks: int | None = None
    schedule: Schedule | None = None
    dp: int | None = None
    cp: int | None = None
    ep: int | None = None
    zero: int | None = None
    micro_batch: int | None = None
    sequence_parallel: bool | None = None
    recompute: Recompute | None = None
    cp_exchange: CpExchange | None = None
    etp: int | None = None
    offload: Offload | None = None

    @property
    def recomputes(self) -> tuple[Recompute, ...]:
        """The recompute options that a recipe may use."""
        return tuple(Recompute) if self.recompute is None else (self.recompute,)


_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
_CHOICES = {
    "schedule": Schedule,
    "recompute": Recompute,
    "cp_exchange": CpExchange,
    "offload": Offload,
}


def parse_pins(texts: tuple[str, ...]) -> Pins:
    """Pins from `--fix KEY=VALUE` texts. Raises InputError listing every wrong one."""
    values: dict[str, object] = {}
    problems: list[Problem] = []
    for text in texts:
        key, separator, value = text.partition("=")
        try:
            if not separator:
                raise ValueError("needs the form KEY=VALUE")
            values[key] = _pin(key, value.strip().lower())
        except ValueError as error:
            problems.append(Problem(where=f"--fix {text}", fault=f"{error}."))
    if problems:
        raise InputError(*problems)
    return Pins(**values)  # type: ignore[arg-type]


def refuse_offload(pins: Pins) -> None:
    """Raises InputError where offloading is pinned: the search does not know it."""
    if pins.offload not in (None, Offload.NONE):
        raise InputError(
            Problem(
                where=f"--fix offload={pins.offload}",
                fault="cannot be solved for: the search weighs recomputation against memory, not yet copies "
                "to host memory.",
                fix="estimate a strategy with it: plan estimate --fix offload=... --fix tp=... and so on",
            )
        )


def _pin(key: str, value: str) -> object:
    if key in _CHOICES:
        choice = _CHOICES[key]
        if value not in list(choice):
            raise ValueError(f"'{value}' is not one of {', '.join(choice)}")
        return choice(value)
    if key == "sequence_parallel":
        if value not in _BOOLEANS:
            raise ValueError(f"'{value}' is not true or false")
        return _BOOLEANS[value]
    if key not in Pins.__dataclass_fields__:
        raise ValueError(f"unknown key; known are {', '.join(Pins.__dataclass_fields__)}")
    low = 0 if key == "zero" else 1
    if not value.isdigit() or not low <= int(value) <= (3 if key == "zero" else 10**6):
        raise ValueError(
            f"'{value}' is not a whole number from {low} up" + (" to 3" if key == "zero" else "")
        )
    return int(value)


def _candidates(pin: int | None, values: list[int]) -> list[int]:
    return values if pin is None else [pin]


def shapes(problem: PlanningProblem, pins: Pins) -> Iterator[Degrees | Rejected]:
    """Every candidate: its degrees if legal, or the first rule that it breaks."""
    devices = problem.cluster.devices
    for tp in _candidates(pins.tp, divisors(devices)):
        for pp in _candidates(pins.pp, [d for d in divisors(devices) if d <= problem.model.layers]):
            if devices % (tp * pp):
                yield Rejected(rule="world_size", detail=f"tp={tp} x pp={pp} does not divide {devices}.")
                continue
            dp = pins.dp if pins.dp is not None else devices // (tp * pp * (pins.cp or 1))
            yield from _with_data(problem, pins, tp, pp, max(dp, 1))


def _with_data(
    problem: PlanningProblem, pins: Pins, tp: int, pp: int, dp: int
) -> Iterator[Degrees | Rejected]:
    probe = Degrees(tp=tp, pp=pp, dp_replicate=dp, cp=pins.cp or 1, ep=pins.ep or 1)
    if problem.workload.batch % dp:
        probe_rule = broken_rule(problem, probe)
        assert probe_rule is not None
        yield probe_rule
        return
    local = problem.workload.batch // dp
    micro_batches = [d for d in divisors(local) if d <= MAX_MICRO_BATCH]
    for micro_batch in _candidates(pins.micro_batch, micro_batches):
        for zero, shard in _shardings(problem, pins, tp, dp):
            for sequence_parallel in _sequence_parallels(pins, tp):
                for schedule, chunks in _schedules(pins, pp):
                    degrees = Degrees(
                        tp=tp,
                        pp=pp,
                        chunks=chunks,
                        schedule=schedule,
                        dp_replicate=dp // shard if dp % shard == 0 else dp,
                        dp_shard=shard if dp % shard == 0 else 1,
                        cp=pins.cp or 1,
                        ep=pins.ep or 1,
                        zero=zero,
                        micro_batch=micro_batch,
                        num_micro_batches=max(1, local // micro_batch),
                        sequence_parallel=sequence_parallel,
                        cp_exchange=pins.cp_exchange or CpExchange.RING,
                        etp=pins.etp,
                    )
                    yield broken_rule(problem, degrees) or degrees


def _shardings(problem: PlanningProblem, pins: Pins, tp: int, dp: int) -> list[tuple[Zero, int]]:
    """ZeRO stages with their shard degree: all data ranks, or those of one node (hybrid sharding)."""
    if dp == 1:
        return [(Zero(pins.zero or 0), 1)]
    within = problem.cluster.devices_per_node // tp
    shards = {dp} | ({within} if 1 < within < dp and dp % within == 0 else set())
    zeros = list(Zero) if pins.zero is None else [Zero(pins.zero)]
    return [(z, s) for z in zeros for s in (sorted(shards) if z is not Zero.NONE else [1])]


def _sequence_parallels(pins: Pins, tp: int) -> list[bool]:
    if pins.sequence_parallel is not None:
        return [pins.sequence_parallel]
    return [False, True] if tp > 1 else [False]


def _schedules(pins: Pins, pp: int) -> list[tuple[Schedule, int]]:
    """Schedules with their chunks a rank; without a pipeline there is one, and it is nominal."""
    if pp == 1 and pins.schedule is None:
        return [(Schedule.ONE_F_ONE_B, pins.chunks or 1)]
    result = []
    for schedule in EXECUTED_SCHEDULES if pins.schedule is None else [pins.schedule]:
        if schedule is Schedule.INTERLEAVED:
            counts = _candidates(pins.chunks, list(range(2, MAX_CHUNKS + 1)))
        elif schedule.v_shaped:
            counts = [pins.chunks or 2]
        else:
            counts = [1] if pins.schedule is None and pins.chunks in (None, 1) else [pins.chunks or 1]
        result += [(schedule, count) for count in counts]
    return result
