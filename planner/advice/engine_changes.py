"""Single changes after which an engine no longer refuses a problem: precision, method, or another engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from planner.advice.what_if import Change, with_workload
from planner.calibration.engine_stack import engine_stack
from planner.job.engine_settings import Engine
from planner.job.problem import PlanningProblem
from planner.model.workload import Method, Optimizer, Precision
from planner.strategy.engines.engine_rules import problem_refused


def accepted(problem: PlanningProblem) -> Iterator[Change]:
    """Changes that an engine's rules of problems accept; none where they refuse nothing."""
    if not problem_refused(problem):
        return
    changes = (*_workloads(problem), *_engines(problem))
    yield from (change for change in changes if not problem_refused(change.problem))


def _workloads(problem: PlanningProblem) -> Iterator[Change]:
    workload = problem.workload
    devices = [group.device for group in problem.cluster.groups]
    if workload.precision is not Precision.BF16 and all(d.peak_bf16_flops for d in devices):
        changed = with_workload(problem, precision=Precision.BF16)
        words = f"precision bf16 instead of {workload.precision}"
        yield Change(change=words, flag="--precision bf16", problem=changed)
    if workload.method is Method.LORA:
        changed = with_workload(problem, method=Method.FINETUNE, adapters=None)
        words = "train all weights instead of adapters"
        yield Change(change=words, flag="--method finetune", problem=changed)
    if workload.optimizer is not Optimizer.ADAMW:
        changed = with_workload(problem, optimizer=Optimizer.ADAMW)
        words = f"optimizer adamw instead of {workload.optimizer}"
        yield Change(change=words, flag="--optimizer adamw", problem=changed)


def _engines(problem: PlanningProblem) -> Iterator[Change]:
    """The other engines, each at its own prices."""
    limits = problem.limits
    for engine in Engine:
        if engine is not limits.engine:
            yield Change(
                change=f"{engine} instead of {limits.engine}",
                flag=f"--engine {engine}",
                problem=dataclasses.replace(
                    problem,
                    limits=dataclasses.replace(limits, engine=engine),
                    stack=engine_stack(engine, problem.profile, problem.cluster),
                ),
            )
