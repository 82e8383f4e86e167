"""The choices of a strategy by the keys of `--fix`: what a strategy chose, and which values there are."""

from __future__ import annotations

import dataclasses
from itertools import permutations

from planner.foundation.divisors import divisors
from planner.foundation.errors import InputError, Problem
from planner.foundation.suggest import nearest
from planner.job.problem import PlanningProblem
from planner.search.space import MAX_CHUNKS, MAX_MICRO_BATCH, MAX_ORDERED, Pins, parse_pins
from planner.strategy.strategy import CpExchange, Offload, Recompute, Schedule, Strategy

Choice = int | bool | str | None
"""The value of a key; None where a strategy mixes several, or keeps the order of a cluster's groups."""

KEYS = tuple(Pins.__dataclass_fields__)


def chosen(strategy: Strategy, key: str) -> Choice:
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


def pinned(pins: Pins) -> dict[str, Choice]:
    """The keys that pins fix, with their values."""
    values = {key: getattr(pins, key) for key in KEYS}
    return {key: _typed(v) for key, v in values.items() if v is not None}


def _typed(value: Choice | tuple[int, ...]) -> Choice:
    """A value as it is typed, where that is no number or truth value."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, str) else value


def keeps(strategy: Strategy, pins: Pins) -> bool:
    """Whether a strategy is one of those that pins leave."""
    return all(chosen(strategy, key) == value for key, value in pinned(pins).items())


def freed(pins: Pins, key: str) -> Pins:
    """The pins with one key left open."""
    return dataclasses.replace(pins, **{key: None})


def text(key: str, value: Choice) -> str:
    """KEY=VALUE as it is typed."""
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def values_of(problem: PlanningProblem, key: str) -> list[Choice]:
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


def parse_choice(typed: str, problem: PlanningProblem, flag: str) -> tuple[str, Pins]:
    """The key and the pin of a KEY=VALUE text. Raises InputError with the nearest legal keys or values."""
    key, separator, value = (part.strip() for part in typed.partition("="))
    key = key.lower().replace("-", "_")
    where = f"{flag} {typed[:80]}"
    if not separator:
        raise InputError(Problem(where=where, fault="needs the form KEY=VALUE.", legal=", ".join(KEYS)))
    if key not in KEYS:
        near = nearest(key[:40], KEYS, count=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(
            Problem(where=where, fault=f"no choice is called '{key[:40]}'.{hint}", legal=", ".join(KEYS))
        )
    try:
        return key, parse_pins((f"{key}={value}",))
    except InputError as error:
        fault = error.problems[0].fault
    values = values_of(problem, key)
    number = value.lstrip("-").isdigit() and len(value) < 10 and key != "sequence_parallel"
    order = nearest_first(values, int(value)) if number else values
    shown = ", ".join(text(key, each).partition("=")[2] for each in order[:8])
    raise InputError(Problem(where=where, fault=fault, legal=shown, fix=f"{flag} {key}=VALUE"))
