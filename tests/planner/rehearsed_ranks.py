"""Plans whose ranks were rehearsed, as far as the model knows: what was measured is what is modelled."""

from __future__ import annotations

from planner.advice.apply_rehearsal import refine
from planner.commands.splitting.estimate import strategy_of
from planner.cost.evaluate import CostModel
from planner.cost.replay import kind_passes
from planner.hardware.catalog import load_model, profile_files
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import PlanningProblem
from planner.model.workload import Precision, Workload
from planner.profile.profile import load_profile
from planner.search.solve import make_plan
from planner.strategy.equivalent_ranks import alike_ranks
from planner.strategy.fixed_choices import parse_fixed_choices
from planner.strategy.plan import Plan
from planner.strategy.rehearsal import RankRehearsal, Rehearsal, RehearsalMode, RehearsedPass, RehearsedPlan
from planner.strategy.rules import broken_rules

PINS = (
    "dp=4 zero=0 micro_batch=2",
    "dp=4 zero=3 micro_batch=4",
    "tp=2 dp=2 zero=1 sequence_parallel=true micro_batch=2",
    "pp=2 dp=2 zero=1 micro_batch=2 schedule=1f1b",
    "pp=4 micro_batch=2 schedule=zb-h1 recompute=full",
    "pp=4 chunks=2 micro_batch=2 schedule=zbv",
    "pp=2 chunks=2 tp=2 micro_batch=4 schedule=interleaved",
)
CPU = next(path for path in profile_files() if path.name.startswith("cpu-"))


def problem(cluster: str = "local:4") -> PlanningProblem:
    local = cluster.startswith("local")
    return PlanningProblem(
        model=load_model("shardwise-demo"),
        workload=Workload(seq=256, batch=16, precision=Precision.FP32 if local else Precision.BF16),
        cluster=parse_cluster(cluster),
        profile=load_profile(CPU) if local else None,
        memory_limit_bytes=2**32,
    )


def plan_of(asked: PlanningProblem, pins: str) -> Plan:
    strategy = strategy_of(asked, parse_fixed_choices(tuple(pins.split())))
    assert not broken_rules(asked, strategy)
    return make_plan(asked, CostModel(asked).evaluate(strategy), None, {}, ())


def as_modelled(asked: PlanningProblem, plan: Plan, factor: float = 1.0) -> list[RankRehearsal]:
    """Rehearsed ranks that took what the model says, times a factor."""
    model, degrees = CostModel(asked), plan.strategy.degrees
    shape = model.layout(degrees)
    costs = model.stage_costs(shape, plan.strategy)
    table = model.table(degrees)
    found = []
    for alike in alike_ranks(plan):
        held = table.stages_of(alike[0])
        kinds = {(stage, kind) for stage, kind in table.counts(alike[0])}
        passes = tuple(
            RehearsedPass(
                stage=stage,
                kind=str(kind),
                seconds=factor * max(kind_passes(costs[stage])[kind].work_s - _added(kind, shape), 0.0),
                spread=0.0,
                samples=3,
            )
            for stage, kind in sorted(kinds)
        )
        found.append(
            RankRehearsal(
                rank=degrees.ranks_of_pp_rank(alike[0])[0],
                alike=alike,
                stages=tuple(held),
                passes=passes,
                update_s=factor * sum(costs[stage].optimizer_s for stage in held),
                allocated_bytes=sum(plan.stage_estimates[s].memory.allocated_bytes for s in held),
                start_bytes=0,
            )
        )
    return found


def _added(kind: object, shape: object) -> float:
    """What the schedule adds to a pass; once to a backward pass, however it is split."""
    return 0.0 if str(kind) == "W" else shape.action.work_s  # type: ignore[attr-defined]


def rehearsal_of(asked: PlanningProblem, plan: Plan) -> Rehearsal:
    """A whole rehearsal of a plan, beside one other."""
    ranks = tuple(as_modelled(asked, plan))
    refined = refine(asked, plan, ranks, RehearsalMode.PROCESSOR)
    return Rehearsal(
        mode=RehearsalMode.PROCESSOR,
        device="a CPU",
        created="2026-11-26T00:00:00+00:00",
        versions={"torch": "2.13.0"},
        compiled=False,
        micro_batches=plan.strategy.degrees.num_micro_batches,
        ranks=ranks,
        complete=True,
        refined=refined,
        others=(RehearsedPlan(label="tp2", predicted_step_time_s=1.0, refined=refined),),
    )
