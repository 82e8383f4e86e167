"""Every rule of an engine for whole strategies: a legal and an illegal case, and its recipes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest

from planner.job.engine_settings import Engine
from planner.model.sublayer import Recompute
from planner.model.workload import Optimizer
from planner.strategy.engines.engine_rules import (
    ENGINE_STRATEGY_RULES,
    StrategyRule,
)
from planner.strategy.engines.recipes import every_kth, first_of_each, recipe_families, stages_of_ranks
from planner.strategy.strategy import (
    Degrees,
    Offload,
    OffloadCounts,
    Schedule,
    Stage,
    Strategy,
    even_stages,
    offloaded,
    sized_stages,
)
from tests.planner.engine_cases import PP2, ZERO3, D, M, N, T, held, uneven

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
    optimizer: Optimizer = Optimizer.ADAMW


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
        ("muon", "adamw", "offload=none"), optimizer=Optimizer.MUON,
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
    rule, problem = strategy_rule(case.engine, case.rule), held(case.engine, optimizer=case.optimizer)
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
