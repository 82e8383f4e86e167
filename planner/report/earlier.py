"""The plans that a run ran by before the one that it has now, in words. `plan train --resume` keeps them."""

from __future__ import annotations

import re
from pathlib import Path

from planner.foundation.errors import InputError
from planner.foundation.run_files import EARLIER
from planner.strategy.plan import load_plan

STEP = re.compile(r"step-(\d+)")


def earlier_plans(run_dir: Path) -> tuple[str, ...]:
    """A sentence for each earlier plan of a run folder, the first one first."""
    found = sorted(run_dir.glob(f"{EARLIER}/step-*/plan.json"))
    told, first = [], 1
    for path in found:
        match = STEP.fullmatch(path.parent.name)
        if match is None:
            continue
        last, name = int(match[1]), path.relative_to(run_dir)
        try:
            plan = load_plan(path)
        except InputError as error:
            told.append(f"The plan of the steps up to {last} cannot be read: {error.problems[0]}")
        else:
            label = plan.strategy.degrees.label()
            told.append(f"Steps {first} to {last} ran by {label} on {plan.cluster.name} ({name}).")
        first = last + 1
    return tuple(told)
