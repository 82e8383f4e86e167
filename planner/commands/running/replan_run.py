"""The run that `plan replan` is asked about: its plan, its newest whole checkpoint, what it has taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.calibration.run_history import Steady
    from planner.job.objective import Rest
    from planner.report.run_record import RunRecord
    from planner.strategy.plan import Plan
    from runtime.checkpoint.store import RunState


@dataclass(frozen=True, slots=True)
class RunToGoOn:
    """A run as it was found. `steps` are those of the whole run, None where nobody said; `told` is what its
    latest launch was told; `measured` is the step time by its plan, None where no step was timed."""

    folder: Path
    plan: Plan
    record: RunRecord | None
    state: RunState
    steps: int | None
    told: dict[str, Any]
    measured: Steady | None

    @property
    def logged_steps(self) -> int:
        """Steps that were done, those that no checkpoint holds among them."""
        return max(self.state.step, self.record.steps_done if self.record is not None else 0)

    @property
    def steps_left(self) -> int | None:
        return None if self.steps is None else self.steps - self.state.step

    @property
    def spent_s(self) -> float:
        """Seconds of all launches so far."""
        return (self.record.wall_s or 0.0) if self.record is not None else 0.0

    @property
    def spent_usd(self) -> float | None:
        return self.record.cost_usd if self.record is not None else None

    @property
    def pace(self) -> float | None:
        """The measured step time over the predicted one."""
        predicted_s = self.plan.estimate.step_time_s
        return self.measured.value / predicted_s if self.measured is not None and predicted_s > 0 else None

    def rest(self) -> Rest | None:
        """What is left of the run, for a goal; None where its steps are not known."""
        from planner.foundation.units import DAY_S
        from planner.job.objective import Rest

        if self.steps_left is None:
            return None
        tokens = self.steps_left * self.plan.workload.tokens_per_step
        return Rest(tokens=tokens, spent_days=self.spent_s / DAY_S, spent_usd=self.spent_usd)

    def remarks(self) -> Iterator[str]:
        """What a reader should hear of the run before its figures."""
        state, checkpoint = self.state, self.state.checkpoint
        if state.is_running:
            yield f"a process is training in {self.folder} now: end it first (SIGTERM saves and ends it)"
        yield from (f"passed over: {text}" for text in state.refused)
        if checkpoint is None:
            yield "there is no whole checkpoint: the run begins again at step 0"
        elif not checkpoint.by_this_plan:
            yield f"the checkpoint was made by an earlier plan, {checkpoint.plan_label}"
        if self.logged_steps > state.step:
            lost = f"step {state.step + 1}"
            if self.logged_steps > state.step + 1:
                lost = f"steps {state.step + 1} to {self.logged_steps}"
            yield f"{lost} came after the newest whole checkpoint, and will be done again"
        if self.record is not None:
            yield from self.record.notes
        if self.told.get("hf_config") is not None:
            yield (
                "the run trains Transformers' own modules, which have limits of their own: where `plan "
                "train` refuses the new plan, add --fix cp=1 --fix ep=1 --fix sequence_parallel=false"
            )
        if state.options is None:
            yield (
                "options.json, in which `plan train` notes what it is told, is not there: add --data, "
                "--tokenizer and what else the run was begun with to the command"
            )


def read_run(folder: Path, steps: int | None) -> RunToGoOn:
    """The run in a folder; `steps` are those of the whole run, where they are said anew.

    Every file of its newest checkpoint is read. Raises InputError where it is no run, its checkpoint is of
    another model, or nothing of it is left.
    """
    from planner.commands.running.train_again import told_at_launch
    from planner.foundation.errors import InputError, Problem
    from planner.foundation.run_files import CHECKPOINTS, OPTIONS
    from planner.report.run_record import load_report_input
    from runtime.checkpoint.store import read_run_state

    if not folder.is_dir():
        fault = "is a file." if folder.exists() else "no such folder."
        legal = "a folder that `plan train` wrote"
        raise InputError(Problem(where=f"RUN {folder}", fault=fault, legal=legal))
    found = load_report_input(folder)
    if found.run is None and not (folder / CHECKPOINTS).is_dir():
        fault = "holds a plan.json, but no checkpoints and no metrics.jsonl: nothing ran there."
        raise InputError(Problem(where=f"RUN {folder}", fault=fault, fix="plan anew with `plan solve`"))
    plan, state = found.plan, read_run_state(folder, found.plan)
    told = told_at_launch(state.options, folder / OPTIONS) if state.options is not None else {}
    if state.options is None and state.checkpoint is not None:
        told = {name: state.checkpoint.facts.get(name) for name in ("seed", "lora_alpha")}
    total = steps or _steps_told(plan, told)
    if total is not None and total <= state.step:
        fault = f"is {total}, and the newest whole checkpoint is at step {state.step}: nothing is left."
        legal = f"more than {state.step}: steps count from the beginning of training"
        raise InputError(Problem(where="--steps", fault=fault, legal=legal))
    return RunToGoOn(
        folder=folder,
        plan=plan,
        record=found.run,
        state=state,
        steps=total,
        told=told,
        measured=_measured(folder) if found.run is not None and found.run.timed_steps else None,
    )


def _steps_told(plan: Plan, told: dict[str, Any]) -> int | None:
    """The steps of the whole run: as its latest launch was told, else as its tokens say."""
    steps, tokens = told.get("steps"), plan.workload.tokens
    if isinstance(steps, int) and steps > 0:
        return steps
    return None if tokens is None else -(-tokens // plan.workload.tokens_per_step)


def _measured(folder: Path) -> Steady:
    """The run's step time as `plan calibrate --from-run` gives it."""
    from planner.calibration.run_history import Asked, convert
    from planner.calibration.run_log import read_log

    return convert(read_log(folder, None), Asked(columns={}, metrics={})).step_time
