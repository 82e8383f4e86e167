"""`plan import`: a strategy from an engine's configuration, estimated and compared with the best plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.options import ProblemOptions, problem_options
from planner.commands.splitting.estimate import BROKEN_RULE_EXIT

if TYPE_CHECKING:
    from planner.commands.shared.problem import Asked
    from planner.export.imported import Imported
    from planner.foundation.errors import Problem
    from planner.strategy.estimate import Rejected
    from planner.strategy.plan import Plan
    from planner.strategy.strategy import Strategy

DEFAULT_TIME_LIMIT_S = 30.0
FROM = ("deepspeed", "megatron", "torchtitan", "accelerate")


@click.command("import")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--from", "source", required=True, type=click.Choice(FROM), help="The engine of FILE.")
@problem_options
@click.option(
    "--fix",
    "fixed",
    multiple=True,
    metavar="KEY=VALUE",
    help="What FILE does not say, with the keys of `plan estimate`: --fix pp=4, --fix micro_batch=2.",
)
@click.option(
    "--time-limit",
    "time_limit_s",
    type=click.FloatRange(min=0, min_open=True),
    default=DEFAULT_TIME_LIMIT_S,
    show_default=True,
    metavar="SECONDS",
    help="Of the search for the best plan to compare with.",
)
@click.option("--no-best", is_flag=True, help="Estimate alone: look for no better plan.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PLAN",
    help="Where to write the strategy as a plan.",
)
def import_config(
    file: Path,
    source: str,
    options: ProblemOptions,
    as_json: bool,
    fixed: tuple[str, ...],
    time_limit_s: float,
    no_best: bool,
    output: Path | None,
) -> int:
    """Read the strategy of an engine's configuration, estimate it, and compare it with the best plan.

    FILE is DeepSpeed's ds_config.json, a script or YAML with Megatron-LM's arguments, a job of torchtitan
    (TOML) or Accelerate's YAML. What it does not say is asked for by flag; --seq and --batch are needed only
    then. What would change time or memory and is not read is listed.
    """
    from planner.commands.shared.text import print_json
    from planner.strategy.plan import save_plan
    from planner.strategy.rules import broken_rules

    imported, asked, strategy = _read(file, source, options, fixed)
    violations = broken_rules(asked.problem, strategy)
    if violations:
        _tell_violations(imported, violations, strategy, as_json=as_json)
        return BROKEN_RULE_EXIT
    plan = _estimated(asked, strategy)
    if output is not None:
        save_plan(plan, output)
        click.echo(f"wrote {output}", err=True)
    best = None if no_best else _best(asked, time_limit_s)
    if as_json:
        print_json(_document(plan, best, imported))
    else:
        click.echo(_text(plan, best, imported, asked.basis))
    return 0


def _read(
    file: Path, source: str, options: ProblemOptions, fixed: tuple[str, ...]
) -> tuple[Imported, Asked, Strategy]:
    """What the file and the flags say together. Raises InputError with every fault."""
    import dataclasses

    from planner.commands.shared.options import open_market
    from planner.commands.shared.problem import read_problem
    from planner.export.imported import asked_twice, completed, missing, read_config
    from planner.export.settings import strategy_from
    from planner.foundation.errors import InputError
    from planner.hardware.catalog import load_model
    from planner.hardware.cluster_text import parse_cluster
    from planner.strategy.fixed_choices import parse_fixed_choices

    market = open_market(options.prices, options.on_premises, options.cluster)
    model, cluster = (
        load_model(options.model, arch=options.arch),
        parse_cluster(options.cluster, market=market),
    )
    problems: list[Problem] = []
    imported = read_config(file, source, model, cluster.devices, problems)
    given = {name: getattr(options, name) for name in ("seq", "batch", "precision", "optimizer")}
    problems += asked_twice(imported.settings, given)
    settings = completed(imported.settings, parse_fixed_choices(fixed, cluster), problems)
    settings = _with_batch(settings, cluster.devices)
    problems += [*missing(settings, given, str(file)), *_other_engine(options.engine, imported)]
    if problems:
        raise InputError(*problems)
    said: dict[str, Any] = {
        name: value if value is not None else getattr(settings, name) for name, value in given.items()
    }
    said = {
        name: value if value is None or isinstance(value, int) else str(value) for name, value in said.items()
    }
    said["optimizer"] = said["optimizer"] or "adamw"
    engine = None if imported.engine is None else str(imported.engine)
    asked = read_problem(dataclasses.replace(options, **said, engine=engine))
    workload, model = asked.problem.workload, asked.problem.model
    strategy = strategy_from(settings, model, workload.batch, cluster.devices, imported.engine)
    return dataclasses.replace(imported, settings=settings), asked, strategy


def _with_batch(settings: Any, devices: int) -> Any:
    """The batch, where micro-batch and accumulation say it together with the devices."""
    import dataclasses

    if settings.batch is not None or settings.micro_batch is None or settings.num_micro_batches is None:
        return settings
    dp = max(1, devices // (settings.tp * settings.pp * settings.cp))
    return dataclasses.replace(settings, batch=settings.micro_batch * settings.num_micro_batches * dp)


def _other_engine(engine: str | None, imported: Imported) -> list[Problem]:
    from planner.foundation.errors import Problem

    own = "any" if imported.engine is None else str(imported.engine)
    if engine in (None, own):
        return []
    return [Problem(where="--engine", fault=f"is {engine}, and the file is for {own}.", fix="leave it out")]


def _tell_violations(
    imported: Imported, violations: list[Rejected], strategy: Strategy, *, as_json: bool
) -> None:
    from planner.commands.shared.text import print_json
    from planner.commands.splitting.estimate import violations_text
    from planner.foundation.decode import encode
    from planner.strategy.plan import degrees_document

    if as_json:
        print_json(
            {
                "violations": [encode(violation) for violation in violations],
                "strategy": degrees_document(strategy.degrees),
                "not_read": list(imported.not_read),
            }
        )
        return
    click.echo(f"read: {strategy.degrees.label()}", err=True)
    click.echo(violations_text(violations), err=True)


def _estimated(asked: Asked, strategy: Strategy) -> Plan:
    import dataclasses

    from planner.cost.evaluate import CostModel
    from planner.search.solve import make_plan

    plan = make_plan(asked.problem, CostModel(asked.problem).evaluate(strategy), None, {}, ())
    return dataclasses.replace(plan, engine=asked.problem.limits.engine, profiles=asked.profiles)


def _best(asked: Asked, time_limit_s: float) -> Plan | None:
    """The best plan of the same problem and engine; None where none fits."""
    import dataclasses

    from planner.foundation.errors import InfeasibleError
    from planner.search.engine_search import solve_for_engine
    from planner.search.solve import SolveOptions
    from planner.strategy.fixed_choices import FixedChoices

    options = SolveOptions(pins=FixedChoices(), time_limit_s=time_limit_s, top=0)
    try:
        best = solve_for_engine(asked.problem, options)
    except InfeasibleError:
        return None
    return dataclasses.replace(best, engine=asked.problem.limits.engine, profiles=asked.profiles)


def _document(plan: Plan, best: Plan | None, imported: Imported) -> dict[str, Any]:
    """The keys of `plan estimate --json`, and beside them what was read, the best plan, and what differs."""
    from planner.advice.plan_diff import plan_diff
    from planner.foundation.decode import encode
    from planner.strategy.plan import encode_plan

    comparison = None
    if best is not None:
        found = plan_diff(plan, best)
        comparison = {
            "step_time_s": plan.estimate.step_time_s,
            "best_step_time_s": best.estimate.step_time_s,
            "slower_by": plan.estimate.step_time_s / best.estimate.step_time_s - 1,
            "statement": found.statement,
            **{name: encode(getattr(found, name)) for name in ("strategy", "stages", "causes", "memory")},
        }
    return {
        **encode_plan(plan),
        "read": encode(imported.settings),
        "not_read": list(imported.not_read),
        "best": None if best is None else encode_plan(best),
        "comparison": comparison,
    }


def _text(plan: Plan, best: Plan | None, imported: Imported, basis: str) -> str:
    from planner.advice.plan_diff import plan_diff
    from planner.commands.shared.plan_text import plan_text
    from planner.commands.shared.text import WIDTH, pairs
    from planner.commands.splitting.diff import diff_text

    sections = [plan_text(plan, basis)]
    if imported.not_read:
        sections.append(pairs([("not read", ", ".join(imported.not_read))], WIDTH))
    if best is not None:
        assert best.solver is not None
        proven = f"the best plan found, at most {best.solver.gap:.1%} above what any can reach"
        sections.append(f"{proven}:")
        sections.append(diff_text(plan_diff(plan, best), [plan, best], ("the file", "best")))
    return "\n\n".join(sections)


for _parameter in import_config.params:  # the file may say them
    if _parameter.name in ("seq", "batch"):
        _parameter.required = False
    if _parameter.name == "optimizer":
        _parameter.default = None
