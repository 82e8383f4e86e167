"""Plans that are exported by `bench.export`: every axis of each engine, over dense models and experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from planner.calibration.software import settings_for_engine
from planner.commands.splitting.estimate import strategy_of
from planner.cost.evaluate import CostModel
from planner.export.targets import refusals
from planner.hardware.catalog import load_model
from planner.hardware.cluster_text import parse_cluster
from planner.job.engine_settings import Engine
from planner.job.problem import Limits, PlanningProblem
from planner.model.workload import AdapterModules, Adapters, Method, Optimizer, Precision, Workload
from planner.search.solve import make_plan
from planner.strategy.engines.recipes import every_kth, first_of_each
from planner.strategy.fixed_choices import parse_fixed_choices
from planner.strategy.plan import Plan
from planner.strategy.strategy import Strategy, sized_stages

DENSE = "llama-3.1-8b"
LATENT = "deepseek-v3-671b-r1"
LARGE = "32x8:h100-sxm-80gb@ndr400x8"
NODES = "4x8:h100-sxm-80gb@ndr400x8"


class Case(NamedTuple):
    """A plan to export: its target, the engine that it is priced as, and what is chosen.

    `recipe` is first:N, every:K or empty, `sizes` the blocks of uneven stages, `replicas` those of shards.
    """

    to: str
    fixed: str
    model: str = DENSE
    cluster: str = NODES
    precision: Precision = Precision.BF16
    optimizer: Optimizer = Optimizer.ADAMW
    lora: bool = False
    sizes: tuple[int, ...] = ()
    recipe: str = ""
    replicas: int = 1

    @property
    def name(self) -> str:
        parts = [
            self.to,
            self.model,
            self.fixed.replace(" ", ","),
            self.precision,
            self.optimizer,
            self.recipe,
        ]
        return (
            "-".join(str(part) for part in parts if part)
            + ("-lora" if self.lora else "")
            + (f"-replicas{self.replicas}" if self.replicas > 1 else "")
        )


UNEVEN = (9, 8, 8, 7)
MEGATRON = (
    *("zero=0", "zero=1", "zero=2", "zero=3 recompute=full", "tp=8 sequence_parallel=true zero=1"),
    *("tp=2 pp=4 zero=1 sequence_parallel=true", "pp=4 chunks=2 schedule=interleaved zero=1"),
    *("tp=4 recompute=selective zero=1", "cp=2 zero=1", "cp=4 cp_exchange=all_to_all zero=1"),
    *("cp=2 cp_exchange=gather tp=2", "offload=optimizer zero=1", "recompute=full pp=2"),
)
EXPERTS = ("ep=8 zero=1", "ep=8 etp=1 tp=2 sequence_parallel=true zero=1", "ep=4 tp=2 sequence_parallel=true")
DEEPSPEED = (
    *("zero=0", "zero=1", "zero=2", "zero=3", "zero=3 recompute=full micro_batch=2", "tp=4 zero=1"),
    *("tp=2 zero=2", "pp=4 zero=1", "pp=2 tp=2", "cp=4 cp_exchange=all_to_all zero=3"),
    *("offload=optimizer zero=2", "recompute=full offload=activations zero=1", "pp=4 recompute=full zero=1"),
)
TORCHTITAN = (
    *("zero=2", "zero=3", "zero=3 recompute=selective", "zero=3 tp=8 recompute=full", "zero=3 cp=2"),
    *(
        "zero=2 pp=4",
        "zero=3 pp=4 schedule=gpipe",
        "zero=2 pp=2 schedule=zbv",
        "zero=2 pp=2 schedule=dualpipev",
    ),
    *("zero=2 pp=4 chunks=2 schedule=interleaved", "zero=2 tp=2 pp=2 cp=2", "zero=0"),
)
ACCELERATE = (
    *("zero=0", "zero=1", "zero=2", "zero=3", "zero=3 recompute=full", "zero=3 tp=4", "zero=3 cp=2 tp=2"),
    *("zero=3 cp=4 cp_exchange=ring", "zero=1 offload=optimizer", "zero=2 micro_batch=2"),
)
SCHEDULERS = ("slurm", "kubernetes", "skypilot")


def cases() -> Iterator[Case]:
    """Every plan of the grid."""
    yield from (Case("megatron", fixed) for fixed in MEGATRON)
    yield from (Case("megatron", fixed, "mixtral-8x7b-v0.1") for fixed in EXPERTS)
    yield Case("megatron", "tp=2 sequence_parallel=true pp=4 zero=1 ep=8 etp=1", "qwen3-30b-a3b")
    yield Case("megatron", "pp=4 zero=1", sizes=UNEVEN, recipe="first:3")
    yield Case("megatron", "pp=4 zero=1", sizes=UNEVEN, optimizer=Optimizer.ADAMW, precision=Precision.FP8)
    yield Case("megatron", "zero=0", optimizer=Optimizer.SGD, precision=Precision.FP16)
    yield Case("megatron", "zero=1 tp=2", precision=Precision.FP32)
    yield Case("megatron", "zero=0 tp=2", "gpt-3-xl-1.3b")
    yield from (Case("deepspeed", fixed) for fixed in DEEPSPEED)
    yield Case("deepspeed", "ep=8 zero=1", "mixtral-8x7b-v0.1")
    yield Case("deepspeed", "zero=2", lora=True)
    yield Case("deepspeed", "zero=0", optimizer=Optimizer.SGD, precision=Precision.FP16)
    yield Case("deepspeed", "zero=1", optimizer=Optimizer.MUON)
    yield from (Case("torchtitan", fixed) for fixed in TORCHTITAN)
    yield from (
        Case("torchtitan", f"zero=3 {fixed}", "qwen3-30b-a3b") for fixed in ("ep=8", "ep=4 tp=2 etp=1")
    )
    yield Case("torchtitan", "zero=3", "qwen3-8b")
    yield Case("torchtitan", "zero=2 pp=4", sizes=UNEVEN, recipe="every:3")
    yield Case("torchtitan", "zero=3", precision=Precision.FP8)
    yield from (Case("accelerate", fixed) for fixed in ACCELERATE)
    yield Case("accelerate", "zero=3", lora=True)
    yield from (Case(to, "zero=3", replicas=4) for to in ("deepspeed", "torchtitan", "accelerate"))
    yield from (Case("megatron", fixed, replicas=4) for fixed in ("zero=1", "zero=3", "zero=1 tp=2"))
    yield Case("megatron", "ep=32 pp=4 zero=1 recompute=full", LATENT, LARGE)
    yield Case("torchtitan", "ep=32 zero=3 recompute=full", LATENT, LARGE)
    for scheduler in SCHEDULERS:
        yield Case(scheduler, "zero=3 recompute=full")
        yield Case(scheduler, "zero=3 micro_batch=2", cluster="4*aws/p5.48xlarge")


class Unexported(NamedTuple):
    """A case that its target refuses, with the rules."""

    case: Case
    rules: tuple[str, ...]


def plan_of(case: Case) -> Plan | Unexported:
    """The plan of a case, or the rules that it breaks."""
    model, cluster = load_model(case.model), parse_cluster(case.cluster)
    engine = Engine(case.to) if case.to in list(Engine) else None
    workload = Workload(
        seq=min(4096, model.learned_positions or 4096),
        batch=256,
        tokens=10**9,
        precision=case.precision,
        optimizer=case.optimizer,
        method=Method.LORA if case.lora else Method.PRETRAIN,
        adapters=Adapters(rank=16, modules=AdapterModules.ALL) if case.lora else None,
    )
    problem = PlanningProblem(
        model=model,
        workload=workload,
        cluster=cluster,
        profile=None,
        memory_limit_bytes=cluster.groups[0].device.usable_memory_bytes,
        limits=Limits(engine=engine),
    )
    if engine is not None:
        problem = dataclasses.replace(problem, engine_settings=settings_for_engine(engine, None, cluster))
    strategy = _strategy(case, problem)
    plan = make_plan(problem, CostModel(problem).evaluate(strategy), None, {}, ())
    plan = dataclasses.replace(plan, engine=engine)
    rules = tuple(rejected.rule for rejected in refusals(plan, case.to))
    return Unexported(case, rules) if rules else plan


def _strategy(case: Case, problem: PlanningProblem) -> Strategy:
    strategy = strategy_of(problem, parse_fixed_choices(tuple(case.fixed.split())))
    if case.replicas > 1:
        degrees = strategy.degrees
        shard = degrees.dp_shard // case.replicas
        degrees = dataclasses.replace(degrees, dp_replicate=case.replicas, dp_shard=shard)
        strategy = dataclasses.replace(strategy, degrees=degrees)
    if not case.sizes:
        return strategy
    kind, _, number = case.recipe.partition(":")
    stages = sized_stages(case.sizes)
    if kind == "first":
        stages = first_of_each(case.sizes, int(number))
    if kind == "every":
        stages = every_kth(strategy.degrees, case.sizes, int(number))
    return dataclasses.replace(strategy, stages=stages)
