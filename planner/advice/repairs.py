"""Why a problem has no feasible plan, and the single changes that give it one.

The binding limit is the memory of a device where some shape keeps all rules: the least memory limit at which
a strategy is SAFE is exact (planner.search.least_memory), and what it exceeds the given one by is the
shortfall.
Where no shape keeps the rules, it is the rule that most shapes break first.

A repair is one change, solved: its strategy keeps rules, pins and limit, asked again of a cost model of its
own. Repairs are compared by device-seconds a token of the plan that each gives,

    devices x step time / (sequences x tokens of a step)

which is what the repaired run costs on rented devices, whatever a changed batch or sequence does to a step.
The three cheapest of different kinds are `repairs`; a second optimizer, say, stands in `others` with what
costs more. Half of the time is for the limit that binds. Once time is spent no more are tried, until it is
spent twice where there is none yet. A memory limit above what the device has is never among the three: it
asks for other devices.

The single changes that may give an infeasible problem a plan, and the least of each kind.

A change of an amount (nodes, a shorter sequence, another batch) is the nearest for which some strategy keeps
rules, pins and limit (planner.search.least_memory.fitting); whether the others do is asked when they are
solved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

from planner.advice.resolve import Clock, Effort, Solved, resolved, verified
from planner.advice.what_if import (
    Change,
    accepted,
    lora,
    narrower,
    nodes_of,
    other_optimizers,
    with_limit,
    with_nodes,
)
from planner.advice.what_if import with_workload as changed_workload
from planner.cost.evaluate import CostModel
from planner.foundation.errors import InputError
from planner.foundation.frozen import frozen
from planner.foundation.units import MIB, format_bytes
from planner.job.problem import PlanningProblem
from planner.search.least_memory import Need, Over, Survey, fitting, never, survey
from planner.search.space import shapes
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import (
    FIX_KEYS,
    FixedChoices,
    choice_text,
    chosen_value,
    fixed_values,
    without,
)
from planner.strategy.placement import is_mixed
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Offload, Strategy, even_stages, offloaded

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
    pins: FixedChoices
    hypothetical: bool = False
    fits: Strategy | None = None


def candidates(
    problem: PlanningProblem, pins: FixedChoices, found: Survey, over: Over
) -> Iterator[Candidate]:
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


def _freed(problem: PlanningProblem, pins: FixedChoices) -> Iterator[Candidate]:
    for key, value in fixed_values(pins).items():
        change = Change(
            change=f"{key} free instead of {choice_text(key, value).partition('=')[2]}",
            flag=f"leave out --fix {choice_text(key, value)}",
            problem=problem,
        )
        yield Candidate(kind=f"fix {key}", change=change, pins=without(pins, key))


def all_freed(problem: PlanningProblem, pins: FixedChoices) -> Candidate:
    change = Change(change="all pinned choices free", flag="leave out every --fix", problem=problem)
    return Candidate(kind="fix", change=change, pins=FixedChoices())


def _more_pins(problem: PlanningProblem, pins: FixedChoices, over: Over) -> Iterator[Candidate]:
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
    problem: PlanningProblem, pins: FixedChoices, over: Over, key: str, degrees: list[int], what: str
) -> Iterator[Candidate]:
    for degree in degrees:
        more = dataclasses.replace(pins, **{key: degree})  # type: ignore[arg-type]
        if fitting(problem, more, over) is not None:
            change = Change(change=f"{degree} {what}", flag=f"--fix {key}={degree}", problem=problem)
            yield Candidate(kind=f"fix {key}", change=change, pins=more)
            return


def _larger_limit(problem: PlanningProblem, pins: FixedChoices, need: Need) -> Candidate:
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


def _other_nodes(
    problem: PlanningProblem, pins: FixedChoices, over: Over, *, fewer: bool
) -> Iterator[Candidate]:
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


def _shorter(problem: PlanningProblem, pins: FixedChoices, over: Over) -> Iterator[Candidate]:
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


def _other_batches(problem: PlanningProblem, pins: FixedChoices) -> Iterator[Candidate]:
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


BEST = 3
PATIENCE = 2.0
"""Times the time that is given until which a first repair is looked for."""
SURVEYED = 0.5
"""Part of the time in which the least limit is looked for."""
SHAPE_KEYS = tuple(key for key in FIX_KEYS if key in {"dp", *Degrees.__dataclass_fields__} - {"zero"})
"""Keys that fix a shape's degrees, besides its ZeRO stage."""


@frozen
class Binding:
    """What stands in the way. The bytes are of a device, None where it is not memory.

    Raising the limit to `needed_bytes` makes the problem feasible; `short_bytes` is what it lacks.
    """

    rule: str
    detail: str
    needed_bytes: int | None = None
    limit_bytes: int | None = None
    short_bytes: int | None = None


