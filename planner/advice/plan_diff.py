"""Two plans side by side: what was asked, what was chosen, what it takes, and why one is faster.

Everything is read from the plans; nothing is evaluated again. Where they train different tokens a step, steps
are compared a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.foundation.decode import encode
from planner.foundation.frozen import frozen
from planner.foundation.units import format_seconds
from planner.strategy.estimate import MEMORY_TENANTS, TIME_CAUSES, MemoryBreakdown
from planner.strategy.plan import Plan
from planner.strategy.strategy import Stage

SAME = 1e-3
"""Share of a time under which two plans are called equally fast."""
MANY = 12
"""Differing inputs of one kind that are listed one by one."""


@frozen
class Difference:
    """A value that differs, by its path."""

    path: str
    first: Any
    second: Any


@frozen
class Amount:
    """A quantity of both plans, and the second's over the first's."""

    name: str
    first: float
    second: float
    difference: float


@frozen
class PlanDiff:
    """What differs between two plans. `faster` is 1, 2 or 0 for neither; `statement` says why.

    `causes` are seconds of a step, `memory` bytes of the fullest stage by tenant.
    """

    inputs: tuple[Difference, ...]
    strategy: tuple[Difference, ...]
    stages: tuple[Difference, ...]
    causes: tuple[Amount, ...]
    memory: tuple[Amount, ...]
    figures: tuple[Difference, ...]
    certificate: tuple[Difference, ...]
    faster: int
    ratio: float
    mostly: str
    statement: str


def plan_diff(first: Plan, second: Plan, names: tuple[str, str] = ("A", "B")) -> PlanDiff:
    """Every difference, and which plan trains a token faster; the statement calls them by `names`."""
    first_s, second_s = _token_s(first), _token_s(second)
    ratio = second_s / first_s if first_s > 0 else 1.0
    faster = 0 if abs(ratio - 1) <= SAME else (1 if ratio > 1 else 2)
    mostly = _mostly(first, second)
    return PlanDiff(
        inputs=tuple(_inputs(first, second)),
        strategy=tuple(_strategy(first, second)),
        stages=tuple(_stages(first, second)),
        causes=tuple(_causes(first, second)),
        memory=tuple(_memory(first, second)),
        figures=tuple(_figures(first, second)),
        certificate=tuple(_certificate(first, second)),
        faster=faster,
        ratio=ratio,
        mostly=mostly,
        statement=_statement(first, second, faster, mostly, names),
    )


def _token_s(plan: Plan) -> float:
    return plan.estimate.step_time_s / plan.workload.tokens_per_step


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Leaves of plain data by their paths."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(each, dict | list | tuple) for each in value):
        for index, each in enumerate(value):
            yield from _flat(each, f"{path}[{index}]")
    else:
        yield path, value


def _differences(first: Any, second: Any, path: str = "") -> list[Difference]:
    ours, theirs = dict(_flat(encode(first), path)), dict(_flat(encode(second), path))
    return [
        Difference(path=key, first=_plain(ours.get(key)), second=_plain(theirs.get(key)))
        for key in dict.fromkeys((*ours, *theirs))
        if ours.get(key) != theirs.get(key)
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _inputs(first: Plan, second: Plan) -> Iterator[Difference]:
    """Model, workload and cluster; of a model or cluster of another name, that name and its size."""
    if first.model != second.model:
        if first.model.name != second.model.name:
            names = (first.model.name, second.model.name)
            yield Difference(path="model.name", first=names[0], second=names[1])
            params = (first.model.params_total, second.model.params_total)
            if params[0] != params[1]:
                yield Difference(path="model.params_total", first=params[0], second=params[1])
        else:
            yield from _differences(first.model, second.model, "model")[:MANY]
    yield from _differences(first.workload, second.workload, "workload")
    if first.cluster != second.cluster:
        for name in ("name", "devices", "devices_per_node", "network", "price_usd_per_hour"):
            ours, theirs = getattr(first.cluster, name), getattr(second.cluster, name)
            if ours != theirs:
                yield Difference(path=f"cluster.{name}", first=ours, second=theirs)
        if first.cluster.name == second.cluster.name:
            yield from _differences(first.cluster, second.cluster, "cluster")[:MANY]
    limits = (first.estimate.memory_limit_bytes, second.estimate.memory_limit_bytes)
    if limits[0] != limits[1]:
        yield Difference(path="memory_limit_bytes", first=limits[0], second=limits[1])
    for name in sorted({*first.digests, *second.digests} - {"model", "workload", "cluster"}):
        profiles = (first.digests.get(name), second.digests.get(name))
        if profiles[0] != profiles[1]:
            yield Difference(path=name, first=profiles[0], second=profiles[1])


def _strategy(first: Plan, second: Plan) -> list[Difference]:
    ours, theirs = first.strategy.degrees, second.strategy.degrees
    found = _differences(ours, theirs)
    if ours.dp != theirs.dp:
        found.insert(0, Difference(path="dp", first=ours.dp, second=theirs.dp))
    return found


def _stages(first: Plan, second: Plan) -> Iterator[Difference]:
    ours, theirs = first.strategy.stages, second.strategy.stages
    for index in range(max(len(ours), len(theirs))):
        pair = [_stage_words(stages[index]) if index < len(stages) else None for stages in (ours, theirs)]
        if pair[0] != pair[1]:
            yield Difference(path=f"stages[{index}]", first=pair[0], second=pair[1])


def _stage_words(stage: Stage) -> str:
    counts, away = stage.recompute, stage.offload
    words = f"layers {stage.first}..{stage.end - 1}, {counts.none}/{counts.selective}/{counts.full}"
    if away.optimizer or away.activations:
        words += f", offload {away.optimizer}/{away.activations}"
    return words


def _causes(first: Plan, second: Plan) -> Iterator[Amount]:
    for cause in TIME_CAUSES:
        yield _amount(cause, *(getattr(plan.estimate.breakdown, cause) for plan in (first, second)))
    yield _amount("step_time_s", first.estimate.step_time_s, second.estimate.step_time_s)


def _memory(first: Plan, second: Plan) -> Iterator[Amount]:
    fullest = [
        max((each.memory for each in plan.stage_estimates), key=_total, default=MemoryBreakdown())
        for plan in (first, second)
    ]
    for tenant in MEMORY_TENANTS:
        yield _amount(tenant, *(getattr(memory, tenant) for memory in fullest))
    peaks = [plan.estimate.peak_memory_bytes for plan in (first, second)]
    yield _amount("peak_memory_bytes", *peaks)


def _total(memory: MemoryBreakdown) -> int:
    return memory.total_bytes


def _amount(name: str, first: float, second: float) -> Amount:
    return Amount(name=name, first=first, second=second, difference=second - first)


FIGURES = ("tokens_per_s", "mfu", "days", "cost_usd", "verdict", "step_time_interval_s")


def _figures(first: Plan, second: Plan) -> Iterator[Difference]:
    for name in FIGURES:
        pair = [_plain(getattr(plan.estimate, name)) for plan in (first, second)]
        yield Difference(path=name, first=_text(pair[0]), second=_text(pair[1]))
    yield from _rehearsed(first, second)


REFINED = ("step_time_s", "step_time_interval_s", "measured_share", "peak_memory_bytes", "verdict")


def _rehearsed(first: Plan, second: Plan) -> Iterator[Difference]:
    """What single ranks showed when they were run, where either plan was rehearsed."""
    rehearsals = first.rehearsal, second.rehearsal
    if rehearsals == (None, None):
        return
    for name in ("mode", "device"):
        pair = [None if each is None else str(getattr(each, name)) for each in rehearsals]
        yield Difference(path=f"rehearsed {name}", first=pair[0], second=pair[1])
    refined = [None if each is None else each.refined for each in rehearsals]
    for name in REFINED:
        pair = [None if each is None else _plain(getattr(each, name)) for each in refined]
        yield Difference(path=f"rehearsed {name}", first=_text(pair[0]), second=_text(pair[1]))


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value


CERTIFICATE = ("status", "gap", "lower_bound_s", "shapes", "milps", "verified")


def _certificate(first: Plan, second: Plan) -> Iterator[Difference]:
    if first.solver is None and second.solver is None:
        return
    for name in CERTIFICATE:
        pair = [None if plan.solver is None else getattr(plan.solver, name) for plan in (first, second)]
        yield Difference(path=name, first=pair[0], second=pair[1])


def _mostly(first: Plan, second: Plan) -> str:
    """The cause that adds most to the difference of seconds a token, in its direction."""
    scale = first.workload.tokens_per_step / second.workload.tokens_per_step
    ours, theirs = first.estimate.breakdown, second.estimate.breakdown
    extra = {cause: scale * getattr(theirs, cause) - getattr(ours, cause) for cause in TIME_CAUSES}
    total = sum(extra.values())
    if total == 0:
        return ""
    return max(extra, key=lambda cause: extra[cause] if total > 0 else -extra[cause])


def _statement(first: Plan, second: Plan, faster: int, mostly: str, names: tuple[str, str]) -> str:
    """Which plan is faster, by how much, and mostly due to what."""
    same_step = first.workload.tokens_per_step == second.workload.tokens_per_step
    ours_s, theirs_s = first.estimate.step_time_s, second.estimate.step_time_s
    if not same_step:
        theirs_s *= first.workload.tokens_per_step / second.workload.tokens_per_step
    a_s, b_s = format_seconds(ours_s), format_seconds(theirs_s)
    unit = "a step" if same_step else f"for {first.workload.tokens_per_step:,} tokens"
    if faster == 0:
        return f"Both are equally fast: {a_s} and {b_s} {unit}."
    (quick, slow), share = (names, theirs_s / ours_s) if faster == 1 else (names[::-1], ours_s / theirs_s)
    scale = theirs_s / second.estimate.step_time_s
    spent = abs(
        scale * getattr(second.estimate.breakdown, mostly) - getattr(first.estimate.breakdown, mostly)
    )
    words = (
        f"{quick} is faster: {a_s} ({names[0]}) and {b_s} ({names[1]}) {unit}, {slow} takes "
        f"{share - 1:.1%} longer, mostly "
        f"{mostly.removesuffix('_s').replace('_', ' ')} ({format_seconds(spent)} of "
        f"{format_seconds(abs(theirs_s - ours_s))})."
    )
    if first.cluster.devices != second.cluster.devices:
        each = [plan.estimate.tokens_per_s / plan.cluster.devices for plan in (first, second)]
        words += f" A device trains {each[0]:,.0f} ({names[0]}) and {each[1]:,.0f} ({names[1]}) tokens/s."
    return words
