"""Where a run stands, read from its folder without torch and without changing anything there."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.foundation.decode import load_json, load_json_object
from planner.foundation.run_files import CHECKPOINTS, LOCK, OPTIONS
from planner.strategy.plan import Plan
from runtime.checkpoint.identity import check_same_run, plan_facts
from runtime.checkpoint.store import COMMIT, Commit, Value, find_checkpoint, load_index


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