@frozen
class Repair:
    """One change that makes the problem feasible, the flag for it, and the plan that it gives."""

    change: str
    flag: str
    kind: str
    step_time_s: float
    device_seconds_per_token: float
    strategy: Strategy
    peak_memory_bytes: int
    verified: bool


@frozen
class Infeasible:
    """The whole answer to a problem without a feasible plan."""

    shapes: int
    rejected: dict[str, int]
    binding: Binding
    repairs: tuple[Repair, ...]
    others: tuple[Repair, ...]


def why_infeasible(problem: PlanningProblem, pins: FixedChoices, effort: Effort) -> Infeasible:
    """What binds, and repairs by rising cost."""
    clock = Clock(effort)
    found = survey(problem, pins, lambda: clock.used >= SURVEYED)
    if found.need is not None and not found.need.exact:
        found = dataclasses.replace(found, need=_from_search(problem, pins, found.need, effort))
    solved: list[tuple[bool, Repair]] = []

    def over() -> bool:
        return clock.spent and (any(not beyond for beyond, _ in solved) or clock.used >= PATIENCE)

    for candidate in candidates(problem, pins, found, over):
        if over():
            break
        repair = _repaired(candidate, clock, over)
        if repair is not None:
            solved.append((candidate.hypothetical, repair))
    if not solved and len(fixed_values(pins)) > 1:
        last = _repaired(all_freed(problem, pins), clock, never)
        solved += [(False, last)] if last is not None else []
    solved.sort(key=lambda each: (each[0], each[1].device_seconds_per_token, each[1].flag))
    best: dict[str, Repair] = {}
    for hypothetical, repair in solved:
        if not hypothetical and len(best) < BEST:
            best.setdefault(repair.kind, repair)
    return Infeasible(
        shapes=found.shapes,
        rejected=found.rejected | ({"memory": found.legal} if found.legal else {}),
        binding=binding(problem, found),
        repairs=tuple(best.values()),
        others=tuple(repair for _, repair in solved if repair not in best.values()),
    )


OF_PLACE = ("--cluster", "--memory-limit", "fix", "offload")
"""Beginnings of the kinds of repairs that leave the job as it is."""


def for_a_run(answer: Infeasible) -> Infeasible:
    """The answer for a run that goes on: repairs that change its job stand among the others, as they would
    make it another run."""
    every = (*answer.repairs, *answer.others)
    kept = tuple(repair for repair in every if repair.kind.startswith(OF_PLACE))
    return dataclasses.replace(answer, repairs=kept, others=tuple(r for r in every if r not in kept))


GROWTH = (1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0)
"""Times an inexact least limit at which the search is asked for a plan, until it finds one."""


def _from_search(problem: PlanningProblem, pins: FixedChoices, need: Need, effort: Effort) -> Need:
    """The need with the least limit of GROWTH at which the search, too, finds a plan.

    Where a rank holds several stages it narrows which sizes and mixes it looks at. Where time is too short
    to find one, nothing is said of the search.
    """
    for factor in GROWTH:
        limit = math.ceil(need.limit_bytes * factor / MIB) * MIB
        if _of_its_shape(with_limit(problem, limit), pins, effort, need.strategy) is not None:
            return dataclasses.replace(need, limit_bytes=limit)
    return need


def binding(problem: PlanningProblem, found: Survey) -> Binding:
    """The limit in the way: the memory of a device where a shape is legal, else the rule most break."""
    if found.need is not None:
        more, least = found.need.more_bytes, problem.memory_limit_bytes
        return Binding(
            rule="memory",
            detail=_memory_words(problem, found, found.need),
            needed_bytes=found.need.limit_bytes + more,
            limit_bytes=least + more,
            short_bytes=found.need.limit_bytes - least,
        )
    broken = [rule for rule in found.rejected if rule != "world_size"] or list(found.rejected)
    rule = broken[0] if broken else "memory"  # world_size is asked first: who breaks another kept it
    nearest = found.nearest.get(rule)
    if nearest is None:
        return Binding(rule=rule, detail="no shape exists for these pins")
    legal = f" Legal here: {nearest.legal}." if nearest.legal else ""
    return Binding(rule=rule, detail=nearest.detail + legal)


def _memory_words(problem: PlanningProblem, found: Survey, need: Need) -> str:
    devices, limit = problem.cluster.devices, problem.memory_limit_bytes + need.more_bytes
    needed = need.limit_bytes + need.more_bytes
    safe = limit * need.peak_bytes / needed
    short = (
        f"SAFE takes {format_bytes(needed)}, the limit is {format_bytes(limit)}: short by "
        f"{format_bytes(needed - limit)}"
    )
    memory = need.memory
    parts = {
        "states": need.state_bytes,
        "activations": memory.activations_bytes,
        "transient": memory.transient_bytes,
        "communicators and allocator": memory.runtime_bytes + memory.allocator_bytes,
    }
    held = ", ".join(f"{format_bytes(size)} {name}" for name, size in parts.items() if size > 0)
    least = f"the {'' if need.exact else 'nearly '}least demanding strategy, {need.strategy.degrees.label()}"
    if found.least_state_bytes > safe:
        return (
            f"weights, gradients and optimizer state alone take "
            f"{format_bytes(found.least_state_bytes * devices)} over {devices} devices: "
            f"{format_bytes(found.least_state_bytes)} a device at best, {format_bytes(safe)} are safe. "
            f"With what else {least}, holds, a device peaks at {format_bytes(need.peak_bytes)}; {short}"
        )
    return f"{least}, peaks at {format_bytes(need.peak_bytes)} a device ({held}); {short}"


