"""The answer of `plan replan`: the run's plan beside the new one, what is left, and how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datetime

    from planner.advice.plan_diff import PlanDiff
    from planner.advice.replanning import Left
    from planner.commands.running.replan_run import RunToGoOn
    from planner.commands.shared.problem import Asked
    from planner.strategy.plan import Plan

UNSAID_FILE, UNSAID_STEPS = "NEW.json", "N"
"""What stands in the command for a file that was not written, and for steps that nobody named."""


@dataclass(frozen=True)
class Replanned:
    """A run, its new plan, and what follows from both. `clock`: whether the time of day may be told."""

    run: RunToGoOn
    plan: Plan
    asked: Asked
    remarks: tuple[str, ...]
    output: Path | None
    clock: bool

    @cached_property
    def diff(self) -> PlanDiff:
        """The run's plan against the new one."""
        from planner.advice.plan_diff import plan_diff

        return plan_diff(self.run.plan, self.plan, ("old", "new"))

    def left(self, plan: Plan, pace: float = 1.0) -> Left | None:
        """What is left of the run by a plan; None where its steps are not known."""
        from planner.advice.replanning import left_of

        steps = self.run.steps_left
        return None if steps is None else left_of(plan, steps, pace)

    @property
    def ends_at(self) -> datetime.datetime | None:
        """When the run ends where it goes on now, by the clock of this machine, as predicted."""
        import datetime

        left = self.left(self.plan)
        if not self.clock or left is None or left.seconds is None:
            return None
        try:
            return datetime.datetime.now().astimezone() + datetime.timedelta(seconds=left.seconds)
        except OverflowError:  # beyond the year 9999
            return None

    @cached_property
    def read_bytes(self) -> tuple[int, ...]:
        """What a device of each pipeline rank reads of the checkpoint; nothing where there is none."""
        import dataclasses

        from planner.advice.replanning import read_bytes_by_stage_rank

        if self.run.state.checkpoint is None:
            return ()
        problem = dataclasses.replace(self.asked.problem, cluster=self.plan.cluster)
        return read_bytes_by_stage_rank(problem, self.plan.strategy)

    @property
    def pace(self) -> float | None:
        """The run's measured step time over the predicted one, where that says something of the new plan:
        on devices of the same kinds."""
        kinds = [{group.device.name for group in p.cluster.groups} for p in (self.run.plan, self.plan)]
        return self.run.pace if kinds[0] == kinds[1] else None

    def misses(self) -> Iterator[str]:
        """What of the goal the new plan keeps as predicted, and not at the run's own pace."""
        from planner.foundation.units import DAY_S, format_seconds, format_usd

        objective, left = self.plan.objective, None if self.pace is None else self.left(self.plan, self.pace)
        if objective is None or left is None:
            return
        deadline_s = None if objective.deadline_days is None else objective.deadline_days * DAY_S
        if deadline_s is not None and left.seconds is not None and left.seconds > deadline_s:
            late = f"{format_seconds(left.seconds)} of {format_seconds(deadline_s)} that are left"
            yield f"at the run's own pace the deadline is missed: {late}"
        budget, usd = objective.budget_usd, left.cost_usd
        if budget is not None and usd is not None and usd > budget:
            dear = f"{format_usd(usd)} of {format_usd(budget)} that are left"
            yield f"at the run's own pace the budget is exceeded: {dear}"

    @property
    def folder(self) -> Path:
        """Where the run goes on: in its folder, but not where that holds damaged checkpoints alone."""
        run = self.run
        if run.state.checkpoint is None and run.state.refused:
            return run.folder.with_name(f"{run.folder.name}-anew")
        return run.folder

    @property
    def words(self) -> list[str]:
        """The command that goes on."""
        from planner.commands.running.train_again import resume_words

        steps = UNSAID_STEPS if self.run.steps is None else str(self.run.steps)
        plan_file = UNSAID_FILE if self.output is None else str(self.output)
        told, resume = self.run.told, self.run.state.checkpoint is not None
        return resume_words(self.plan, plan_file, self.folder, steps, told, resume=resume)
