"""Why a plan is what it is: what binds, what more would buy (planner.advice.what_more), why its runners-up
lost.

What binds comes from the plan's own evaluation; what the runners-up lose is theirs beyond it, by cause.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

from planner.advice.resolve import Clock, Effort, Solved
from planner.advice.what_more import More, what_more_buys
from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.stage.peak_memory import memory_band, safe_peak_bytes
from planner.foundation.frozen import frozen
from planner.foundation.units import format_bytes, format_seconds
from planner.job.problem import PlanningProblem
from planner.strategy.estimate import TIME_CAUSES, MemoryBreakdown
from planner.strategy.plan import Alternative
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, RecomputeCounts, Stage, Strategy

DUST_S = 1e-8


@frozen
class Bind:
    """A resource, the seconds of a step that it takes, their share, and what it is made of, in words."""

    resource: str
    seconds: float
    share: float
    detail: str


@frozen
class StageFigure:
    """A stage in numbers; headroom is what its rank's peak leaves of what is safe."""

    index: int
    layers: tuple[int, int]
    recompute: RecomputeCounts
    time_s: float
    memory: MemoryBreakdown
    headroom_bytes: int


@frozen
class Loser:
    """A runner-up: seconds by cause beyond the plan's, bytes beyond its peak, and the largest cause."""

    strategy: Strategy
    step_time_s: float
    slower_s: float
    causes_s: dict[str, float]
    peak_memory_bytes: int
    more_memory_bytes: int
    mostly: str


def recompute_step(stage: Stage) -> Stage | None:
    """The stage with one block fewer recomputed, or recomputed less; None where none is."""
    counts = stage.recompute
    if counts.full:
        better = dataclasses.replace(counts, full=counts.full - 1, selective=counts.selective + 1)
    elif counts.selective:
        better = dataclasses.replace(counts, selective=counts.selective - 1, none=counts.none + 1)
    else:
        return None
    return dataclasses.replace(stage, recompute=better)


def stage_figures(problem: PlanningProblem, evaluation: Evaluation) -> tuple[StageFigure, ...]:
    """Every stage with what is left of its rank's safe memory."""
    degrees, held = evaluation.strategy.degrees, _held_bytes(evaluation)
    return tuple(
        StageFigure(
            index=index,
            layers=(stage.first, stage.end),
            recompute=stage.recompute,
            time_s=figures.time_s,
            memory=figures.memory,
            headroom_bytes=int(
                safe_bytes(problem, evaluation, index) - held[degrees.pp_rank_of_stage(index)]
            ),
        )
        for index, (stage, figures) in enumerate(
            zip(evaluation.strategy.stages, evaluation.stages, strict=True)
        )
    )


def _held_bytes(evaluation: Evaluation) -> Counter[int]:
    """The peak of each pipeline rank."""
    held = Counter[int]()
    for index, stage in enumerate(evaluation.stages):
        held[evaluation.strategy.degrees.pp_rank_of_stage(index)] += stage.memory.total_bytes
    return held


def safe_bytes(problem: PlanningProblem, evaluation: Evaluation, stage: int) -> float:
    """The largest peak that is SAFE under the limit of the devices of a stage."""
    limit = evaluation.stages[stage].memory_limit_bytes or problem.memory_limit_bytes
    return safe_peak_bytes(limit, memory_band(problem, evaluation.estimate.coverage))


def what_binds(problem: PlanningProblem, evaluation: Evaluation) -> tuple[Bind, ...]:
    """Every resource that the step waits for, the longest first; memory stands with what it costs."""
    breakdown, step_s = evaluation.estimate.breakdown, evaluation.estimate.step_time_s
    words = {
        "compute_s": ("compute", _compute_words(evaluation)),
        "recompute_s": ("memory", memory_words(problem, evaluation)),
        "tp_comm_s": (_link(problem, evaluation.strategy.degrees, "tp"), "tensor-parallel messages"),
        "cp_comm_s": (_link(problem, evaluation.strategy.degrees, "cp"), "context-parallel messages"),
        "ep_comm_s": (_link(problem, evaluation.strategy.degrees, "ep"), "tokens to experts and back"),
        "dp_comm_s": (_link(problem, evaluation.strategy.degrees, "dp"), _dp_words(evaluation)),
        "pp_comm_s": (_link(problem, evaluation.strategy.degrees, "pp"), "messages between stages"),
        "bubble_s": ("pipeline bubble", _bubble_words(evaluation)),
        "optimizer_s": ("optimizer", "clipping and update, bound by memory bandwidth"),
        "host_s": ("host", "launching kernels takes longer than running them"),
    }
    binds = [
        Bind(resource=name, seconds=seconds, share=seconds / step_s, detail=detail)
        for cause, (name, detail) in words.items()
        if (seconds := getattr(breakdown, cause)) > 0 or cause == "recompute_s"
    ]
    return tuple(sorted(binds, key=lambda bind: -bind.seconds))


def _compute_words(evaluation: Evaluation) -> str:
    mfu = evaluation.estimate.mfu
    return "products and element-wise work" + (f", {mfu:.1%} MFU in all" if mfu is not None else "")


