"""Who follows a run while it goes: people on stderr, and experiment trackers. Told by messages of rank 0.

Progress of a run for people, on stderr: one live line on a terminal, plain lines elsewhere.

Experiment trackers that show a run beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

Each is imported only where `--log` names it, after the ranks were forked. What a tracker cannot take ends
the tracker and not the run: metrics.jsonl has every figure in any case.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from planner.foundation.decode import decode, encode, write_atomic
from planner.foundation.errors import InputError, Problem, require_package
from planner.foundation.units import format_bytes, format_count, format_seconds
from planner.strategy.plan import Plan
from runtime.train.metrics import StepCauses, StepMetrics, TrainSummary
from runtime.train.options import TrainOptions

PLAIN_INTERVAL_S = 2.0
"""Off a terminal, a line at most this often (and always the first and last step)."""
BAR_COLUMNS = 24
"""What the bar, the time that remains and the gaps take of a terminal's line."""


def describe(line: StepMetrics, steps: int, width: int | None = None) -> str:
    """One step in words, the most wanted first: `step 12/60  loss 3.214  ...`; what `width` has room for."""
    parts = [
        f"step {line.step}/{steps}",
        f"loss {line.loss:.4f}",
        _beside_prediction(line),
        f"{format_count(line.tokens_per_s)} tok/s",
        "MFU unknown" if line.mfu is None else f"MFU {line.mfu:.1%}",
        f"peak {format_bytes(max(line.peak_memory_bytes, default=0))}",
        *([] if line.cost_usd is None else [_dollars(line.cost_usd, line.expected_cost_usd)]),
        *([] if width is not None or not line.left_s else [f"{format_seconds(line.left_s)} left"]),
        f"grad {line.grad_norm:.3g}",
        f"lr {line.lr:.2e}",
    ]
    while width is not None and len(parts) > 1 and len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)


def _beside_prediction(line: StepMetrics) -> str:
    """The step time, and what was predicted where something was."""
    predicted = (
        f" ({format_seconds(line.predicted_step_time_s)} predicted)" if line.predicted_step_time_s else ""
    )
    return format_seconds(line.step_time_s) + predicted


def _dollars(so_far: float, expected: float | None) -> str:
    """Dollars so far, and those that the whole run will have cost."""
    return f"${so_far:,.2f}" + ("" if expected is None else f" of ${expected:,.2f}")


class Progress:
    """Shows the steps of a run as they come; silent where `shown` is false."""

    def __init__(self, first_step: int, steps: int, *, shown: bool = True) -> None:
        self._steps, self._shown, self._said_s = steps, shown, 0.0
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            self._bar, self._task = _bar(first_step, steps)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, line: StepMetrics) -> None:
        """Shows one step."""
        if not self._shown:
            return
        if self._bar is not None:
            room = self._bar.console.width - BAR_COLUMNS
            self._bar.update(self._task, completed=line.step, text=describe(line, self._steps, room))
            return
        now_s = time.monotonic()
        if now_s - self._said_s >= PLAIN_INTERVAL_S or line.step in (1, self._steps):
            self._said_s = now_s
            print(describe(line, self._steps), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A remark between the steps."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _bar(first_step: int, steps: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        BarColumn(bar_width=12),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    return bar, bar.add_task("training", total=steps, completed=first_step, text="starting ...")


PROJECT = "shardwise"
RUNS = "trackers.json"
"""Which run of which tracker a run folder belongs to, so that a resumed run goes on there."""


class Tracker(Protocol):
    """One place where figures of a run are shown."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of one step."""

    def close(self, status: str) -> None:
        """Ends the run there: `finished`, `stopped`, `diverged` or `failed`."""


def figures_of(line: StepMetrics) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl that are known, causes of time one by one."""
    values = encode(line)
    values.update({f"causes/{name}": value for name, value in (values.pop("causes") or {}).items()})
    values["peak_memory_bytes"] = max(line.peak_memory_bytes, default=None)
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
    }


def settings_of(plan: Plan) -> dict[str, Any]:
    """What tells runs apart, as flat values."""
    degrees = encode(plan.strategy.degrees)
    return {
        "plan": plan.strategy.degrees.label(),
        "model": plan.model.name,
        "seq": plan.workload.seq,
        "batch": plan.workload.batch,
        "precision": str(plan.workload.precision),
        "optimizer": str(plan.workload.optimizer),
        "predicted_step_time_s": plan.estimate.step_time_s,
        "predicted_peak_memory_bytes": plan.estimate.peak_memory_bytes,
        **{
            f"degrees/{name}": value for name, value in degrees.items() if not isinstance(value, (list, dict))
        },
    }


class TensorBoard:
    """Event files in RUN_DIR/tensorboard. A resumed run purges the steps that come again."""

    def __init__(self, run_dir: Path, first_step: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        make: Any = SummaryWriter
        self.writer = make(log_dir=str(run_dir / "tensorboard"), purge_step=first_step)
        self.writer.add_text("settings", json.dumps(settings, indent=1), first_step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases in RUN_DIR/wandb. WANDB_MODE, WANDB_PROJECT and the like are honoured."""

    def __init__(self, run_dir: Path, first_step: int, settings: Mapping[str, Any]) -> None:
        import wandb

        known = _known_runs(run_dir).get("wandb")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=known,
            resume="allow" if known else None,
            dir=str(run_dir),
            config=dict(settings),
            settings=wandb.Settings(silent=True),
        )
        _know_run(run_dir, "wandb", str(self.run.id))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def close(self, status: str) -> None:
        self.run.summary["status"] = status
        self.run.finish(exit_code=0 if status in ("finished", "stopped") else 1)


class Mlflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI, else in files below RUN_DIR/mlruns."""

    def __init__(self, run_dir: Path, first_step: int, settings: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI", (run_dir / "mlruns").resolve().as_uri())
        if uri.startswith("file:"):
            # Newer versions refuse to write plain files unless told that it is meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self.client = MlflowClient(tracking_uri=uri)
        self.run_id = _known_runs(run_dir).get("mlflow") or self._new_run(settings)
        _know_run(run_dir, "mlflow", self.run_id)

    def _new_run(self, settings: Mapping[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        identity = experiment.experiment_id if experiment else self.client.create_experiment(name)
        run_id = str(self.client.create_run(identity).info.run_id)
        for key, value in settings.items():
            self.client.log_param(run_id, key, value)
        return run_id

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.client.log_metric(self.run_id, name, value, step=step)

    def close(self, status: str) -> None:
        ends = {"finished": "FINISHED", "stopped": "KILLED"}
        self.client.set_terminated(self.run_id, ends.get(status, "FAILED"))


TRACKERS: Mapping[str, tuple[Callable[[Path, int, Mapping[str, Any]], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (Wandb, "wandb"),
    "mlflow": (Mlflow, "mlflow"),
}
"""Name in `--log`: the tracker, and the package that it needs."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises InputError where a tracker is unknown, not installed, or would ask for a login."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(Problem(where="--log", fault=f"{name} is unknown.", legal=", ".join(TRACKERS)))
        require_package(TRACKERS[name][1], name, f"--log {name}")
    if "wandb" in names and not _wandb_can_start():
        raise InputError(
            Problem(
                where="--log wandb",
                fault="no API key is known, so nothing can be uploaded.",
                fix="run `wandb login`, set WANDB_API_KEY, or keep the run here: WANDB_MODE=offline",
            )
        )


def _wandb_can_start() -> bool:
    """Whether wandb would start without asking: it is offline, or has a key in its environment or netrc."""
    import netrc

    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _known_runs(run_dir: Path) -> dict[str, str]:
    try:
        known = json.loads((run_dir / RUNS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in known.items()} if isinstance(known, dict) else {}


def _know_run(run_dir: Path, tracker: str, run_id: str) -> None:
    write_atomic(run_dir / RUNS, json.dumps({**_known_runs(run_dir), tracker: run_id}) + "\n")


class Trackers:
    """The trackers of a run; they begin with its first step, and one that fails is left out from then on."""

    def __init__(self, names: Sequence[str], plan: Plan, run_dir: Path, say: Callable[[str], None]) -> None:
        self._names, self._plan, self._run_dir, self._say = names, plan, run_dir, say
        self._open: dict[str, Tracker] | None = None

    def step(self, line: StepMetrics) -> None:
        """Hands one step to all."""
        if self._open is None:
            self._open = {}
            for name in self._names:
                with self._guard(name):
                    make = TRACKERS[name][0]
                    self._open[name] = make(self._run_dir, line.step, settings_of(self._plan))
        for name, tracker in list(self._open.items()):
            with self._guard(name):
                tracker.log(line.step, figures_of(line))

    def close(self, status: str) -> None:
        """Ends all of them."""
        for name, tracker in list((self._open or {}).items()):
            with self._guard(name):
                tracker.close(status)

    @contextlib.contextmanager
    def _guard(self, name: str) -> Any:
        """A tracker's chatter is dropped; its failure is said once, and ends it."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        except Exception as error:  # whatever a foreign package raises
            text = " ".join(str(error).split())[:300]
            self._say(f"--log {name} ended: {type(error).__name__}: {text}; metrics.jsonl goes on")
            assert self._open is not None
            self._open.pop(name, None)


class Audience:
    """Takes the messages of a run and hands them on; at its end it has the summary."""

    def __init__(self, plan: Plan, options: TrainOptions, *, shown: bool) -> None:
        self._progress = Progress(0, options.steps, shown=shown)
        self._trackers = Trackers(options.log, plan, Path(options.run_dir), self._progress.say)
        self._summary: TrainSummary | None = None

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trackers.close("failed" if self._summary is None else self._summary.status)
        self._progress.__exit__(kind, error, trace)

    def receive(self, message: Mapping[str, Any]) -> None:
        """One message: a step, a remark, or the summary."""
        if "step" in message:
            line = decode_step(message["step"])
            self._progress.step(line)
            self._trackers.step(line)
        elif "say" in message:
            self._progress.say(message["say"])
        elif "summary" in message:
            self._summary = decode(TrainSummary, message["summary"], source="summary")

    def summary(self) -> TrainSummary:
        """The summary, which a run that ended well has sent."""
        assert self._summary is not None
        return self._summary


def decode_step(values: Mapping[str, Any]) -> StepMetrics:
    """A step that came through a pipe; its loss may be NaN there."""
    causes = values["causes"]
    return StepMetrics(
        **{
            **values,
            "peak_memory_bytes": tuple(values["peak_memory_bytes"]),
            "causes": None if causes is None else StepCauses(**causes),
        }
    )
