"""Training end to end on real ranks: files, exact resume, signals, and faults that end in seconds."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.commands.running.train import _report
from planner.foundation.errors import InputError
from planner.hardware.cluster import ClusterSpec
from planner.strategy.plan import Plan, load_plan, save_plan
from planner.strategy.strategy import Degrees, Zero
from runtime.checkpoint.store import committed_folders
from runtime.launch.local_ranks import RunFailedError
from runtime.train.data.documents import shipped_corpus
from runtime.train.data.prepare import DataOptions
from runtime.train.metrics import TrainSummary
from runtime.train.options import TrainOptions
from runtime.train.recorder import Probes
from runtime.train.session import check_world, pick_device
from runtime.train.train import run_training
from tests.plans import make_plan, tiny_llama
from tests.runtime.processes import alive, children, exit_code, forked, wait_for

MODEL = tiny_llama(vocab=258)
TP2 = make_plan(MODEL, Degrees(tp=2, micro_batch=2, num_micro_batches=2))
PP2 = make_plan(MODEL, Degrees(pp=2, micro_batch=1, num_micro_batches=4))
DP2 = make_plan(MODEL, Degrees(dp_shard=2, zero=Zero.PARAMETERS, micro_batch=1, num_micro_batches=2))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((shipped_corpus() / "pride_and_prejudice.txt").read_text()[:20_000])
    return str(file)


def _options(text: str, run_dir: Path, steps: int, **given: Any) -> TrainOptions:
    data = DataOptions(data=(text,), tokenizer="byte")
    defaults: dict[str, Any] = {"data": data, "lr": 1e-2, "warmup": 2}
    return TrainOptions(steps=steps, run_dir=str(run_dir), **{**defaults, **given})


def _train(plan: Plan, options: TrainOptions) -> TrainSummary:
    summary = run_training(plan, options, shown=False)
    assert summary is not None
    return summary


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _trajectory(run_dir: Path) -> list[tuple[int, float, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in _metrics(run_dir)]


@pytest.fixture(scope="module")
def straight(text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainSummary]:
    """Six steps of the pipeline plan in one go."""
    run_dir = tmp_path_factory.mktemp("straight")
    return run_dir, _train(PP2, _options(text, run_dir, 6))


def test_a_run_writes_what_the_contract_lists(straight: tuple[Path, TrainSummary]) -> None:
    run_dir, summary = straight
    lines = _metrics(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["tokens_per_s"] == pytest.approx(PP2.workload.tokens_per_step / line["step_time_s"])
        assert line["mfu"] is None, "the peak of this CPU is unknown"
        assert len(line["peak_memory_bytes"]) == 2
        assert min(line["peak_memory_bytes"]) > 0
    assert [line["timed"] for line in lines] == [False] * 3 + [True] * 3
    written = json.loads((run_dir / "summary.json").read_text())
    assert written["measured_step_time_s"] == summary.measured_step_time_s
    assert written["predicted_step_time_s"] == PP2.estimate.step_time_s
    assert written["measured_peak_memory_bytes"] == max(lines[-1]["peak_memory_bytes"])
    assert (written["goodput"] > 0, written["cost_usd"], written["status"]) == (True, None, "finished")
    assert load_plan(run_dir / "plan.json") == PP2
    assert written["executed"]["compiled"] is False, "on a CPU"


def test_dollars_without_a_price_are_unknown_and_never_0(straight: tuple[Path, TrainSummary]) -> None:
    run_dir, summary = straight
    for line in _metrics(run_dir):
        assert line["cost_usd"] is None and line["expected_cost_usd"] is None
    written = json.loads((run_dir / "summary.json").read_text())
    for key in ("cost_usd", "predicted_cost_usd", "expected_cost_usd"):
        assert key in written and written[key] is None
    told = _report(summary, str(run_dir))
    assert re.search(r"cost +unknown: the plan's cluster has no price", told)
    assert "$" not in told


def test_the_executed_plan_is_read_back(straight: tuple[Path, TrainSummary]) -> None:
    _, summary = straight
    assert summary.executed_differences == ()
    assert summary.executed["strategy"]["degrees"]["pp"] == 2


def test_the_timeline_holds_every_action_of_every_rank(straight: tuple[Path, TrainSummary]) -> None:
    run_dir, summary = straight
    events = json.loads((run_dir / "timeline.json").read_text())
    for rank, row in enumerate(PP2.schedule_table):
        names = [event["name"] for event in events if event["rank"] == rank]
        assert names == [*row, "gradient sums", "optimizer"]
    starts = {event["name"]: event["start_s"] for event in events}
    ends = {event["name"]: event["start_s"] + event["duration_s"] for event in events}
    for mb in range(4):
        assert ends[f"0F{mb}"] <= starts[f"1F{mb}"], "ranks share one clock: stage 1 waits for stage 0"
        assert ends[f"1B{mb}"] <= starts[f"0B{mb}"]
    assert len(summary.busy_s_by_rank) == len(summary.wait_s_by_rank) == 2


def test_the_report_reads_the_run(straight: tuple[Path, TrainSummary]) -> None:
    from planner.report.run_record import load_report_input

    run = load_report_input(straight[0]).run
    assert run is not None
    assert len(run.steps) == 6
    assert run.summary is not None
    assert run.step_time_s == straight[1].measured_step_time_s


def test_a_resumed_run_goes_on_exactly(
    straight: tuple[Path, TrainSummary], text: str, tmp_path: Path
) -> None:
    _train(PP2, _options(text, tmp_path, 3))
    resumed = _train(PP2, _options(text, tmp_path, 6, resume=True, lr=None, warmup=None))
    assert (resumed.first_step, resumed.last_step) == (4, 6)
    assert _trajectory(tmp_path) == _trajectory(straight[0])


def test_a_run_goes_on_under_another_plan_of_the_same_model(
    straight: tuple[Path, TrainSummary], text: str, tmp_path: Path
) -> None:
    for steps, plan in ((2, TP2), (4, DP2), (6, PP2)):
        _train(plan, _options(text, tmp_path, steps, resume=steps > 2))
    for mine, theirs in zip(_trajectory(tmp_path), _trajectory(straight[0]), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_steps_after_the_checkpoint_are_dropped_from_the_metrics(text: str, tmp_path: Path) -> None:
    plan = make_plan(MODEL, Degrees(micro_batch=2))
    _train(plan, _options(text, tmp_path, 5, checkpoint_every=2))
    newest = committed_folders(tmp_path / "checkpoints")[0]
    whole = _trajectory(tmp_path)
    (newest / "index.json").write_text("damaged")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    _train(plan, _options(text, tmp_path, 5, resume=True))
    assert _trajectory(tmp_path) == whole, "resumed from step 4, since step 5 is damaged"


def test_a_step_that_lost_its_commit_is_set_aside_and_never_deleted(text: str, tmp_path: Path) -> None:
    plan = make_plan(MODEL, Degrees(micro_batch=2))
    _train(plan, _options(text, tmp_path, 2, sync_checkpoints=True))
    step = committed_folders(tmp_path / "checkpoints")[0]
    commit = (step / "COMMIT").read_text()
    (step / "COMMIT").unlink()
    files = sorted(path.name for path in step.iterdir())
    with pytest.raises(InputError, match=r"holds a run already \(step-00000002\)"):
        _train(plan, _options(text, tmp_path, 2))
    with pytest.raises(InputError, match=r"COMMIT: is missing.* nothing was deleted"):
        _train(plan, _options(text, tmp_path, 4, resume=True))
    assert sorted(path.name for path in step.iterdir()) == files
    (step / "COMMIT").write_text(commit)
    _train(plan, _options(text, tmp_path, 4, resume=True))
    newest = committed_folders(tmp_path / "checkpoints")[0]
    (newest / "COMMIT").unlink()
    _train(plan, _options(text, tmp_path, 4, resume=True))
    assert newest.with_name("step-00000004.damaged").is_dir(), "resumed from step 2, and step 4 is kept aside"
    assert committed_folders(tmp_path / "checkpoints")[0].name == "step-00000004"


# ------------------------------------------------------------------------------------------- faults


def test_another_model_workload_or_seed_is_refused_with_both_values(
    straight: tuple[Path, TrainSummary], text: str
) -> None:
    model = dataclasses.replace(MODEL, rope_theta=5000.0)
    plan = make_plan(model, PP2.strategy.degrees, seq=32)
    with pytest.raises(InputError) as caught:
        _train(plan, _options(text, straight[0], 9, resume=True, seed=3))
    fault = str(caught.value)
    assert "model.rope_theta: is 10000.0 in the checkpoint, 5000.0 now" in fault
    assert "workload.seq: is 16 in the checkpoint, 32 now" in fault
    assert "seed: is 0 in the checkpoint, 3 now" in fault


def test_a_folder_with_a_run_is_not_overwritten(straight: tuple[Path, TrainSummary], text: str) -> None:
    with pytest.raises(InputError, match="holds a run already"):
        _train(PP2, _options(text, straight[0], 6))
    with pytest.raises(InputError, match="already at step 6"):
        _train(PP2, _options(text, straight[0], 6, resume=True))


def test_nothing_to_resume_is_said(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no checkpoint to resume from"):
        _train(PP2, _options(text, tmp_path, 6, resume=True))


def test_a_folder_that_cannot_be_written_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"--run-dir .* cannot be written"):
        _train(PP2, _options(text, tmp_path / "file" / "run", 6))


def test_bad_options_are_listed_together(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        _train(PP2, _options(text, tmp_path, 0, lr=-1.0, keep=1))
    assert [problem.where for problem in caught.value.problems] == ["--steps", "--keep", "--lr"]


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(text: str, tmp_path: Path) -> None:
    plan = make_plan(MODEL, Degrees(micro_batch=2))
    _train(plan, _options(text, tmp_path, 2))
    before = committed_folders(tmp_path / "checkpoints")
    with pytest.raises(
        RunFailedError, match=r"the loss is (nan|inf) .* at step \d+\. The checkpoint .* is kept"
    ):
        _train(plan, _options(text, tmp_path, 50, resume=True, lr=1e38, warmup=0))
    assert committed_folders(tmp_path / "checkpoints") == before
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "diverged"
    assert _metrics(tmp_path)[-1]["loss"] is None


def test_the_world_of_torchrun_must_be_the_plans(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    with pytest.raises(InputError, match=r"torchrun started 3 ranks, but the plan .* needs 2\."):
        check_world(PP2, 3)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="torchrun started 3 ranks"):
        run_training(PP2, _options(text, Path("unused"), 1), shown=False)
    assert not Path("unused").exists()


def test_a_plan_for_gpus_says_so_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    group = PP2.cluster.groups[0]
    gpu = dataclasses.replace(group, device=dataclasses.replace(group.device, name="h100-sxm-80gb"))
    cluster: ClusterSpec = dataclasses.replace(PP2.cluster, groups=(gpu,))
    with pytest.raises(InputError, match="the plan is for h100-sxm-80gb; this machine has no CUDA device"):
        pick_device(dataclasses.replace(PP2, cluster=cluster))


# ------------------------------------------------------------------------------------------ signals


def _start_long_run(text: str, run_dir: Path) -> tuple[int, list[int]]:
    """A run of far too many steps, once it has done three; its process and those of its ranks."""
    pid = forked(lambda: _train(PP2, _options(text, run_dir, 100_000)) and None, run_dir / "fault.txt")
    metrics = run_dir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
    return pid, children(pid)


def test_a_rank_that_is_killed_ends_the_run_and_is_named(text: str, tmp_path: Path) -> None:
    pid, ranks = _start_long_run(text, tmp_path)
    os.kill(ranks[1], signal.SIGKILL)
    assert exit_code(pid) == 4
    fault = (tmp_path / "fault.txt").read_text()
    assert fault.startswith("rank 1 was killed by SIGKILL")
    assert "rank-1.log" in fault
    assert not any(map(alive, ranks))


def test_ranks_do_not_outlive_their_parent(text: str, tmp_path: Path) -> None:
    pid, ranks = _start_long_run(text, tmp_path)
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    wait_for(lambda: not any(map(alive, ranks)))


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_save_and_end_well(name: signal.Signals, text: str, tmp_path: Path) -> None:
    pid, ranks = _start_long_run(text, tmp_path)
    with pytest.raises(InputError, match="another run is writing there"):
        _train(PP2, _options(text, tmp_path, 5))
    os.kill(pid, name)
    assert exit_code(pid) == 0
    assert not any(map(alive, ranks))
    last = _metrics(tmp_path)[-1]["step"]
    assert committed_folders(tmp_path / "checkpoints")[0].name == f"step-{last:08d}"
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "stopped"


# --------------------------------------------------------------------------------------- entrances


def _call(command: list[str], plan: Path, text: str, run_dir: Path, steps: int, *more: str) -> Any:
    arguments = [*command, str(plan), "--data", text, "--tokenizer", "byte", "--steps", str(steps)]
    return subprocess.run(
        [*arguments, "--run-dir", str(run_dir), *more], capture_output=True, text=True, timeout=300
    )


def test_the_command_trains_and_torchrun_goes_on(text: str, tmp_path: Path) -> None:
    save_plan(PP2, tmp_path / "pp2.json")
    save_plan(TP2, tmp_path / "tp2.json")
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", "from planner.cli import main; main()", "train"]
    first = _call(command, tmp_path / "pp2.json", text, run_dir, 2, "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["last_step"] == 2
    assert "step 2/2" in first.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    second = _call(
        [*torchrun, "-m", "runtime.train"],
        tmp_path / "tp2.json",
        text,
        run_dir,
        4,
        "--resume",
        "--json",
    )
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["first_step"] == 3
    assert "the checkpoint's plan was" in second.stderr
    assert [line["step"] for line in _metrics(run_dir)] == [1, 2, 3, 4]


@pytest.mark.parametrize("steps", range(1, 9))
def test_every_launch_times_a_step_unless_it_has_only_one(steps: int) -> None:
    probes = Probes.over(steps)
    timed = set(range(probes.timed_from, steps))
    assert bool(timed) == (steps > 1)
    assert not timed & (probes.memory | {probes.timeline})
    assert 0 in probes.memory
