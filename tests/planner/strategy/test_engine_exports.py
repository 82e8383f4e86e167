"""What a search makes for an engine, an export writes: no rule is left to the export alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import pytest

from planner.advice.what_if import with_workload
from planner.calibration.software import settings_for_engine
from planner.export.targets import TARGETS, refusals
from planner.foundation.errors import InfeasibleError
from planner.job.engine_settings import Engine
from planner.job.objective import Goal
from planner.job.problem import Limits, PlanningProblem
from planner.model.spec import ModelSpec, Norm
from planner.model.workload import AdapterModules, Adapters, Method, Optimizer, Precision
from planner.search.solve import SolveOptions
from planner.search.solve_for import solve_for
from planner.strategy.fixed_choices import FixedChoices, keeps_choices, parse_fixed_choices
from planner.strategy.plan import Plan
from tests.planner import instances
from tests.plans import tiny_gpt2, tiny_mixtral, tiny_mla

PROBLEMS = 30
PRECISIONS = (Precision.BF16, Precision.BF16, *Precision)
OPTIMIZERS = (*[Optimizer.ADAMW] * 8, *Optimizer)
PINS = (
    *[()] * 6,
    *(("pp=2",), ("tp=2",), ("cp=2",), ("ep=2",), ("zero=0",), ("zero=1",), ("zero=3",)),
    *(("offload=optimizer",), ("offload=activations",)),
)
LORA = Adapters(rank=2, modules=AdapterModules.ALL)


def models() -> tuple[ModelSpec, ...]:
    """Small models: plain, tied, with other norms, with capped logits, of GPT-2's kind, with experts."""
    plain = instances.model(layers=2)
    capped = dataclasses.replace(plain.arithmetic, logit_cap=30.0)
    return (
        *[plain] * 6,
        dataclasses.replace(plain, tied_embeddings=True),
        dataclasses.replace(plain, norm=Norm.LAYERNORM),
        dataclasses.replace(plain, arithmetic=capped),
        tiny_gpt2(layers=2),
        tiny_mixtral(layers=2),
        tiny_mla(layers=2),
    )


def asked(seed: int, engine: Engine) -> tuple[PlanningProblem, tuple[str, ...]]:
    """A problem of a seed that an engine must run, and what is pinned."""
    draw = random.Random(seed)
    nodes, per_node = draw.choice([(1, 2), (1, 4), (2, 2)])
    rate = 10 ** draw.uniform(8, 11)
    device = dataclasses.replace(instances.device(), host_link_bytes_per_s=rate)
    cluster = instances.cluster(
        nodes=nodes, per_node=per_node, of=device, link_bytes_per_s=rate, inter_bytes_per_s=rate
    )
    problem = instances.problem(of=draw.choice(models()), on=cluster, seq=64, batch=4)
    problem = with_workload(problem, precision=draw.choice(PRECISIONS), optimizer=draw.choice(OPTIMIZERS))
    if draw.random() < 0.1:
        problem = with_workload(problem, method=Method.LORA, adapters=LORA)
    settings = settings_for_engine(engine, None, cluster)
    held = dataclasses.replace(problem, engine_settings=settings, limits=Limits(engine=engine))
    return held, draw.choice(PINS)


def solved(engine: Engine) -> Iterator[tuple[Plan, FixedChoices]]:
    """The plans of the grid, and their pins; an engine runs not all of it."""
    for seed in range(PROBLEMS):
        problem, pinned = asked(seed, engine)
        options = SolveOptions(
            pins=parse_fixed_choices(pinned), top=2, gap_tolerance=0.5, rounds=1, reproducible=True
        )
        try:
            plan = solve_for(problem, options, Goal())
        except InfeasibleError:
            continue
        yield plan, options.pins


@pytest.mark.parametrize("engine", list(Engine))
def test_what_is_solved_for_an_engine_is_exported(engine: Engine) -> None:
    """The plan and its runners-up break no rule of the export, and the plan is written."""
    to = "slurm" if engine is Engine.NATIVE else str(engine)
    count = 0
    for plan, pins in solved(engine):
        count += 1
        assert plan.engine is engine and keeps_choices(plan.strategy, pins)
        for strategy in (plan.strategy, *(other.strategy for other in plan.alternatives)):
            refused = refusals(dataclasses.replace(plan, strategy=strategy), to)
            assert [rejected.detail for rejected in refused] == [], strategy.degrees.label()
        assert all(file.text for file in TARGETS[to].export(plan).files)
    assert count >= PROBLEMS // 5
