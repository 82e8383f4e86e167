"""`plan explain`: why this plan, what more of each resource would buy, what any other choice would cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.options import json_option
from planner.commands.shared.text import print_json

if TYPE_CHECKING:
    from planner.advice.resolve import Effort
    from planner.cost.evaluate import Evaluation
    from planner.foundation.errors import Problem
    from planner.job.problem import PlanningProblem
    from planner.strategy.plan import Plan

SEARCHES = 15
"""Searches of the time limit each that all together may take, before known plans alone are compared."""


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option(
    "--why-not",
    "asked",
    multiple=True,
    metavar="KEY=VALUE",
    help="Another choice, by a key of --fix: what it would cost or break. May be repeated; each is answered "
    "on its own, in place of the rest.",
)
@click.option(
    "--pareto", is_flag=True, help="Plans at falling memory limits until none fits, in place of the rest."
)
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="The profile that the plan was made with, where it is not the shipped one.",
)
@click.option(
    "--time-limit",
    "time_limit_s",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Of each of the searches that an answer is made of.",
)
@json_option
def explain(
    plan_file: Path,
    asked: tuple[str, ...],
    pareto: bool,
    profile: Path | None,
    time_limit_s: float,
    as_json: bool,
) -> None:
    """Say why a plan is what it is.

    What binds it, what a little more of each resource would buy (each solved again), and why its runners-up
    lost. With --why-not or --pareto: that alone.
    """
    from planner.advice.resolve import Effort
    from planner.commands.shared.problem import problem_of_plan
    from planner.commands.splitting.explain_document import heading_document
    from planner.commands.splitting.explain_text import heading_text
    from planner.foundation.decode import encode
    from planner.strategy.plan import load_plan

    plan = load_plan(plan_file)
    problem, basis, profiles = problem_of_plan(plan, profile)
    evaluation = evaluated(problem, plan, plan_file)
    effort = Effort(each_s=time_limit_s, total_s=SEARCHES * time_limit_s)
    document = heading_document(problem, evaluation, basis, profiles)
    if plan.rehearsal is not None:
        document["rehearsal"] = encode(plan.rehearsal)
    sections = [heading_text(problem, plan, evaluation, basis)]
    if asked:
        _add_why_not(document, sections, problem, plan, evaluation, asked, effort)
    if pareto:
        _add_front(document, sections, problem, evaluation, effort)
    if not asked and not pareto:
        _add_reasons(document, sections, problem, plan, evaluation, effort)
    if as_json:
        print_json(document)
    else:
        click.echo("\n\n".join(sections))


def evaluated(problem: PlanningProblem, plan: Plan, plan_file: Path) -> Evaluation:
    """The plan's strategy evaluated again. Raises InputError where it breaks a rule."""
    from planner.cost.evaluate import CostModel
    from planner.foundation.errors import InputError, Problem
    from planner.strategy.rules import broken_rules

    broken = broken_rules(problem, plan.strategy)
    if broken:
        raise InputError(
            *(
                Problem(
                    where=f"{plan_file}: strategy",
                    fault=f"{each.rule}: {each.detail}",
                    legal=each.legal,
                    fix="see `plan check`, and solve again",
                )
                for each in broken
            )
        )
    return CostModel(problem).evaluate(plan.strategy)


def _add_reasons(
    document: dict[str, Any],
    sections: list[str],
    problem: PlanningProblem,
    plan: Plan,
    evaluation: Evaluation,
    effort: Effort,
) -> None:
    from planner.advice.explain import explain
    from planner.commands.splitting.explain_document import reasons_document
    from planner.commands.splitting.explain_text import reasons_text

    found = explain(problem, evaluation, plan.alternatives, effort)
    document |= reasons_document(found)
    sections += reasons_text(evaluation, found)


def _add_why_not(
    document: dict[str, Any],
    sections: list[str],
    problem: PlanningProblem,
    plan: Plan,
    evaluation: Evaluation,
    asked: tuple[str, ...],
    effort: Effort,
) -> None:
    from planner.advice.resolve import Clock
    from planner.advice.why_not import FLAG, why_not
    from planner.commands.splitting.explain_document import why_not_document
    from planner.commands.splitting.explain_text import why_not_text
    from planner.foundation.errors import InputError
    from planner.strategy.fixed_choices import parse_choice

    faults: list[Problem] = []
    for typed in asked:
        try:
            parse_choice(typed, problem, FLAG)
        except InputError as error:
            faults += error.problems
    if faults:
        raise InputError(*faults)
    known = (evaluation.strategy, *(other.strategy for other in plan.alternatives))
    clock = Clock(effort)
    answers = [why_not(problem, evaluation, typed, clock, known) for typed in asked]
    document["why_not"] = [why_not_document(answer) for answer in answers]
    sections += [why_not_text(evaluation, answer) for answer in answers]


def _add_front(
    document: dict[str, Any],
    sections: list[str],
    problem: PlanningProblem,
    evaluation: Evaluation,
    effort: Effort,
) -> None:
    from planner.advice.resolve import front
    from planner.commands.splitting.explain_document import front_document
    from planner.commands.splitting.explain_text import front_text

    found = front(problem, evaluation, effort)
    document["pareto"] = front_document(found)
    sections.append(front_text(found))