def memory_words(problem: PlanningProblem, evaluation: Evaluation) -> str:
    """The fullest stage, its headroom, and what one block recomputed less would take of it."""
    figures = stage_figures(problem, evaluation)
    fullest = min(figures, key=lambda figure: figure.headroom_bytes)
    room = fullest.headroom_bytes
    safe = format_bytes(safe_bytes(problem, evaluation, fullest.index))
    words = f"stage {fullest.index} leaves {format_bytes(room)} of {safe} that are safe"
    if room < 0:
        words = f"stage {fullest.index} exceeds the {safe} that are safe by {format_bytes(-room)}"
    again = recompute_step(evaluation.strategy.stages[fullest.index])
    if again is None:
        return f"{words}; nothing in it is recomputed"
    stages = list(evaluation.strategy.stages)
    stages[fullest.index] = again
    other = CostModel(problem).evaluate(dataclasses.replace(evaluation.strategy, stages=tuple(stages)))
    rank = evaluation.strategy.degrees.pp_rank_of_stage(fullest.index)
    taken = _held_bytes(other)[rank] - _held_bytes(evaluation)[rank]
    verb = "does not fit" if taken > room else "fits"
    return f"{words}; one block recomputed less takes {format_bytes(taken)} more and {verb}"


def _link(problem: PlanningProblem, degrees: Degrees, axis: str) -> str:
    """The link that the messages of an axis cross."""
    cluster = problem.cluster
    own = {
        "tp": degrees.tp,
        "cp": degrees.tp * degrees.cp,
        "ep": degrees.expert_ranks,
        "dp": degrees.tp * degrees.replicas,
        "pp": degrees.world,
    }[axis]
    if own > cluster.devices_per_node:
        return f"network between nodes ({cluster.inter.name})"
    return f"link in the node ({cluster.intra.name})"


def _dp_words(evaluation: Evaluation) -> str:
    degrees = evaluation.strategy.degrees
    gathered = "weights gathered and " if degrees.zero else ""
    return f"{gathered}gradients reduced over {degrees.replicas} ranks, as far as compute does not hide it"


def _bubble_words(evaluation: Evaluation) -> str:
    degrees = evaluation.strategy.degrees
    waits = f"{degrees.pp} ranks fill and drain for {degrees.num_micro_batches} micro-batches"
    return waits if degrees.pp > 1 else "devices wait for each other"


def losers(
    problem: PlanningProblem, evaluation: Evaluation, alternatives: Iterable[Alternative]
) -> tuple[Loser, ...]:
    """The runners-up evaluated again, each with its differences to the plan."""
    model = CostModel(problem)
    legal = [other.strategy for other in alternatives if not broken_rules(problem, other.strategy)]
    return tuple(_loser(evaluation, model.evaluate(strategy)) for strategy in legal)


def _loser(evaluation: Evaluation, other: Evaluation) -> Loser:
    ours, theirs = evaluation.estimate, other.estimate
    causes = differences_s(evaluation, other)
    worst = max(causes, key=lambda name: causes[name])
    return Loser(
        strategy=other.strategy,
        step_time_s=theirs.step_time_s,
        slower_s=theirs.step_time_s - ours.step_time_s,
        causes_s=causes,
        peak_memory_bytes=theirs.peak_memory_bytes,
        more_memory_bytes=theirs.peak_memory_bytes - ours.peak_memory_bytes,
        mostly=f"{cause_name(worst)} {format_difference(causes[worst])}",
    )


def differences_s(first: Evaluation, second: Evaluation) -> dict[str, float]:
    """Seconds by cause that the second takes beyond the first; they add up to the difference in all."""
    ours, theirs = first.estimate.breakdown, second.estimate.breakdown
    return {cause: getattr(theirs, cause) - getattr(ours, cause) for cause in TIME_CAUSES}


def cause_name(cause: str) -> str:
    """A cause in words: `tp comm`."""
    return cause.removesuffix("_s").replace("_", " ")


def format_difference(seconds: float) -> str:
    """A difference of times with its sign; what floats add up to in another order is none."""
    if abs(seconds) < DUST_S:
        return "0"
    return ("-" if seconds < 0 else "+") + format_seconds(abs(seconds))


@frozen
class Explanation:
    """The whole answer of `plan explain`."""

    best: Solved | None
    binds: tuple[Bind, ...]
    stages: tuple[StageFigure, ...]
    more: tuple[More, ...]
    losers: tuple[Loser, ...]


def explain(
    problem: PlanningProblem, evaluation: Evaluation, alternatives: tuple[Alternative, ...], effort: Effort
) -> Explanation:
    """What binds a plan, what more would buy, and why its runners-up lost."""
    known = (evaluation.strategy, *(other.strategy for other in alternatives))
    best, more = what_more_buys(problem, known, Clock(effort))
    return Explanation(
        best=best,
        binds=what_binds(problem, evaluation),
        stages=stage_figures(problem, evaluation),
        more=more,
        losers=losers(problem, evaluation, alternatives),
    )
