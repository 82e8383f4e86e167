"""Rules of an engine's problems: a legal and an illegal one each, and what would help."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest

from planner.advice.repairs import why_infeasible
from planner.advice.resolve import Effort
from planner.advice.what_if import accepted
from planner.job.engine_settings import Engine
from planner.job.problem import PlanningProblem
from planner.model.spec import Norm
from planner.model.workload import Optimizer, Precision
from planner.search.space import shapes
from planner.strategy.engines.engine_rules import (
    ENGINE_PROBLEM_RULES,
    problem_refused,
)
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.rules import broken_rule, broken_rules
from planner.strategy.strategy import (
    Strategy,
    even_stages,
)
from tests.planner import instances
from tests.planner.engine_cases import LORA, TWO_NODES, ZERO3, D, M, N, T, held


class ProblemCase(NamedTuple):
    """A rule of problems with one that it allows and one that it refuses, and what the refusal says."""

    rule: str
    engine: Engine
    legal: PlanningProblem
    illegal: PlanningProblem
    says: tuple[str, ...]


def pooled() -> PlanningProblem:
    """The same with a pooler behind its blocks."""
    return instances.problem(of=dataclasses.replace(instances.model(), pooler=True), on=TWO_NODES)


def layernormed() -> PlanningProblem:
    """The same with other norms."""
    return instances.problem(of=dataclasses.replace(instances.model(), norm=Norm.LAYERNORM), on=TWO_NODES)


def capped() -> PlanningProblem:
    """The same with capped logits."""
    arithmetic = dataclasses.replace(instances.model().arithmetic, logit_cap=30.0)
    spec = dataclasses.replace(instances.model(), arithmetic=arithmetic)
    return instances.problem(of=spec, on=TWO_NODES)


PROBLEM_CASES = (
    ProblemCase("native_model", N, held(N), held(N, pooled()), ("pooler", "llama")),
    ProblemCase("torchtitan_model", T, held(T), held(T, layernormed()), ("layernorm", "Llama 3")),
    ProblemCase(
        "torchtitan_workload", T, held(T), held(T, precision=Precision.FP16, optimizer=Optimizer.SGD),
        ("sgd", "fp16", "adamw"),
    ),
    ProblemCase("torchtitan_workload", T, held(T, precision=Precision.FP8), held(T, **LORA), ("lora",)),
    ProblemCase("megatron_model", M, held(M, layernormed()), held(M, capped()), ("capped", "GPT's")),
    ProblemCase("megatron_adapters", M, held(M), held(M, **LORA), ("Bridge", "finetune")),
    ProblemCase("deepspeed_precision", D, held(D), held(D, precision=Precision.FP8), ("fp8", "fp16")),
)  # fmt: skip


@pytest.mark.parametrize("case", PROBLEM_CASES, ids=lambda case: f"{case.rule}-{case.says[0]}")
def test_a_rule_of_problems(case: ProblemCase) -> None:
    """It is asked once a search, whose space is then empty, and of every strategy."""
    (rule,) = (each for each in ENGINE_PROBLEM_RULES[case.engine] if each.__name__ == case.rule)
    assert rule(case.legal) is None and not problem_refused(case.legal)
    rejected = rule(case.illegal)
    assert rejected is not None and rejected.rule == case.rule and rejected.legal and rejected.fix
    for said in case.says:
        assert said in f"{rejected.detail} | {rejected.legal}", said
    assert list(shapes(case.illegal, FixedChoices())) == problem_refused(case.illegal) == [rejected]
    assert broken_rule(case.illegal, ZERO3) == rejected
    strategy = Strategy(degrees=ZERO3, stages=even_stages(4, 1))
    assert rejected in broken_rules(case.illegal, strategy)


def test_every_rule_of_problems_has_a_case() -> None:
    known = {(engine, rule.__name__) for engine, rules in ENGINE_PROBLEM_RULES.items() for rule in rules}
    assert {(case.engine, case.rule) for case in PROBLEM_CASES} == known
    assert all(rule.__doc__ for rules in ENGINE_PROBLEM_RULES.values() for rule in rules)


FLAGS = {
    "megatron_adapters": {"--method finetune", "--engine native", "--engine deepspeed"},
    "deepspeed_precision": {
        "--precision bf16",
        "--engine native",
        "--engine megatron",
        "--engine torchtitan",
    },
    "megatron_model": {"--engine native", "--engine deepspeed"},
}


@pytest.mark.parametrize("case", PROBLEM_CASES, ids=lambda case: f"{case.rule}-{case.says[0]}")
def test_changes_that_an_engine_accepts(case: ProblemCase) -> None:
    """Precision, method, optimizer or another engine; none where nothing is refused."""
    changes = list(accepted(case.illegal))
    assert not any(problem_refused(change.problem) for change in changes)
    assert {change.flag for change in changes} >= FLAGS.get(case.rule, set())
    assert all(
        change.problem.engine_settings.engine is change.problem.limits.engine for change in changes[-1:]
    )
    assert not list(accepted(case.legal))


def test_what_would_help_an_engine_is_a_plan_that_it_can_run() -> None:
    """The binding rule is named, and every repair keeps the rules of its engine."""
    for problem, rule in (
        (held(D, precision=Precision.FP8), "deepspeed_precision"),
        (dataclasses.replace(held(D, seq=2048), memory_limit_bytes=1 << 29), "memory"),
    ):
        answer = why_infeasible(problem, FixedChoices(), Effort(each_s=None, total_s=None))
        assert answer.binding.rule == rule
        assert answer.repairs and all(repair.verified for repair in answer.repairs)
