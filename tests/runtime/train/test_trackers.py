"""What a run shows beside metrics.jsonl: trackers, causes of time, a profiler's trace, allocations."""

from __future__ import annotations

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.commands.running.train import _report
from planner.foundation.errors import InputError
from planner.strategy.estimate import TimeBreakdown
from planner.strategy.strategy import Degrees
from runtime.train.data.prepare import DataOptions
from runtime.train.listeners import Trackers, check_trackers, describe, figures_of
from runtime.train.metrics import StepCauses, StepMetrics, mean_causes, predicted_causes
from runtime.train.options import TrainOptions
from runtime.train.recorder import Probes, causes_of
from runtime.train.train import run_training
from tests.plans import make_plan, tiny_llama

PP2 = make_plan(tiny_llama(vocab=258), Degrees(pp=2, micro_batch=1, num_micro_batches=2))
ESTIMATE = dataclasses.replace(PP2.estimate, step_time_s=0.25, days=2.0, cost_usd=48.0)
PRICED = dataclasses.replace(PP2, estimate=ESTIMATE)
LINE = StepMetrics(
    step=2,
    loss=3.5,
    grad_norm=1.0,
    lr=0.1,
    step_time_s=0.5,
    tokens_per_s=64.0,
    mfu=None,
    peak_memory_bytes=(1000, 2000),
    timed=True,
    wall_s=3600.0,
    checkpoint_wait_s=0.0,
    predicted_step_time_s=0.25,
    left_s=90.0,
    cost_usd=1.0,
    causes=StepCauses(compute_s=0.2, wait_s=0.1, gradient_sums_s=0.1, optimizer_s=0.1),
)


def test_a_steps_time_is_divided_among_causes() -> None:
    spans = [("0F0", 0.0, 1.0), ("0B0", 2.0, 4.0), ("gradient sums", 4.5, 5.0), ("optimizer", 5.0, 5.25)]
    causes = causes_of(spans, 6.0)
    assert causes == StepCauses(compute_s=3.0, wait_s=2.25, gradient_sums_s=0.5, optimizer_s=0.25)
    assert causes.total_s == 6.0
    idle = StepCauses(compute_s=0.0, wait_s=6.0, gradient_sums_s=0.0, optimizer_s=0.0)
    assert mean_causes([causes, idle]).wait_s == 4.125
    parts = {field.name: 2.0**place for place, field in enumerate(dataclasses.fields(TimeBreakdown))}
    estimate = dataclasses.replace(ESTIMATE, breakdown=TimeBreakdown(**parts))
    predicted = predicted_causes(dataclasses.replace(PP2, estimate=estimate))
    assert predicted.total_s == sum(parts.values()), "every predicted cause is in one of the four"


def test_a_step_is_told_with_its_prediction_dollars_and_time_left() -> None:
    text = describe(LINE, 60)
    for part in ("500 ms (250 ms predicted)", "MFU unknown", "$1.00", "left"):
        assert part in text, text
    assert "$1.00 of $1.02" in describe(dataclasses.replace(LINE, expected_cost_usd=1.02), 60)
    known = describe(dataclasses.replace(LINE, mfu=0.412, cost_usd=None, left_s=0.0), 60)
    assert "MFU 41.2%" in known
    assert "$" not in known
    assert "left" not in known


@pytest.mark.parametrize(("steps", "profiled"), [(1, []), (3, [2]), (8, [3, 4, 5])])
def test_profiled_steps_are_those_after_the_warm_up_and_are_not_timed(
    steps: int, profiled: list[int]
) -> None:
    probes = Probes.over(steps, profile_steps=3, snapshot=True)
    assert list(probes.profile) == profiled
    assert not any(probes.timed(offset) for offset in probes.profile)
    assert probes.snapshot in probes.memory


def test_figures_are_numbers_by_name() -> None:
    figures = figures_of(LINE)
    assert figures["causes/wait_s"] == 0.1
    assert figures["peak_memory_bytes"] == 2000
    assert "mfu" not in figures, "what is unknown is not logged as a number"
    assert "step" not in figures
    assert all(isinstance(value, float) for value in figures.values())


# -------------------------------------------------------------------------------------------- trackers


def log_steps(name: str, run_dir: Path, *steps: int) -> list[str]:
    said: list[str] = []
    trackers = Trackers((name,), PRICED, run_dir, said.append)
    for step in steps:
        trackers.step(dataclasses.replace(LINE, step=step, loss=10.0 - step))
    trackers.close("finished")
    return said


START = """
import sys, json
from pathlib import Path
from tests.runtime.train.test_trackers import log_steps
folder = Path(sys.argv[1])
"""
TENSORBOARD = """
said = log_steps('tensorboard', folder, 1, 2, 3) + log_steps('tensorboard', folder, 3, 4)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(str(folder / 'tensorboard'))
events.Reload()
print(json.dumps([said, [(e.step, e.value) for e in events.Scalars('loss')]]))
"""
MLFLOW = """
said = log_steps('mlflow', folder, 1, 2) + log_steps('mlflow', folder, 3)
from mlflow.tracking import MlflowClient
client = MlflowClient((folder / 'mlruns').as_uri())
(run,) = client.search_runs([client.get_experiment_by_name('shardwise').experiment_id])
history = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, 'loss'))
print(json.dumps([said, run.info.status, run.data.params['plan'], history]))
"""
WANDB = """
said = log_steps('wandb', folder, 1, 2)
(kept,) = folder.glob('wandb/offline-run-*')
(records,) = kept.glob('*.wandb')
runs = json.loads((folder / 'trackers.json').read_text())
print(json.dumps([said, b'grad_norm' in records.read_bytes(), runs]))
"""


