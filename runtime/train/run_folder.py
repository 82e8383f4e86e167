"""Keeps the plan of a run in its folder, and those of earlier launches beside it."""

from __future__ import annotations

from pathlib import Path

from planner.foundation.run_files import EARLIER, PLAN, SUMMARY, TIMELINE
from planner.strategy.plan import Plan, load_plan, save_plan
from runtime.checkpoint.store import step_folder


def keep_plan(plan: Plan, run_dir: Path, step: int) -> None:
    """Makes `plan` the run's from `step` on. What is there of another plan goes to EARLIER.

    A plan that led to no step that counts, since it left no checkpoint of its own, is not kept.
    """
    path = run_dir / PLAN
    if path.exists():
        if load_plan(path) == plan:
            return
        _set_aside(run_dir, step_folder(run_dir / EARLIER, step), led_nowhere=step == 0)
    save_plan(plan, path)


def _set_aside(run_dir: Path, earlier: Path, *, led_nowhere: bool) -> None:
    """Moves what is about the plan before; its plan.json last, which says that the folder is whole."""
    dropped = led_nowhere or (earlier / PLAN).exists()
    if not dropped:
        earlier.mkdir(parents=True, exist_ok=True)
    for name in (SUMMARY, TIMELINE, PLAN):
        if dropped:
            (run_dir / name).unlink(missing_ok=True)
        elif (run_dir / name).exists():
            (run_dir / name).replace(earlier / name)
