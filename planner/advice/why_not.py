"""Why not another choice: that choice solved with everything else free, or what it breaks.

Where no plan has the value, the values of the same key that have one follow, the nearest first: each is
shown feasible by a strategy that keeps the rules and is SAFE.
"""

from __future__ import annotations

from enum import StrEnum

from planner.advice.explain import cause_name, differences_s, format_difference
from planner.advice.repairs import Binding, binding
from planner.advice.resolve import Clock, resolved
from planner.cost.evaluate import Evaluation
from planner.foundation.frozen import frozen
from planner.job.problem import PlanningProblem
from planner.search.least_memory import fitting, survey
from planner.strategy.fixed_choices import (
    Choice,
    choice_text,
    chosen_value,
    fixed_values,
    nearest_first,
    parse_choice,
    possible_values,
)
from planner.strategy.strategy import Strategy

MOST_LEGAL = 6
FLAG = "--why-not"


class Answer(StrEnum):
    """What became of a choice. `faster`: the plan explained was not the best, and this beats it."""

    OWN = "own"
    SLOWER = "slower"
    FASTER = "faster"
    INFEASIBLE = "infeasible"


@frozen
class WhyNot:
    """One answer. Times are None where the choice is the plan's own or infeasible.

    `slower` is a share of the plan's step time, `causes_s` seconds by cause beyond the plan's, `gap` what the
    search left open, `legal` values of the key that have a feasible plan.
    """

    choice: str
    answer: Answer
    step_time_s: float | None = None
    slower: float | None = None
    causes_s: dict[str, float] | None = None
    mostly: str = ""
    gap: float | None = None
    strategy: Strategy | None = None
    binding: Binding | None = None
    legal: tuple[str, ...] = ()


def why_not(
    problem: PlanningProblem, evaluation: Evaluation, typed: str, clock: Clock, known: tuple[Strategy, ...]
) -> WhyNot:
    """The answer to KEY=VALUE. Raises InputError where there is no such key or value."""
    key, pins = parse_choice(typed, problem, FLAG)
    wanted = fixed_values(pins)[key]
    choice = choice_text(key, wanted)
    if chosen_value(evaluation.strategy, key) == wanted:
        return WhyNot(choice=choice, answer=Answer.OWN)
    need = fitting(problem, pins)
    solved = None
    if need is not None:
        solved = resolved(problem, pins, clock, (*known, need.strategy))
    if solved is None:
        return WhyNot(
            choice=choice,
            answer=Answer.INFEASIBLE,
            binding=binding(problem, survey(problem, pins)),
            legal=tuple(legal_values_of(problem, key, wanted)),
        )
    own_s = evaluation.estimate.step_time_s
    causes = differences_s(evaluation, solved.evaluation)
    slower = solved.step_time_s / own_s - 1
    worst = max(causes, key=lambda name: causes[name] if slower >= 0 else -causes[name])
    return WhyNot(
        choice=choice,
        answer=Answer.SLOWER if slower >= 0 else Answer.FASTER,
        step_time_s=solved.step_time_s,
        slower=slower,
        causes_s=causes,
        mostly=f"{cause_name(worst)} {format_difference(causes[worst])}",
        gap=solved.gap,
        strategy=solved.strategy,
    )


def legal_values_of(problem: PlanningProblem, key: str, wanted: Choice) -> list[str]:
    """Values of a key that have a feasible plan, the nearest first."""
    found: list[str] = []
    for value in nearest_first(possible_values(problem, key), wanted):
        _, pins = parse_choice(choice_text(key, value), problem, FLAG)
        if len(found) < MOST_LEGAL and fitting(problem, pins) is not None:
            found.append(choice_text(key, value).partition("=")[2])
    return found