def run_apart(code: str, folder: Path, **environment: str) -> Any:
    """Runs code in a process of its own: the packages warn of things that are none of ours."""
    root = Path(__file__).parents[3]
    answer = subprocess.run(
        [sys.executable, "-c", START + code, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), **environment},
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def test_tensorboard_gets_every_step_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    said, losses = run_apart(TENSORBOARD, tmp_path)
    assert said == []
    assert losses == [[1, 9.0], [2, 8.0], [3, 7.0], [4, 6.0]]


def test_mlflow_gets_every_step_in_files_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    said, status, label, losses = run_apart(MLFLOW, tmp_path)
    assert (said, status, label) == ([], "FINISHED", PRICED.strategy.degrees.label())
    assert losses == [[1, 9.0], [2, 8.0], [3, 7.0]]


def test_wandb_keeps_an_offline_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    said, logged, runs = run_apart(WANDB, tmp_path, WANDB_MODE="offline")
    assert (said, logged) == ([], True)
    assert runs["wandb"]


class Broken:
    """A tracker that fails at its second step."""

    def __init__(self, *_: Any) -> None:
        self.steps: list[int] = []

    def log(self, step: int, figures: Any) -> None:
        self.steps.append(step)
        if len(self.steps) == 2:
            raise OSError("no route to host")

    def close(self, status: str) -> None:
        raise AssertionError("it was left out")


def test_a_tracker_that_fails_is_left_out_and_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("runtime.train.listeners.TRACKERS", {"broken": (Broken, "json")})
    assert log_steps("broken", tmp_path, 1, 2, 3) == [
        "--log broken ended: OSError: no route to host; metrics.jsonl goes on"
    ]


def test_trackers_that_cannot_start_are_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="neptune is unknown"):
        check_trackers(["neptune"])
    monkeypatch.setattr("runtime.train.listeners.TRACKERS", {"absent": (Broken, "no_such_package")})
    with pytest.raises(
        InputError, match=r"--log absent: needs the package no_such_package.*'shardwise\[absent\]'"
    ):
        check_trackers(["absent"])
    monkeypatch.setattr("runtime.train.listeners.TRACKERS", {"wandb": (Broken, "json")})
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(InputError, match="WANDB_MODE=offline"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])


# -------------------------------------------------------------------------------------- recorded steps


def test_a_run_writes_causes_traces_and_allocations(tmp_path: Path) -> None:
    options = TrainOptions(
        steps=6,
        run_dir=str(tmp_path),
        data=DataOptions(tokenizer="byte"),
        profile_steps=2,
        memory_snapshot=True,
    )
    summary = run_training(PRICED, options, shown=False)
    assert summary is not None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["timed"] for line in lines] == [False] * 5 + [True]
    assert [line["causes"] is None for line in lines] == [True, True, False, True, True, True]
    assert lines[2]["causes"]["compute_s"] > 0
    assert lines[0]["left_s"] == pytest.approx(5 * lines[0]["step_time_s"])
    assert lines[-1]["left_s"] == 0
    assert lines[-1]["cost_usd"] == pytest.approx(24.0 * lines[-1]["wall_s"] / 86_400)
    assert lines[-1]["expected_cost_usd"] == lines[-1]["cost_usd"]
    assert lines[0]["expected_cost_usd"] == pytest.approx((lines[0]["wall_s"] + lines[0]["left_s"]) / 3600)
    assert summary.cost_usd == summary.expected_cost_usd == pytest.approx(summary.wall_s / 3600)
    assert summary.predicted_cost_usd == pytest.approx(6 * 0.25 / 3600)
    told = _report(summary, str(tmp_path))
    assert "cost of 6 steps" in told and "unknown" not in told.split("cost", 1)[1].splitlines()[0]
    assert len(summary.causes_by_rank) == 2
    for rank, causes in enumerate(summary.causes_by_rank):
        assert summary.busy_s_by_rank[rank] + summary.wait_s_by_rank[rank] == pytest.approx(causes.total_s)
        trace = json.loads(gzip.decompress((tmp_path / f"profile/rank-{rank}.json.gz").read_bytes()))
        names = [event.get("name", "") for event in trace["traceEvents"]]
        assert names.count("Optimizer.step#AdamW.step") == 2, "two steps were traced"
        found = json.loads(gzip.decompress((tmp_path / f"memory/rank-{rank}.json.gz").read_bytes()))
        assert max(size for _, size in found["live_bytes"]) == found["peak_bytes"]
        assert found["peak_bytes"] == lines[-1]["peak_memory_bytes"][rank]
