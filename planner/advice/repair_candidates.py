"""The single changes that may give an infeasible problem a plan, and the least of each kind.

A change of an amount (nodes, a shorter sequence, another batch) is the nearest for which some strategy keeps
rules, pins and limit (planner.search.least_memory.fitting); whether the others do is asked when they are
solved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from planner.advice.engine_changes import accepted
from planner.advice.what_if import Change, lora, narrower, nodes_of, other_optimizers, with_limit, with_nodes
from planner.advice.what_if import with_workload as changed_workload
from planner.foundation.frozen import frozen
from planner.foundation.units import MIB, format_bytes
from planner.job.problem import PlanningProblem
from planner.search.least_memory import Need, Over, Survey, fitting
from planner.search.space import shapes
from planner.strategy.fix_keys import Pins, freed, pinned, text
from planner.strategy.placement import is_mixed
from planner.strategy.strategy import Degrees, Offload, Strategy

DOUBLINGS = 6
"""Times that the number of nodes is doubled before more nodes are given up."""
MAX_DEVICES = 8192
FEW = 4
"""Numbers of nodes or batches that are tried one by one; among more, the least is found by bisection."""
SEQ_PARTS = 16
"""Shorter sequences are tried in steps of this part of the given one, then by halves."""
MIN_SEQ = 128
MAX_BATCH_STEPS = 512


@frozen
class Candidate:
    """A change to try, with the pins that are left under it; `kind` is alike for changes of one flag.

    `fits` is a strategy that keeps rules, pins and limit then, where one is known before it is looked for.
    """

    kind: str
    change: Change
    pins: Pins
    hypothetical: bool = False
    fits: Strategy | None = None


def candidates(problem: PlanningProblem, pins: Pins, found: Survey, over: Over) -> Iterator[Candidate]:
    """Every single change that may help, the cheapest to try first."""
    yield from _freed(problem, pins)
    if found.need is not None:
        yield _larger_limit(problem, pins, found.need)
    same = [*accepted(problem), *other_optimizers(problem), *lora(problem), *narrower(problem)]
    for change in same:
        yield Candidate(kind=change.flag.split()[0], change=change, pins=pins)
    if found.need is None:
        yield from _other_batches(problem, pins)
    yield from _other_nodes(problem, pins, over, fewer=found.need is None)
    yield from _shorter(problem, pins, over)
    if found.need is not None:
        yield from _more_pins(problem, pins, over)


def _freed(problem: PlanningProblem, pins: Pins) -> Iterator[Candidate]:
    for key, value in pinned(pins).items():
        change = Change(
            change=f"{key} free instead of {text(key, value).partition('=')[2]}",
            flag=f"leave out --fix {text(key, value)}",
            problem=problem,
        )
        yield Candidate(kind=f"fix {key}", change=change, pins=freed(pins, key))


def all_freed(problem: PlanningProblem, pins: Pins) -> Candidate:
    change = Change(change="all pinned choices free", flag="leave out every --fix", problem=problem)
    return Candidate(kind="fix", change=change, pins=Pins())


def _more_pins(problem: PlanningProblem, pins: Pins, over: Over) -> Iterator[Candidate]:
    """Choices that the search takes only when they are asked for: context and expert ranks, host memory."""
    devices, experts = problem.cluster.devices, [each.count for each in problem.model.experts]
    degrees = [2**power for power in range(1, 8) if devices % 2**power == 0]
    if pins.cp is None:
        yield from _first_fitting(problem, pins, over, "cp", degrees, "ranks share out each sequence")
    if pins.ep is None and experts:
        legal = [degree for degree in degrees if experts[0] % degree == 0]
        yield from _first_fitting(problem, pins, over, "ep", legal, "ranks share out the experts")
    if pins.offload is None:
        for offload, what in (
            (Offload.OPTIMIZER, "optimizer state"),
            (Offload.ACTIVATIONS, "kept activations"),
        ):
            change = Change(change=f"{what} in host memory", flag=f"--fix offload={offload}", problem=problem)
            yield Candidate(kind="offload", change=change, pins=dataclasses.replace(pins, offload=offload))


def _first_fitting(
    problem: PlanningProblem, pins: Pins, over: Over, key: str, degrees: list[int], what: str
) -> Iterator[Candidate]:
    for degree in degrees:
        more = dataclasses.replace(pins, **{key: degree})  # type: ignore[arg-type]
        if fitting(problem, more, over) is not None:
            change = Change(change=f"{degree} {what}", flag=f"--fix {key}={degree}", problem=problem)
            yield Candidate(kind=f"fix {key}", change=change, pins=more)
            return


def _larger_limit(problem: PlanningProblem, pins: Pins, need: Need) -> Candidate:
    """The least limit that suffices; more than the device has is another device."""
    usable = min(group.device.usable_memory_bytes for group in problem.cluster.groups)
    flag = f"--memory-limit {need.limit_bytes // MIB}MiB"
    words = f"a memory limit of {format_bytes(need.limit_bytes)}"
    beyond = need.limit_bytes > usable
    if beyond and is_mixed(problem.cluster):
        short = format_bytes(need.limit_bytes - problem.memory_limit_bytes)
        words = f"devices that give a program {short} more each"
    elif beyond:
        words = (
            f"devices that give a program {format_bytes(need.limit_bytes)} each "
            f"({problem.device.name} gives {format_bytes(usable)})"
        )
    change = Change(change=words, flag=flag, problem=with_limit(problem, need.limit_bytes))
    return Candidate(kind="--memory-limit", change=change, pins=pins, hypothetical=beyond, fits=need.strategy)


def _other_nodes(problem: PlanningProblem, pins: Pins, over: Over, *, fewer: bool) -> Iterator[Candidate]:
    now = nodes_of(problem.cluster)
    if now is None or pins.dp is not None:
        return

    def fits(nodes: int) -> bool:
        changed = with_nodes(problem, nodes)
        return changed is not None and fitting(changed, pins, over) is not None

    numbers = [_least_nodes(now, problem.cluster.devices_per_node, fits)]
    if fewer:
        numbers.append(next((n for n in range(now - 1, max(0, now - 1 - FEW), -1) if fits(n)), None))
    for nodes in numbers:
        changed = None if nodes is None else with_nodes(problem, nodes)
        if changed is not None:
            change = Change(
                change=f"{nodes} nodes ({changed.cluster.devices} devices) instead of {now}",
                flag=f"--cluster {changed.cluster.name}",
                problem=changed,
            )
            yield Candidate(kind="--cluster", change=change, pins=pins)


def _least_nodes(now: int, per_node: int, fits: Callable[[int], bool]) -> int | None:
    """The least number above `now` that fits: by doubling, then one by one or by bisection between."""
    low, high = now, 2 * now
    for _ in range(DOUBLINGS):
        if high * per_node > MAX_DEVICES:
            return None
        if fits(high):
            break
        low, high = high, 2 * high
    else:
        return None
    while high - low > FEW:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return next((nodes for nodes in range(low + 1, high) if fits(nodes)), high)


def _shorter(problem: PlanningProblem, pins: Pins, over: Over) -> Iterator[Candidate]:
    """The longest sequence that fits, in steps of a sixteenth, then by halves."""
    seq = problem.workload.seq
    step = seq // SEQ_PARTS
    lengths = [step * part for part in range(SEQ_PARTS - 1, 0, -1)] if seq % SEQ_PARTS == 0 else []
    lengths += [seq >> power for power in range(1, 24) if seq >> power < min([seq, *lengths])]
    lengths = [length for length in lengths if length >= MIN_SEQ]

    def fits(length: int) -> bool:
        return fitting(changed_workload(problem, seq=length), pins, over) is not None

    if not lengths or not fits(lengths[-1]):
        return
    low, high = 0, len(lengths) - 1  # lengths fall: the first that fits is the longest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(lengths[middle]) else (middle + 1, high)
    change = Change(
        change=f"sequences of {lengths[high]} tokens instead of {seq}",
        flag=f"--seq {lengths[high]}",
        problem=changed_workload(problem, seq=lengths[high]),
    )
    yield Candidate(kind="--seq", change=change, pins=pins)


def _other_batches(problem: PlanningProblem, pins: Pins) -> Iterator[Candidate]:
    """The nearest batches to either side for which a shape keeps the rules and fits."""
    batch = problem.workload.batch

    def legal(number: int) -> bool:
        changed = changed_workload(problem, batch=number)
        return any(isinstance(shape, Degrees) for shape in shapes(changed, pins))

    steps = min(MAX_BATCH_STEPS, 2 * problem.cluster.devices)
    for sign in (-1, 1):
        numbers = (batch + sign * step for step in range(1, steps + 1) if batch + sign * step >= 1)
        nearest = next((number for number in numbers if legal(number)), None)
        if nearest is not None:
            change = Change(
                change=f"a batch of {nearest} sequences instead of {batch}",
                flag=f"--batch {nearest}",
                problem=changed_workload(problem, batch=nearest),
            )
            yield Candidate(kind=f"--batch {sign}", change=change, pins=pins)
