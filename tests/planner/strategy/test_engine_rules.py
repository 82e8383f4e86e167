"""Every rule of every engine: a legal and an illegal case, and what the message says."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest

from planner.job.engine_settings import Engine
from planner.job.problem import Limits, PlanningProblem
from planner.model.attention import CpExchange
from planner.model.workload import Optimizer, Precision
from planner.search.space import shapes
from planner.strategy.engines.engine_rules import (
    ENGINE_RULES,
    ENGINE_SCHEDULES,
    EngineRule,
    candidate_schedules,
)
from planner.strategy.fixed_choices import FixedChoices, parse_fixed_choices
from planner.strategy.rules import broken_rule, broken_rules
from planner.strategy.strategy import Degrees, Schedule, Strategy, Zero
from tests.planner import instances
from tests.planner.engine_cases import (
    LORA,
    PP2,
    PP3,
    TIED,
    TP2,
    TWO_NODES,
    ZERO3,
    D,
    M,
    N,
    T,
    experts,
    grouped,
    held,
    uneven,
    windowed,
)


class Case(NamedTuple):
    """A rule with degrees that it allows and degrees that it refuses, and what the refusal says."""

    rule: str
    engine: Engine
    legal: Degrees
    illegal: Degrees
    says: tuple[str, ...]
    legal_problem: PlanningProblem | None = None
    illegal_problem: PlanningProblem | None = None


CASES = (
    Case(
        "native_context", N, Degrees(cp=2, dp_replicate=4, cp_exchange=CpExchange.ALL_TO_ALL),
        Degrees(cp=2, dp_replicate=4), ("cp=2", "ring", "window of 64", "all_to_all"),
        legal_problem=windowed(), illegal_problem=windowed(),
    ),
    Case(
        "native_workload", N, ZERO3, ZERO3, ("fp8", "multiple of 16", "bf16"),
        illegal_problem=held(N, precision=Precision.FP8, seq=1000, **LORA),
    ),
    Case(
        "native_vocabulary", N, TP2, Degrees(tp=4, dp_replicate=2),
        ("tp=4", "vocabulary of 5", "the last of 4 parts of 2 rows has none", "1, 2, 3, 5"),
        legal_problem=held(N, instances.problem(of=instances.model(vocab=255), on=TWO_NODES)),
        illegal_problem=held(N, instances.problem(of=instances.model(vocab=5), on=TWO_NODES)),
    ),
    Case(
        "torchtitan_sharding", T, ZERO3, dataclasses.replace(ZERO3, zero=Zero.OPTIMIZER),
        ("zero=1", "dp_shard=8", "= 8", "zero=3"),
    ),
    Case(
        "torchtitan_sharding", T, dataclasses.replace(ZERO3, zero=Zero.GRADIENTS),
        Degrees(cp=2, dp_replicate=4, cp_exchange=CpExchange.GATHER), ("zero=0", "cp=2", "zero=3"),
    ),
    Case(
        "torchtitan_replicas", T, Degrees(dp_replicate=8), Degrees(pp=2, dp_replicate=4),
        ("dp=4", "pp=2", "zero=2 or 3"),
    ),
    Case(
        "torchtitan_replicas", T, Degrees(pp=2, dp_replicate=2, dp_shard=2, zero=Zero.PARAMETERS),
        Degrees(tp=2, sequence_parallel=True, dp_replicate=4), ("dp=4", "tp=2", "pp=1"),
    ),
    Case(
        "torchtitan_sequence_parallel", T,
        Degrees(tp=2, sequence_parallel=True, dp_shard=4, zero=Zero.PARAMETERS),
        Degrees(tp=2, dp_shard=4, zero=Zero.PARAMETERS), ("tp=2", "sequence_parallel=true"),
    ),
    Case(
        "torchtitan_sequence", T,
        Degrees(tp=4, sequence_parallel=True, dp_shard=2, zero=Zero.PARAMETERS),
        Degrees(tp=4, sequence_parallel=True, dp_shard=2, zero=Zero.PARAMETERS),
        ("132", "4 x 2 = 8", "128", "136"), illegal_problem=held(T, seq=132),
    ),
    Case(
        "torchtitan_schedule", T,
        dataclasses.replace(PP2, zero=Zero.PARAMETERS, schedule=Schedule.ZBV, chunks=2),
        dataclasses.replace(PP2, zero=Zero.PARAMETERS, schedule=Schedule.ZB_H1),
        ("zb-h1", "zbv", "dualpipev"),
    ),
    Case(
        "torchtitan_context", T,
        Degrees(cp=2, dp_shard=4, zero=Zero.PARAMETERS, cp_exchange=CpExchange.GATHER),
        Degrees(cp=2, dp_shard=4, zero=Zero.PARAMETERS), ("cp=2", "ring", "cp_exchange=gather"),
    ),
    Case(
        "torchtitan_experts", T,
        Degrees(tp=4, sequence_parallel=True, dp_shard=2, zero=Zero.PARAMETERS, ep=8, etp=1),
        Degrees(tp=4, sequence_parallel=True, dp_shard=2, zero=Zero.PARAMETERS, ep=2, etp=2),
        ("etp=2", "tp=4", "etp=1 or 4"), legal_problem=experts(), illegal_problem=experts(),
    ),
    Case(
        "torchtitan_heads", T, Degrees(tp=2, sequence_parallel=True, dp_shard=4, zero=Zero.PARAMETERS),
        Degrees(tp=4, sequence_parallel=True, dp_shard=2, zero=Zero.PARAMETERS),
        ("tp=4", "2 key-value heads", "1, 2"), legal_problem=grouped(), illegal_problem=grouped(),
    ),
    Case(
        "torchtitan_experts", T, Degrees(dp_shard=8, zero=Zero.PARAMETERS, ep=4),
        Degrees(tp=2, sequence_parallel=True, dp_shard=4, zero=Zero.PARAMETERS, ep=1 + 2, etp=1),
        ("ep=3", "cp x tp=2", "dp_shard=4", "ep of 2, 4, 8"), legal_problem=experts(),
        illegal_problem=experts(),
    ),
    Case(
        "torchtitan_tied", T, PP3, PP3, ("pp=2", "tied", "pp=1"),
        illegal_problem=held(T, instances.problem(of=TIED, on=TWO_NODES)),
    ),
    Case(
        "torchtitan_tied", T, ZERO3, PP3, ("pp=2", "tied", "pp=1"),
        legal_problem=held(T, instances.problem(of=TIED, on=TWO_NODES)),
        illegal_problem=held(T, instances.problem(of=TIED, on=TWO_NODES)),
    ),
    Case(
        "torchtitan_precision", T, PP3, Degrees(tp=4, pp=2, sequence_parallel=True),
        ("bf16", "tp=4", "pp=2", "fp32"),
    ),
    Case(
        "torchtitan_precision", T, Degrees(pp=8), Degrees(pp=8), ("fp8", "pp=8", "zero=2 or 3"),
        legal_problem=held(T, precision=Precision.FP32), illegal_problem=held(T, precision=Precision.FP8),
    ),
    Case(
        "torchtitan_precision", T, Degrees(dp_replicate=8), Degrees(tp=8, sequence_parallel=True),
        ("bf16", "tp=8", "pp=1"),
    ),
    Case(
        "megatron_schedule", M, dataclasses.replace(PP2, schedule=Schedule.INTERLEAVED, chunks=2),
        dataclasses.replace(PP2, schedule=Schedule.GPIPE), ("gpipe", "1f1b", "interleaved"),
    ),
    Case(
        "megatron_sharding", M, PP2, dataclasses.replace(PP2, zero=Zero.GRADIENTS),
        ("zero=2", "pp=2", "zero=0 or 1"),
    ),
    Case("megatron_sharding", M, ZERO3, dataclasses.replace(PP2, zero=Zero.PARAMETERS), ("zero=3", "pp=1")),
    Case(
        "megatron_experts_sequence", M, Degrees(tp=2, sequence_parallel=True, dp_replicate=4),
        Degrees(tp=2, dp_replicate=4), ("tp=2", "sequence_parallel=true"),
        legal_problem=experts(), illegal_problem=experts(),
    ),
    Case(
        "megatron_heads", M, Degrees(tp=2, dp_replicate=4), Degrees(tp=4, dp_replicate=2),
        ("tp=4", "2 key-value heads", "1, 2"), legal_problem=grouped(), illegal_problem=grouped(),
    ),
    Case(
        "megatron_context", M, Degrees(cp=4, dp_replicate=2, cp_exchange=CpExchange.ALL_TO_ALL),
        Degrees(cp=4, dp_replicate=2, cp_exchange=CpExchange.ALL_TO_ALL),
        ("cp=4", "132", "8", "1, 2, 3"), illegal_problem=held(M, seq=132),
    ),
    Case(
        "megatron_optimizer", M, Degrees(dp_replicate=8), dataclasses.replace(ZERO3, zero=Zero.OPTIMIZER),
        ("sgd", "zero=1", "zero=0"), legal_problem=held(M, optimizer=Optimizer.SGD),
        illegal_problem=held(M, optimizer=Optimizer.SGD),
    ),
    Case(
        "megatron_optimizer", M, ZERO3, Degrees(dp_replicate=8), ("adafactor", "adamw or sgd"),
        illegal_problem=held(M, optimizer=Optimizer.ADAFACTOR),
    ),
    Case(
        "megatron_experts_precision", M, Degrees(dp_replicate=8), Degrees(dp_replicate=8, ep=4),
        ("ep=4", "fp16", "ep=1"),
        legal_problem=held(M, experts(), precision=Precision.FP16),
        illegal_problem=held(M, experts(), precision=Precision.FP16),
    ),
    Case(
        "megatron_experts_precision", M, Degrees(dp_replicate=8, ep=4), Degrees(dp_replicate=8, ep=2),
        ("ep=2", "fp16", "bf16"), legal_problem=held(M, experts()),
        illegal_problem=held(M, experts(), precision=Precision.FP16),
    ),
    Case(
        "deepspeed_pipeline_sharding", D, PP2, dataclasses.replace(PP2, zero=Zero.GRADIENTS),
        ("zero=2", "pp=2", "zero=0 or 1"),
    ),
    Case(
        "deepspeed_heads", D, Degrees(tp=2, dp_replicate=4), Degrees(tp=4, dp_replicate=2),
        ("tp=4", "2 key-value heads", "1, 2"), legal_problem=grouped(), illegal_problem=grouped(),
    ),
    Case(
        "deepspeed_schedule", D, PP2, dataclasses.replace(PP2, schedule=Schedule.INTERLEAVED, chunks=2),
        ("interleaved", "chunks=2", "1f1b"),
    ),
    Case(
        "deepspeed_sequence_parallel", D, Degrees(tp=2, dp_replicate=4),
        Degrees(tp=2, dp_replicate=4, sequence_parallel=True), ("tp=2", "false"),
    ),
    Case(
        "deepspeed_tensor_sharding", D, Degrees(tp=2, dp_shard=4, zero=Zero.GRADIENTS),
        Degrees(tp=2, dp_shard=4, zero=Zero.PARAMETERS), ("zero=3", "tp=2", "0, 1 or 2"),
    ),
    Case(
        "deepspeed_hybrid", D, ZERO3, Degrees(dp_replicate=2, dp_shard=4, zero=Zero.PARAMETERS),
        ("zero=3", "4 of dp=8", "dp_shard=8"),
    ),
    Case(
        "deepspeed_hybrid", D, Degrees(dp_replicate=8),
        Degrees(dp_replicate=2, dp_shard=4, zero=Zero.OPTIMIZER), ("zero=1", "4 of dp=8", "dp_shard=8"),
    ),
    Case(
        "deepspeed_optimizer", D, Degrees(dp_replicate=8), ZERO3, ("adafactor", "zero=3", "zero=0"),
        legal_problem=held(D, optimizer=Optimizer.ADAFACTOR),
        illegal_problem=held(D, optimizer=Optimizer.ADAFACTOR),
    ),
    Case(
        "deepspeed_optimizer", D, ZERO3, Degrees(dp_shard=8, zero=Zero.OPTIMIZER), ("adafactor", "zero=1"),
        legal_problem=held(D, optimizer=Optimizer.MUON),
        illegal_problem=held(D, optimizer=Optimizer.ADAFACTOR),
    ),
    Case(
        "deepspeed_context", D, Degrees(cp=2, dp_replicate=4, cp_exchange=CpExchange.ALL_TO_ALL),
        Degrees(cp=2, dp_replicate=4), ("cp=2", "ring", "all_to_all"),
    ),
    Case(
        "deepspeed_context", D, PP2, Degrees(cp=2, pp=2, dp_replicate=2, cp_exchange=CpExchange.ALL_TO_ALL),
        ("cp=2", "pp=2", "pp=1"),
    ),
    Case(
        "deepspeed_experts", D, Degrees(dp_shard=8, zero=Zero.GRADIENTS, ep=4),
        Degrees(dp_shard=8, zero=Zero.PARAMETERS, ep=4), ("ep=4", "zero=3", "ep=1"),
        legal_problem=experts(), illegal_problem=experts(),
    ),
)  # fmt: skip


def rule_named(engine: Engine, name: str) -> EngineRule:
    (found,) = (rule for rule in ENGINE_RULES[engine] if rule.__name__ == name)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}-{case.says[0]}")
def test_a_rule_of_degrees(case: Case) -> None:
    rule = rule_named(case.engine, case.rule)
    legal, illegal = case.legal_problem or held(case.engine), case.illegal_problem or held(case.engine)
    assert rule(legal, case.legal) is None
    rejected = rule(illegal, case.illegal)
    assert rejected is not None and rejected.rule == case.rule
    for said in case.says:
        assert said in f"{rejected.detail} | {rejected.legal}", said
    assert rejected.legal and rejected.fix
    assert any(digit.isdigit() for digit in rejected.detail)


def test_every_rule_of_degrees_has_a_case() -> None:
    known = {(engine, rule.__name__) for engine, rules in ENGINE_RULES.items() for rule in rules}
    assert {(case.engine, case.rule) for case in CASES} == known
    assert all(rule.__doc__ for rules in ENGINE_RULES.values() for rule in rules)


def test_rules_of_an_engine_hold_where_it_is_asked_for_alone() -> None:
    """`broken_rule` and `broken_rules` see them; without an engine, or for degrees alone, they do not."""
    degrees = dataclasses.replace(PP2, num_micro_batches=2)
    strategy = Strategy(degrees=degrees, stages=uneven((2, 0, 0), (1, 0, 1)))
    zero2 = dataclasses.replace(degrees, zero=Zero.GRADIENTS)
    free, bound = held(None), held(D)
    degrees_alone = dataclasses.replace(bound, limits=dataclasses.replace(bound.limits, whole=False))
    assert broken_rule(free, zero2) is None and not broken_rules(free, strategy)
    rejected = broken_rule(bound, zero2)
    assert rejected is not None and rejected.rule == "deepspeed_pipeline_sharding"
    assert [each.rule for each in broken_rules(bound, strategy)] == ["deepspeed_recompute"]
    assert not broken_rules(degrees_alone, strategy)
    assert broken_rule(degrees_alone, zero2) is not None


@pytest.mark.parametrize("engine", list(Engine))
def test_the_space_of_an_engine_keeps_its_rules(engine: Engine) -> None:
    """What the search looks at is legal and not empty, and of the engine's schedules."""
    problem = held(engine)
    legal = [shape for shape in shapes(problem, FixedChoices()) if isinstance(shape, Degrees)]
    free = [shape for shape in shapes(held(None), FixedChoices()) if isinstance(shape, Degrees)]
    assert 0 < len(legal) <= len(free)
    assert {d.schedule for d in legal if d.pp > 1} <= set(candidate_schedules(engine))
    assert set(legal) == {d for d in free if broken_rule(problem, d) is None}


