"""Whose run a checkpoint is, in flat facts: what must not change when it goes on, and which plan made it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.foundation.decode import digest, encode
from planner.foundation.errors import InputError, Problem
from planner.strategy.plan import Plan
from runtime.checkpoint.store import Value


def plan_identity(plan: Plan) -> dict[str, Value]:
    """The facts that a plan fixes: its model but for the name, its workload but for the tokens."""
    model = dataclasses.replace(plan.model, name="", sources=())
    workload = dataclasses.replace(plan.workload, tokens=None)
    return dict(_flat({"model": encode(model), "workload": encode(workload)}, ""))


def _flat(value: Any, prefix: str) -> list[tuple[str, Value]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}".strip("."))]
    if isinstance(value, (list, tuple)):
        return [pair for place, item in enumerate(value) for pair in _flat(item, f"{prefix}.{place}")]
    return [(prefix, str(value) if isinstance(value, str) else value)]


def check_identity(path: Path, saved: Mapping[str, Value], own: Mapping[str, Value]) -> None:
    """Raises InputError with every fact in which a checkpoint and this run differ, both values named."""
    names = [name for name in (*own, *(n for n in saved if n not in own)) if not name.startswith("plan.")]
    problems = [
        Problem(
            where=f"{path}: {name}",
            fault=f"is {saved.get(name, 'absent')!r} in the checkpoint, {own.get(name, 'absent')!r} now.",
            fix="resume with the model, workload, data and seed of the run, or start a new one",
        )
        for name in names
        if saved.get(name, "absent") != own.get(name, "absent")
    ]
    if problems:
        raise InputError(*problems)


def check_same_run(path: Path, saved: Mapping[str, Value], plan: Plan) -> None:
    """Raises InputError where a checkpoint is of another model or workload than a plan."""
    of_plan = {name: value for name, value in saved.items() if name.startswith(("model.", "workload."))}
    check_identity(path, of_plan, plan_identity(plan))


def plan_facts(plan: Plan) -> dict[str, Value]:
    """By which plan a checkpoint was made; a run may go on under another one."""
    return {"plan.label": plan.strategy.degrees.label(), "plan.digest": digest(plan.strategy)}
