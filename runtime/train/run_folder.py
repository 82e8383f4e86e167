"""The files of a run's folder that say what runs there, and those of the plans before.

plan.json                    the plan of the latest launch
options.json                 what that launch was told beside it
checkpoints/                 runtime.checkpoint.store
metrics.jsonl                every step, of all plans (runtime.train.metrics)
summary.json, timeline.json  of the latest launch
earlier/step-00000120/       plan.json, summary.json and timeline.json of the plan that ran up to step 120
"""

from __future__ import annotations

from pathlib import Path

from planner.report.earlier import EARLIER
from planner.strategy.plan import Plan, load_plan, save_plan
from runtime.checkpoint.store import step_folder

CHECKPOINTS, LOCK = "checkpoints", ".lock"
PLAN, OPTIONS, METRICS, SUMMARY, TIMELINE = (
    "plan.json",
    "options.json",
    "metrics.jsonl",
    "summary.json",
    "timeline.json",
)


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
