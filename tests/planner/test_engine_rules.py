"""Every rule of every engine: a legal and an illegal case, and what the message says."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest

from planner.attention import Attention, Reach, Span
from planner.engine_rules import (
    ENGINE_PROBLEM_RULES,
    ENGINE_RULES,
    ENGINE_SCHEDULES,
    ENGINE_STRATEGY_RULES,
    EngineRule,
    StrategyRule,
    candidate_schedules,
    problem_refused,
)
from planner.engines.recipes import every_kth, first_of_each, recipe_families, stages_of_ranks
from planner.feed_forward import Activation, Experts, Mlp
from planner.limits import Limits
from planner.model import Norm
from planner.problem import PlanningProblem
from planner.rules import broken_rule, broken_rules
from planner.search.space import Pins, parse_pins, shapes
from planner.stack import Engine
from planner.strategy import (
    CpExchange,
    Degrees,
    Offload,
    OffloadCounts,
    Recompute,
    RecomputeCounts,
    Schedule,
    Stage,
    Strategy,
    Zero,
    even_stages,
    offloaded,
    sized_stages,
)
from planner.workload import AdapterModules, Adapters, Method, Optimizer, Precision

from . import instances

N, T, M, D = Engine.NATIVE, Engine.TORCHTITAN, Engine.MEGATRON, Engine.DEEPSPEED


def held(engine: Engine | None, problem: PlanningProblem | None = None, **workload: Any) -> PlanningProblem:
    """A problem on two nodes of four devices that an engine must run."""
    base = problem or instances.problem(on=instances.cluster(nodes=2))
    changed = dataclasses.replace(base.workload, **workload)
    return dataclasses.replace(base, workload=changed, limits=Limits(engine=engine))


def grouped() -> PlanningProblem:
    """The same with two key-value heads in every layer."""
    mixer = Attention(heads=4, kv_heads=2, head_dim=16)
    spec = instances.model(blocks=[dataclasses.replace(instances.dense_block(64), mixer=mixer)] * 4)
    return instances.problem(of=spec, on=instances.cluster(nodes=2))


def experts() -> PlanningProblem:
    """The same with eight experts in every layer."""
    mlp = Mlp(width=128, gated=True, activation=Activation.SILU)
    block = dataclasses.replace(instances.dense_block(64), mlp=Experts(count=8, topk=2, expert=mlp))
    spec = instances.model(blocks=[block] * 4)
    return instances.problem(of=spec, on=instances.cluster(nodes=2))


class Case(NamedTuple):
    """A rule with degrees that it allows and degrees that it refuses, and what the refusal says."""

    rule: str
    engine: Engine
    legal: Degrees
    illegal: Degrees
    says: tuple[str, ...]
    legal_problem: PlanningProblem | None = None
    illegal_problem: PlanningProblem | None = None


LORA: dict[str, Any] = {"method": Method.LORA, "adapters": Adapters(rank=8, modules=AdapterModules.ALL)}
PP2 = Degrees(pp=2, dp_shard=4, zero=Zero.OPTIMIZER)
TP2 = Degrees(tp=2, dp_replicate=4)
TWO_NODES = instances.cluster(nodes=2)
ZERO3 = Degrees(dp_shard=8, zero=Zero.PARAMETERS)
PP3 = Degrees(pp=2, dp_shard=4, zero=Zero.PARAMETERS)
TIED = dataclasses.replace(instances.model(), tied_embeddings=True)


def windowed() -> PlanningProblem:
    """The same with windows of 64 keys in every layer."""
    block = instances.dense_block(64)
    assert isinstance(block.mixer, Attention)
    mixer = dataclasses.replace(block.mixer, span=Span(reach=Reach.WINDOW, size=64))
    spec = instances.model(blocks=[dataclasses.replace(block, mixer=mixer)] * 4)
    return held(N, instances.problem(of=spec, on=TWO_NODES))


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
    ProblemCase("megatron_model", M, held(M, layernormed()), held(M, capped()), ("capped", "Llama's or GPT's")),
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
    assert list(shapes(case.illegal, Pins())) == problem_refused(case.illegal) == [rejected]
    assert broken_rule(case.illegal, ZERO3) == rejected
    strategy = Strategy(degrees=ZERO3, stages=even_stages(4, 1))
    assert rejected in broken_rules(case.illegal, strategy)


def test_every_rule_of_problems_has_a_case() -> None:
    known = {(engine, rule.__name__) for engine, rules in ENGINE_PROBLEM_RULES.items() for rule in rules}
    assert {(case.engine, case.rule) for case in PROBLEM_CASES} == known
    assert all(rule.__doc__ for rules in ENGINE_PROBLEM_RULES.values() for rule in rules)


def uneven(*counts: tuple[int, int, int]) -> tuple[Stage, ...]:
    """Stages with so many blocks that recompute nothing, selectively, in full."""
    stages, first = [], 0
    for none, selective, full in counts:
        each = RecomputeCounts(none=none, selective=selective, full=full)
        stages.append(Stage(first=first, end=first + each.layers, recompute=each))
        first += each.layers
    return tuple(stages)


PLAIN = even_stages(8, 2)
FULL = even_stages(8, 2, Recompute.FULL)
SELECTIVE = even_stages(8, 2, Recompute.SELECTIVE)
OFF, KEPT = Offload.OPTIMIZER, Offload.ACTIVATIONS


def kept(blocks: int) -> tuple[Stage, ...]:
    """One stage of four blocks, of which so many keep activations in host memory."""
    counts = OffloadCounts(activations=blocks)
    return tuple(dataclasses.replace(stage, offload=counts) for stage in even_stages(4, 1))


class StageCase(NamedTuple):
    """A rule of a whole strategy with stages that it allows and stages that it refuses."""

    rule: str
    engine: Engine
    legal: tuple[Stage, ...]
    illegal: tuple[Stage, ...]
    says: tuple[str, ...]
    degrees: Degrees = PP2
    legal_degrees: Degrees | None = None
    workload: dict[str, Any] = {}


STAGE_CASES = (
    StageCase(
        "native_offload", N, offloaded(FULL, KEPT), offloaded(SELECTIVE, KEPT),
        ("optimizer", "none"),
    ),
    StageCase(
        "torchtitan_recompute", T, even_stages(8, 2, Recompute.SELECTIVE), uneven((3, 1, 0), (4, 0, 0)),
        ("7 blocks", "1 selectively", "every k-th"),
    ),
    StageCase(
        "torchtitan_recompute", T, uneven((2, 0, 2), (2, 0, 2)), uneven((0, 0, 4), (4, 0, 0)),
        ("4 blocks recompute nothing", "4 in full"),
    ),
    StageCase("torchtitan_offload", T, PLAIN, offloaded(PLAIN, OFF), ("optimizer", "offload=none")),
    StageCase(
        "megatron_recompute", M, uneven((3, 0, 1), (3, 0, 1)), uneven((2, 0, 2), (3, 0, 1)),
        ("2/0/2, 3/0/1", "first N of every stage"),
    ),
    StageCase(
        "megatron_recompute", M, even_stages(8, 2, Recompute.SELECTIVE), uneven((0, 4, 0), (0, 3, 1)),
        ("0/4/0, 0/3/1", "selective"),
    ),
    StageCase(
        "megatron_offload", M, offloaded(PLAIN, OFF), offloaded(PLAIN, KEPT), ("pp=2", "recompute=none"),
    ),
    StageCase(
        "megatron_offload", M, offloaded(even_stages(8, 1), KEPT), offloaded(even_stages(8, 1), OFF),
        ("zero=3", "zero=1"), ZERO3,
    ),
    StageCase("deepspeed_stages", D, sized_stages([5, 4]), sized_stages([5, 3]), ("3 to 5", "4 blocks")),
    StageCase("deepspeed_stages", D, PLAIN, sized_stages([2, 5]), ("2 to 5", "3 or 4")),
    StageCase(
        "deepspeed_recompute", D, FULL, uneven((4, 0, 0), (3, 0, 1)),
        ("7 blocks", "1 in full", "none or full"),
    ),
    StageCase(
        "deepspeed_offload", D, offloaded(PLAIN, OFF), offloaded(PLAIN, OFF), ("zero=0", "zero=1, 2 or 3"),
        Degrees(pp=2, dp_replicate=4), PP2,
    ),
    StageCase(
        "deepspeed_offload", D, offloaded(FULL, KEPT), offloaded(PLAIN, KEPT),
        ("activations", "recompute=full"),
    ),
    StageCase(
        "deepspeed_offload_optimizer", D, offloaded(FULL, KEPT), offloaded(PLAIN, OFF),
        ("muon", "adamw", "offload=none"), workload={"optimizer": Optimizer.MUON},
    ),
    StageCase(
        "megatron_offload_layers", M, kept(3), kept(4), ("all 4", "3 blocks"), Degrees(dp_replicate=8),
    ),
)  # fmt: skip


def strategy_rule(engine: Engine, name: str) -> StrategyRule:
    (found,) = (rule for rule in ENGINE_STRATEGY_RULES[engine] if rule.__name__ == name)
    return found


@pytest.mark.parametrize("case", STAGE_CASES, ids=lambda case: f"{case.rule}-{case.says[0]}")
def test_a_rule_of_stages(case: StageCase) -> None:
    rule, problem = strategy_rule(case.engine, case.rule), held(case.engine, **case.workload)
    assert rule(problem, Strategy(degrees=case.legal_degrees or case.degrees, stages=case.legal)) is None
    rejected = rule(problem, Strategy(degrees=case.degrees, stages=case.illegal))
    assert rejected is not None and rejected.rule == case.rule
    for said in case.says:
        assert said in f"{rejected.detail} | {rejected.legal}", said
    assert rejected.legal and rejected.fix


def test_every_rule_of_stages_has_a_case() -> None:
    known = {(engine, rule.__name__) for engine, rules in ENGINE_STRATEGY_RULES.items() for rule in rules}
    assert {(case.engine, case.rule) for case in STAGE_CASES} == known
    assert all(rule.__doc__ for rules in ENGINE_STRATEGY_RULES.values() for rule in rules)


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
    legal = [shape for shape in shapes(problem, Pins()) if isinstance(shape, Degrees)]
    free = [shape for shape in shapes(held(None), Pins()) if isinstance(shape, Degrees)]
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
    legal = [shape for shape in shapes(problem, Pins()) if isinstance(shape, Degrees)]
    assert {degrees.tp for degrees in legal} == {1, 2}
    rejected = broken_rule(problem, Degrees(tp=4, dp_replicate=2, num_micro_batches=4))
    assert rejected is not None and rejected.rule == "max_tp"
    assert "tp=4" in rejected.detail and "--max-tp 2" in rejected.detail and rejected.legal == "1, 2"
    assert not [s for s in shapes(problem, parse_pins(("tp=4",))) if isinstance(s, Degrees)]


@pytest.mark.parametrize("engine", list(Engine))
def test_recipes_are_what_the_engine_can_express(engine: Engine) -> None:
    """Each keeps the rules of stages, and recomputes more than the one before it in its family."""
    problem = held(engine)
    for degrees, sizes in (
        (Degrees(pp=2, chunks=2, schedule=Schedule.INTERLEAVED, dp_replicate=4), (3, 2, 2, 1)),
        (Degrees(pp=2, chunks=2, schedule=Schedule.ZBV, dp_replicate=4), (1, 2, 3, 4)),
        (Degrees(dp_replicate=8), (7,)),
    ):
        for family in recipe_families(engine, degrees, sizes):
            full = [sum(stage.recompute.full for stage in stages) for stages in family]
            assert full == sorted(set(full))
            for stages in family:
                assert stages[-1].end == sum(sizes)
                strategy = Strategy(degrees=degrees, stages=stages)
                broken = [rule(problem, strategy) for rule in ENGINE_STRATEGY_RULES[engine]]
                assert not any(broken), broken


def test_blocks_of_a_rank_are_counted_through() -> None:
    """torchtitan's one counter runs over the stages of a rank; Megatron-LM counts in each stage."""
    looped = Degrees(pp=2, chunks=2, schedule=Schedule.INTERLEAVED)
    assert stages_of_ranks(looped) == [[0, 2], [1, 3]]
    assert stages_of_ranks(Degrees(pp=2, chunks=2, schedule=Schedule.ZBV)) == [[0, 3], [1, 2]]
    kth = every_kth(looped, (3, 3, 3, 3), 2)
    assert [stage.recompute.full for stage in kth] == [1, 1, 2, 2]
    assert [stage.recompute.full for stage in first_of_each((3, 3, 1, 3), 2)] == [2, 2, 1, 2]
