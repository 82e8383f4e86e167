"""Plans of tiny models over every axis at once, chosen so that every pair of choices meets in one of them.

A choice is a value of one axis: a degree, a schedule, an exchange, what is recomputed. Candidates are drawn
from all combinations of choices that fit `MOST_RANKS` ranks; those that break a rule of the planner or of
its native engine are left out. Of the rest, a greedy cover is taken: each plan in turn meets the most pairs
of choices that none before it met, until none is left.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.job.engine_settings import Engine
from planner.job.problem import Limits, PlanningProblem
from planner.model.attention import CpExchange
from planner.model.spec import ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Optimizer, Precision, Workload
from planner.strategy.plan import Plan
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, RecomputeCounts, Schedule, Stage, Strategy, Zero, even_stages
from tests.plans import local_cluster, make_plan, tiny_deepseek_experts, tiny_gpt2, tiny_llama, tiny_mla
from tests.runtime.ranks import Trajectory, by_adamw, by_sgd, make_executor, on_ranks, single_process, train

TOLERANCE = 1e-5
"""Relative. What is left is the order of sums in fp32: differences are 1e-7 to 2e-6."""
SGD_TOLERANCE = 1e-6
"""The same under SGD, whose update is linear in the gradient: no error of one is magnified by a division."""
BY_OPTIMIZER = {Optimizer.ADAMW: by_adamw, Optimizer.SGD: by_sgd}
MOST_RANKS = 8
BATCH, SEQ, LAYERS = 8, 16, 4
DRAWS = 150_000
"""Combinations drawn for each model, of which about one in a hundred is legal."""

MODELS: Mapping[str, Callable[[int], ModelSpec]] = {
    "llama": lambda layers: tiny_llama(layers=layers, kv_heads=2),
    "gpt2": lambda layers: tiny_gpt2(layers=layers, vocab=66),
    "mla": lambda layers: tiny_mla(layers=layers),
    "experts": lambda layers: tiny_deepseek_experts(layers=layers),
}
"""Over four ranks llama's key-value heads are copied, and gpt2's vocabulary is in unequal parts."""

CHOICES: Mapping[str, Sequence[Any]] = {
    "tp": (1, 2, 4),
    "sequence_parallel": (False, True),
    "pipeline": (
        (1, 1, Schedule.ONE_F_ONE_B),
        *((pp, 2 if s.least_chunks == 2 else 1, s) for pp in (2, 4) for s in Schedule),
    ),
    "dp_replicate": (1, 2),
    "dp_shard": (1, 2, 4),
    "zero": tuple(Zero),
    "cp": ((1, CpExchange.RING), *((cp, exchange) for cp in (2, 4) for exchange in CpExchange)),
    "experts": ((1, None), (2, None), (2, 1), (4, None), (4, 1)),
    "micro_batch": (1, 2),
    "recompute": (*Recompute, "mixed"),
    "cut": ("even", "uneven"),
}


@dataclass(frozen=True)
class Case:
    """A plan and the choices that it is made of."""

    model: str
    choices: tuple[Any, ...]
    plan: Plan

    @property
    def name(self) -> str:
        """The model, the degrees, and what its stages do."""
        parts = dict(zip(CHOICES, self.choices, strict=True))
        stages = f"{parts['recompute']} {parts['cut']}"
        return f"{self.model} {self.plan.strategy.degrees.label()} {stages}"

    def pairs(self) -> set[tuple[Any, ...]]:
        """Every two choices that meet in this plan, the model being one."""
        named = [("model", self.model), *zip(CHOICES, self.choices, strict=True)]
        return set(itertools.combinations(named, 2))


def matrix(models: Sequence[str] = tuple(MODELS), *, seed: int = 0) -> list[Case]:
    """The plans, most telling first: together they meet every pair of choices that the candidates have."""
    candidates = [case for model in models for case in _candidates(model, random.Random(f"{seed}{model}"))]
    return list(_cover(candidates))


def _candidates(model: str, draw: random.Random) -> Iterator[Case]:
    seen = set()
    for _ in range(DRAWS):
        choices = tuple(draw.choice(values) for values in CHOICES.values())
        if choices not in seen:
            seen.add(choices)
            plan = _plan(model, dict(zip(CHOICES, choices, strict=True)))
            if plan is not None:
                yield Case(model, choices, plan)


def _plan(model: str, chosen: Mapping[str, Any]) -> Plan | None:
    """The plan of these choices, or None where they break a rule or name the same plan twice."""
    pp, chunks, schedule = chosen["pipeline"]
    cp, exchange = chosen["cp"]
    ep, etp = chosen["experts"]
    tp, dp_shard, dp = chosen["tp"], chosen["dp_shard"], chosen["dp_replicate"] * chosen["dp_shard"]
    per_micro_batch = chosen["micro_batch"] * dp
    if tp * pp * dp * cp > MOST_RANKS or BATCH % per_micro_batch:
        return None
    if (pp == 1 and chosen["cut"] != "even") or etp == tp:
        return None
    degrees = Degrees(
        tp=tp,
        pp=pp,
        chunks=chunks,
        schedule=schedule,
        dp_replicate=chosen["dp_replicate"],
        dp_shard=dp_shard,
        cp=cp,
        ep=ep,
        etp=etp,
        zero=chosen["zero"],
        micro_batch=chosen["micro_batch"],
        num_micro_batches=BATCH // per_micro_batch,
        sequence_parallel=chosen["sequence_parallel"],
        cp_exchange=exchange,
    )
    spec = MODELS[model](max(LAYERS, degrees.stages + (chosen["cut"] == "uneven")))
    stages = _stages(spec.layers, degrees.stages, chosen["cut"], chosen["recompute"])
    if stages is None or broken_rules(_problem(spec, degrees), Strategy(degrees=degrees, stages=stages)):
        return None
    return make_plan(spec, degrees, stages, seq=SEQ)


def _problem(spec: ModelSpec, degrees: Degrees) -> PlanningProblem:
    return PlanningProblem(
        model=spec,
        workload=Workload(seq=SEQ, batch=BATCH, precision=Precision.FP32),
        cluster=local_cluster(degrees.world),
        profile=None,
        memory_limit_bytes=2**32,
        limits=Limits(engine=Engine.NATIVE),
    )


def _stages(layers: int, stages: int, cut: str, recompute: Recompute | str) -> tuple[Stage, ...] | None:
    """Even stages, or ones where the last gives its first block to the one before."""
    made = list(even_stages(layers, stages))
    if cut == "uneven":
        if made[-1].layers == 1 and made[0].layers == 1:
            return None
        first, giver = made[0], next(i for i, s in reversed(list(enumerate(made))) if s.layers > 1)
        sizes = [stage.layers for stage in made]
        sizes[giver] -= 1
        sizes[-1 if giver == 0 else 0] += 1
        assert first.first == 0 and sum(sizes) == layers
        bounds = [0, *itertools.accumulate(sizes)]
        made = [replace(made[0], first=a, end=b) for a, b in itertools.pairwise(bounds)]
    return tuple(replace(stage, recompute=_counts(stage.layers, recompute)) for stage in made)


def _counts(layers: int, recompute: Recompute | str) -> RecomputeCounts:
    if recompute == "mixed":
        full = layers // 3
        selective = (layers - full) // 2
        return RecomputeCounts(none=layers - full - selective, selective=selective, full=full)
    return RecomputeCounts(**{"none": 0, str(recompute): layers})


def _cover(candidates: Sequence[Case]) -> Iterator[Case]:
    """Greedy: the case that meets most pairs not yet met, until all are met."""
    pairs = [case.pairs() for case in candidates]
    unmet: set[tuple[Any, ...]] = set().union(*pairs)
    while unmet:
        best = max(range(len(pairs)), key=lambda place: len(pairs[place] & unmet))
        unmet -= pairs[best]
        yield candidates[best]


@dataclass(frozen=True)
class Outcome:
    """How far a plan's ranks were from one process, and what of the plan they did not execute."""

    difference: float
    not_as_planned: tuple[str, ...]


