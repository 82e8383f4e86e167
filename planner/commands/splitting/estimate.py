"""`plan estimate`: time, memory and verdict of one given strategy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from planner.commands.shared.options import ProblemOptions, problem_options

if TYPE_CHECKING:
    from planner.job.problem import PlanningProblem
    from planner.strategy.estimate import Rejected
    from planner.strategy.fixed_choices import FixedChoices
    from planner.strategy.strategy import Strategy

BROKEN_RULE_EXIT = 3


@click.command()
@problem_options
@click.option(
    "--fix",
    "fixed",
    multiple=True,
    metavar="KEY=VALUE",
    help="A degree of the strategy: tp, pp, chunks, schedule, dp, cp, cp_exchange (ring, gather, "
    "all_to_all), ep, etp (shards of one expert), zero, micro_batch, sequence_parallel, recompute, offload "
    "(none, optimizer, activations), device_order (groups of a mixed cluster in pipeline order: 1,0). What "
    "is left out is 1, or follows from the rest.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write the strategy as a plan that `plan train` runs.",
)
def estimate(options: ProblemOptions, as_json: bool, fixed: tuple[str, ...], output: Path | None) -> int:
    """Estimate one given strategy."""
    import dataclasses

    from planner.commands.shared.plan_text import plan_text
    from planner.commands.shared.problem import read_problem
    from planner.commands.shared.text import print_json
    from planner.cost.evaluate import CostModel
    from planner.foundation.decode import encode
    from planner.search.solve import make_plan
    from planner.strategy.fixed_choices import parse_fixed_choices
    from planner.strategy.plan import encode_plan, save_plan
    from planner.strategy.rules import broken_rules

    asked = read_problem(options)
    strategy = strategy_of(asked.problem, parse_fixed_choices(fixed, asked.problem.cluster))
    violations = broken_rules(asked.problem, strategy)
    if violations:
        if as_json:
            print_json({"violations": [encode(violation) for violation in violations]})
        else:
            click.echo(violations_text(violations), err=True)
        return BROKEN_RULE_EXIT
    plan = make_plan(asked.problem, CostModel(asked.problem).evaluate(strategy), None, {}, ())
    plan = dataclasses.replace(plan, engine=asked.problem.limits.engine, profiles=asked.profiles)
    if output is not None:
        save_plan(plan, output)
    if as_json:
        print_json(encode_plan(plan))
    else:
        click.echo(plan_text(plan, asked.basis))
    return 0


def strategy_of(problem: PlanningProblem, pins: FixedChoices) -> Strategy:
    """The strategy that pins describe: free degrees are 1, dp fills the cluster, stages are even."""
    from planner.model.sublayer import Recompute
    from planner.strategy.engines.recipes import usual_exchange, usual_sequence_parallel
    from planner.strategy.strategy import Degrees, Offload, Schedule, Strategy, Zero, even_stages, offloaded

    tp, pp, cp = pins.tp or 1, pins.pp or 1, pins.cp or 1
    dp = pins.dp or max(1, problem.cluster.devices // (tp * pp * cp))
    zero = Zero(pins.zero if pins.zero is not None else 0)
    micro_batch = pins.micro_batch or 1
    schedule = pins.schedule or Schedule.ONE_F_ONE_B
    engine, sequence_parallel = problem.limits.engine, pins.sequence_parallel
    if sequence_parallel is None:
        sequence_parallel = usual_sequence_parallel(engine, tp)
    degrees = Degrees(
        tp=tp,
        pp=pp,
        chunks=pins.chunks or (2 if schedule.v_shaped else 1),
        schedule=schedule,
        dp_replicate=dp if zero is Zero.NONE else 1,
        dp_shard=1 if zero is Zero.NONE else dp,
        cp=cp,
        ep=pins.ep or 1,
        zero=zero,
        micro_batch=micro_batch,
        num_micro_batches=max(1, problem.workload.batch // (dp * micro_batch)),
        sequence_parallel=sequence_parallel,
        cp_exchange=pins.cp_exchange or usual_exchange(engine),
        etp=pins.etp,
        device_order=pins.device_order or (),
    )
    recompute = pins.recompute or Recompute.NONE
    stages = even_stages(problem.model.layers, degrees.stages, recompute)
    return Strategy(degrees=degrees, stages=offloaded(stages, pins.offload or Offload.NONE))


def violations_text(violations: list[Rejected]) -> str:
    """Each broken rule with its numbers, the legal values and the flag."""
    lines = []
    for violation in violations:
        lines.append(f"{violation.rule}: {violation.detail}")
        if violation.legal:
            lines.append(f"  legal here: {violation.legal}")
        if violation.fix:
            lines.append(f"  change with: {violation.fix}")
    return "\n".join(lines)
