"""The choices of a strategy by the keys of `--fix`: what a strategy chose, and which values there are."""

from __future__ import annotations

import dataclasses
from itertools import permutations

from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.suggest import divisors, nearest_names
from planner.hardware.cluster import ClusterSpec
from planner.job.problem import PlanningProblem
from planner.model.attention import CpExchange
from planner.model.sublayer import Recompute
from planner.strategy.placement import parse_device_order
from planner.strategy.strategy import Offload, Schedule, Strategy

MAX_MICRO_BATCH = 64
"""Larger micro-batches than this are not tried: products are at full rate long before, memory is not."""
MAX_CHUNKS = 4
"""More stages a rank than this cost more messages than the bubble that they save."""
MAX_ORDERED = 3
"""Of more groups of devices than this, only the order of the cluster and its reverse are tried."""


@frozen
class FixedChoices:
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
    device_order: tuple[int, ...] | None = None

    @property
    def offloaded(self) -> Offload:
        """What lies in host memory: nothing, unless it is pinned."""
        return self.offload or Offload.NONE

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


def parse_fixed_choices(texts: tuple[str, ...], cluster: ClusterSpec | None = None) -> FixedChoices:
    """Fixed choices from `--fix KEY=VALUE` texts; an order of the cluster's groups may name their devices.

    Raises InputError listing every wrong one.
    """
    values: dict[str, object] = {}
    problems: list[Problem] = []
    for choice_text in texts:
        key, separator, value = choice_text.partition("=")
        try:
            if not separator:
                raise ValueError("needs the form KEY=VALUE")
            if key == "device_order" and cluster is not None:
                values[key] = parse_device_order(value.strip().lower(), cluster)
            else:
                values[key] = _pin(key, value.strip().lower())
        except InputError as error:
            problems += error.problems
        except ValueError as error:
            problems.append(Problem(where=f"--fix {choice_text}", fault=f"{error}."))
    if problems:
        raise InputError(*problems)
    return FixedChoices(**values)  # type: ignore[arg-type]


def _pin(key: str, value: str) -> object:
    if key in _CHOICES:
        choice = _CHOICES[key]
        if value not in list(choice):
            raise ValueError(f"'{value}' is not one of {', '.join(choice)}")
        return choice(value)
    if key == "device_order":
        places = value.split(",")
        if not all(place.strip().isdigit() for place in places):
            raise ValueError(f"'{value}' is no list of groups of the cluster by number, such as 1,0")
        return tuple(int(place) for place in places)
    if key == "sequence_parallel":
        if value not in _BOOLEANS:
            raise ValueError(f"'{value}' is not true or false")
        return _BOOLEANS[value]
    if key not in FixedChoices.__dataclass_fields__:
        raise ValueError(f"unknown key; known are {', '.join(FixedChoices.__dataclass_fields__)}")
    low = 0 if key == "zero" else 1
    if not value.isdigit() or not low <= int(value) <= (3 if key == "zero" else 10**6):
        raise ValueError(
            f"'{value}' is not a whole number from {low} up" + (" to 3" if key == "zero" else "")
        )
    return int(value)


Choice = int | bool | str | None
"""The value of a key; None where a strategy mixes several, or keeps the order of a cluster's groups."""

FIX_KEYS = tuple(FixedChoices.__dataclass_fields__)


def chosen_value(strategy: Strategy, key: str) -> Choice:
    """What a strategy chose for a key; None where its blocks differ in it."""
    degrees = strategy.degrees
    if key == "recompute":
        used = {option for stage in strategy.stages for option in stage.recompute.options()}
        return str(used.pop()) if len(used) == 1 else None
    if key == "offload":
        offloads = strategy.offloads
        if not offloads:
            return str(Offload.NONE)
        kind = offloads[0]
        whole = all(getattr(stage.offload, kind) == stage.layers for stage in strategy.stages)
        return str(kind) if len(offloads) == 1 and whole else None
    if key == "etp":
        return degrees.expert_tp
    if key == "device_order":
        return _typed(degrees.device_order) if degrees.device_order else None
    value = getattr(degrees, key)
    return str(value) if isinstance(value, str) else int(value) if key == "zero" else value