def execute(plan: Plan, steps: int = 5, *, documents: bool = False) -> Outcome:
    """Trains by a plan on real ranks, with `documents` within those of packed sequences. `difference` is
    relative, the largest of all losses and norms."""
    expected = [value for pair in _reference(plan, steps, documents) for value in pair]

    def body(rank: int) -> dict[str, Any]:
        executor = make_executor(plan)
        trajectory = train(executor, 0, steps, documents=documents)
        return {"seen": trajectory, "faults": executor.executed().differences(plan)}

    answers = on_ranks(body, plan.strategy.degrees.world)
    seen = [[value for pair in answer["seen"] for value in pair] for answer in answers]
    return Outcome(
        difference=max(
            abs(mine - right) / abs(right)
            for values in seen
            for mine, right in zip(values, expected, strict=True)
        ),
        not_as_planned=tuple(dict.fromkeys(fault for answer in answers for fault in answer["faults"])),
    )


def under_sgd(plan: Plan) -> Plan:
    """The same plan with SGD for its optimizer."""
    return replace(plan, workload=replace(plan.workload, optimizer=Optimizer.SGD))


_references: dict[tuple[ModelSpec, Workload, int, bool], Trajectory] = {}


def _reference(plan: Plan, steps: int, documents: bool) -> Trajectory:
    """The trajectory in one process, which depends on the model and the workload alone."""
    key = plan.model, plan.workload, steps, documents
    if key not in _references:
        _references[key] = single_process(
            plan, steps, BY_OPTIMIZER[plan.workload.optimizer], documents=documents
        )
    return _references[key]