def test_candidate_schedules() -> None:
    assert candidate_schedules(None) == tuple(Schedule)
    assert candidate_schedules(Engine.NATIVE) == tuple(Schedule)
    for engine, schedules in ENGINE_SCHEDULES.items():
        if engine is Engine.NATIVE:  # has all, so no rule
            continue
        rule = rule_named(engine, f"{engine}_schedule")
        for schedule in Schedule:
            degrees = dataclasses.replace(PP2, schedule=schedule, chunks=schedule.least_chunks)
            assert (rule(held(engine), degrees) is None) == (schedule in schedules), (engine, schedule)


def test_max_tp_is_a_limit_with_a_name() -> None:
    problem = dataclasses.replace(held(None), limits=Limits(max_tp=2))
    legal = [shape for shape in shapes(problem, FixedChoices()) if isinstance(shape, Degrees)]
    assert {degrees.tp for degrees in legal} == {1, 2}
    rejected = broken_rule(problem, Degrees(tp=4, dp_replicate=2, num_micro_batches=4))
    assert rejected is not None and rejected.rule == "max_tp"
    assert "tp=4" in rejected.detail and "--max-tp 2" in rejected.detail and rejected.legal == "1, 2"
    assert not [s for s in shapes(problem, parse_fixed_choices(("tp=4",))) if isinstance(s, Degrees)]