def fixed_values(pins: FixedChoices) -> dict[str, Choice]:
    """The keys that pins fix, with their values."""
    values = {key: getattr(pins, key) for key in FIX_KEYS}
    return {key: _typed(v) for key, v in values.items() if v is not None}


def _typed(value: Choice | tuple[int, ...]) -> Choice:
    """A value as it is typed, where that is no number or truth value."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, str) else value


def keeps_choices(strategy: Strategy, pins: FixedChoices) -> bool:
    """Whether a strategy is one of those that pins leave."""
    return all(chosen_value(strategy, key) == value for key, value in fixed_values(pins).items())


def without(pins: FixedChoices, key: str) -> FixedChoices:
    """The pins with one key left open."""
    return dataclasses.replace(pins, **{key: None})


def choice_text(key: str, value: Choice) -> str:
    """KEY=VALUE as it is typed."""
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def possible_values(problem: PlanningProblem, key: str) -> list[Choice]:
    """Every value of a key that may be legal for a problem."""
    devices, batch = problem.cluster.devices, problem.workload.batch
    experts = [each.count for each in problem.model.experts]
    match key:
        case "tp" | "dp" | "cp":
            return list(divisors(devices))
        case "pp":
            return [d for d in divisors(devices) if d <= problem.model.layers]
        case "chunks":
            return list(range(1, MAX_CHUNKS + 1))
        case "micro_batch":
            return [d for d in divisors(batch) if d <= MAX_MICRO_BATCH]
        case "ep":
            return [d for d in divisors(experts[0]) if d <= devices] if experts else [1]
        case "etp":
            return list(divisors(problem.cluster.devices_per_node)) if experts else []
        case "zero":
            return [0, 1, 2, 3]
        case "sequence_parallel":
            return [False, True]
        case "device_order":
            groups = len(problem.cluster.groups)
            orders = permutations(range(groups)) if 1 < groups <= MAX_ORDERED else ()
            return [_typed(order) for order in orders]
    kinds = {"schedule": Schedule, "recompute": Recompute, "cp_exchange": CpExchange, "offload": Offload}
    return [str(value) for value in kinds.get(key, ())]


def nearest_first(values: list[Choice], wanted: Choice) -> list[Choice]:
    """Values in order of their distance from the wanted one: by ratio of numbers, else as they come."""
    others = [value for value in values if value != wanted]
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        return others
    near = wanted + 1
    numbers = sorted((max(v + 1, near) / min(v + 1, near), v) for v in others if isinstance(v, int))
    return [value for _, value in numbers]


def parse_choice(typed: str, problem: PlanningProblem, flag: str) -> tuple[str, FixedChoices]:
    """The key and the pin of a KEY=VALUE text. Raises InputError with the nearest legal keys or values."""
    key, separator, value = (part.strip() for part in typed.partition("="))
    key = key.lower().replace("-", "_")
    where = f"{flag} {typed[:80]}"
    if not separator:
        raise InputError(Problem(where=where, fault="needs the form KEY=VALUE.", legal=", ".join(FIX_KEYS)))
    if key not in FIX_KEYS:
        near = nearest_names(key[:40], FIX_KEYS, count=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(
            Problem(where=where, fault=f"no choice is called '{key[:40]}'.{hint}", legal=", ".join(FIX_KEYS))
        )
    try:
        return key, parse_fixed_choices((f"{key}={value}",))
    except InputError as error:
        fault = error.problems[0].fault
    values = possible_values(problem, key)
    number = value.lstrip("-").isdigit() and len(value) < 10 and key != "sequence_parallel"
    order = nearest_first(values, int(value)) if number else values
    shown = ", ".join(choice_text(key, each).partition("=")[2] for each in order[:8])
    raise InputError(Problem(where=where, fault=fault, legal=shown, fix=f"{flag} {key}=VALUE"))