def _repaired(candidate: Candidate, clock: Clock, over: Over) -> Repair | None:
    """The change solved and verified; None where it does not make the problem feasible, or time is over."""
    change, pins = candidate.change, candidate.pins
    fits = candidate.fits
    if fits is None:
        need = fitting(change.problem, pins, over)
        if need is None:
            return None
        fits = need.strategy
    words, flag = change.change, change.flag
    try:
        solved = _solved(change.problem, pins, clock, fits)
    except InputError:  # a pin that the search does not take yet, and an estimate does
        solved = _estimated(change.problem, pins, fits)
        flag = f"plan estimate {_fixes(solved.strategy)}" if solved is not None else flag
    if solved is None:
        return None
    if flag.startswith("leave out"):
        words, flag = _named(candidate, solved.strategy)
    return Repair(
        change=words,
        flag=flag,
        kind=candidate.kind,
        step_time_s=solved.step_time_s,
        device_seconds_per_token=solved.device_seconds_per_token,
        strategy=solved.strategy,
        peak_memory_bytes=solved.evaluation.estimate.peak_memory_bytes,
        verified=verified(solved, pins),
    )


def _solved(problem: PlanningProblem, pins: FixedChoices, clock: Clock, fits: Strategy) -> Solved | None:
    """The best plan of a short search; else, or once time is spent, the best of the shape that fits.

    None where the search finds none even of that shape: who follows the repair would be told the same.
    """
    if not clock.spent:
        solved = resolved(problem, pins, clock, [fits])
        if solved is not None and solved.gap is not None:
            return solved
    return _of_its_shape(problem, pins, clock.effort, fits)


def _of_its_shape(
    problem: PlanningProblem, pins: FixedChoices, effort: Effort, fits: Strategy
) -> Solved | None:
    """The best plan that a search finds with the degrees of a strategy that fits."""
    degrees = fits.degrees
    pins = dataclasses.replace(pins, **{key: getattr(degrees, key) for key in SHAPE_KEYS})
    pins = dataclasses.replace(pins, zero=int(degrees.zero))
    clock = Clock(dataclasses.replace(effort, total_s=effort.each_s))
    solved = resolved(problem, pins, clock, [fits])
    return solved if solved is not None and solved.gap is not None else None


def _estimated(problem: PlanningProblem, pins: FixedChoices, strategy: Strategy) -> Solved | None:
    """The fastest strategy of even stages that is SAFE with the degrees and the offloading of another."""
    degrees = strategy.degrees
    if degrees.dp_replicate > 1 and degrees.dp_shard > 1:
        return None  # no --fix says how many ranks share out state
    model, offload = CostModel(problem), strategy.offloads[0]
    each = (even_stages(problem.model.layers, degrees.stages, option) for option in pins.recomputes)
    strategies = [Strategy(degrees=degrees, stages=offloaded(stages, offload)) for stages in each]
    legal = [model.evaluate(each) for each in strategies if not broken_rules(problem, each)]
    safe = [each for each in legal if each.estimate.verdict is Verdict.SAFE]
    best = min(safe, key=lambda each: each.estimate.step_time_s, default=None)
    return None if best is None else Solved(problem=problem, evaluation=best, lower_bound_s=0.0)


def _fixes(strategy: Strategy) -> str:
    """The flags of `plan estimate` for a strategy."""
    nominal = {"chunks": 1, "cp": 1, "ep": 1, "cp_exchange": "ring", "etp": strategy.degrees.tp}
    values = {key: chosen_value(strategy, key) for key in FIX_KEYS}
    return " ".join(f"--fix {choice_text(key, v)}" for key, v in values.items() if v != nominal.get(key))


def _named(candidate: Candidate, strategy: Strategy) -> tuple[str, str]:
    """Words and flag of a freed choice: the value that the plan has for it, where it has one."""
    change = candidate.change
    key = candidate.kind.removeprefix("fix ")
    value = chosen_value(strategy, key) if key in FIX_KEYS else None
    if value is None:
        return change.change, change.flag
    return (
        f"{choice_text(key, value)} instead of {change.flag.rpartition('=')[2]}",
        f"--fix {choice_text(key, value)}",
    )
