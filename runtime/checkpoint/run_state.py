"""The identity of a run, and where it stands: read from its folder without torch and without changing it.

Flat facts identify a checkpoint's run: those that must not change when it goes on, and the plan that made
it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.foundation.decode import digest, encode, load_json, load_json_object
from planner.foundation.errors import InputError, Problem
from planner.foundation.run_files import CHECKPOINTS, LOCK, OPTIONS
from planner.strategy.plan import Plan
from runtime.checkpoint.store import COMMIT, Commit, Value, find_checkpoint, load_index


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


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """A whole checkpoint: its step, the ranks that wrote it, its size, and the plan by which it was made."""

    path: Path
    step: int
    world: int
    bytes: int
    plan_label: str
    by_this_plan: bool
    facts: dict[str, Value]


@dataclass(frozen=True, slots=True)
class RunState:
    """The newest whole checkpoint, where there is one, and why newer ones were passed over.

    `options` is what the latest launch was told beside its plan; None where it was not written down. `going`
    says that a process holds the folder now.
    """

    checkpoint: CheckpointState | None
    refused: tuple[str, ...]
    options: dict[str, Any] | None
    going: bool

    @property
    def step(self) -> int:
        """The step that the run goes on from."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def read_run_state(run_dir: Path, plan: Plan) -> RunState:
    """Where the run of `plan` stands. Every file of the newest checkpoint is read to verify it.

    Raises InputError where the checkpoint is of another model or workload than the plan.
    """
    found = find_checkpoint(run_dir / CHECKPOINTS)
    options = run_dir / OPTIONS
    return RunState(
        checkpoint=None if found.path is None else _checkpoint(found.path, plan),
        refused=found.refused,
        options=load_json_object(options) if options.exists() else None,
        going=_held(run_dir / LOCK),
    )


def _checkpoint(path: Path, plan: Plan) -> CheckpointState:
    index = load_index(path)
    check_same_run(path, index.run, plan)
    commit, now = load_json(path / COMMIT, Commit), plan_facts(plan)
    return CheckpointState(
        path=path,
        step=index.step,
        world=index.world,
        bytes=sum(file.bytes for file in commit.files.values()),
        plan_label=str(index.run.get("plan.label", "unknown")),
        by_this_plan=index.run.get("plan.digest") == now["plan.digest"],
        facts=index.run,
    )


def _held(lock: Path) -> bool:
    """Whether a running process holds the lock of a run folder."""
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False
