"""Ranks that hang end the run in time and are named, under our own launcher and under torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from planner.strategy.plan import save_plan
from planner.strategy.strategy import Degrees
from runtime.checkpoint.store import committed_folders
from runtime.launch.local_ranks import RunFailedError, Send, run_local
from runtime.launch.process_group import (
    MIN_COMPILE_TIMEOUT_S,
    MIN_TIMEOUT_S,
    describe_hang,
    group_timeout_s,
    join_group,
)
from runtime.train.data.documents import shipped_corpus
from tests.plans import make_plan, tiny_llama

PP2 = make_plan(tiny_llama(vocab=258), Degrees(pp=2, micro_batch=1, num_micro_batches=4))


def test_patience_follows_the_predicted_step_and_has_a_floor() -> None:
    assert group_timeout_s(PP2) == MIN_TIMEOUT_S
    slow = dataclasses.replace(PP2.estimate, step_time_s=30.0, step_time_interval_s=(20.0, 40.0))
    assert group_timeout_s(dataclasses.replace(PP2, estimate=slow)) == 20 * 40.0
    stage = PP2.stage_estimates[0]
    memory = dataclasses.replace(stage.memory, weights_bytes=10**9, optimizer_bytes=4 * 10**9)
    full = (stage, dataclasses.replace(stage, memory=memory))
    assert group_timeout_s(dataclasses.replace(PP2, stage_estimates=full)) == MIN_TIMEOUT_S + 100
    group = PP2.cluster.groups[0]
    gpu = dataclasses.replace(group, device=dataclasses.replace(group.device, name="h100-sxm-80gb"))
    cluster = dataclasses.replace(PP2.cluster, groups=(gpu,))
    assert group_timeout_s(dataclasses.replace(PP2, cluster=cluster)) == MIN_COMPILE_TIMEOUT_S


def test_a_hang_is_described() -> None:
    assert describe_hang({2: ""}, [0, 1], 30) == "rank 2 did not answer for 30 s; ranks 0, 1 gave up waiting."
    assert describe_hang({1: "stopped", 3: "still running"}, [0]) == (
        "ranks 1 (stopped), 3 (still running) did not answer; rank 0 gave up waiting."
    )


def test_a_stopped_rank_is_named_and_ends_the_run(tmp_path: Path) -> None:
    hung = 2

    def body(rank: int, send: Send) -> None:
        import torch
        import torch.distributed as dist

        join_group("gloo", 2.0)
        for step in range(100):
            if rank == hung and step == 3:
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.all_reduce(torch.ones(4))

    pids: list[int] = []
    begun_s = time.monotonic()
    with pytest.raises(RunFailedError, match=rf"rank {hung} \(stopped\) did not answer; ranks .* gave up"):
        run_local(body, 4, log_dir=tmp_path, on_message=lambda rank, message: pids.append(rank))
    assert time.monotonic() - begun_s < 60


# ------------------------------------------------------------------------------------------- torchrun


HANG_S = 10
"""Longer than a first step on a busy machine takes, and little of a test's time."""


@contextlib.contextmanager
def _torchrun(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Two ranks under torchrun that have done three of far too many steps."""
    save_plan(PP2, run_dir / "plan.json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "runtime.train", str(run_dir / "plan.json"), "--steps", "100000"]
    options = ["--data", str(shipped_corpus()), "--tokenizer", "byte", "--hang-timeout", str(HANG_S)]
    with (
        (run_dir / "stderr.txt").open("w") as stderr,
        subprocess.Popen(
            [*command, *options, "--run-dir", str(run_dir)],
            stderr=stderr,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as process,
    ):
        try:
            _wait_for(lambda: _lines(run_dir) >= 3)
            yield process
        finally:
            process.kill()


def _lines(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def _ranks(pid: int) -> list[int]:
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_torchrun_names_the_rank_that_hangs(tmp_path: Path) -> None:
    with _torchrun(tmp_path) as process:
        stopped = _ranks(process.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        _wait_for(lambda: "gave up waiting" in (tmp_path / "stderr.txt").read_text())
        os.kill(stopped, signal.SIGKILL)  # torchrun itself would wait 30 s for it
        assert process.wait(60) != 0
    said = (tmp_path / "stderr.txt").read_text()
    assert f"error: rank 1 did not answer for {HANG_S} s; rank 0 gave up waiting." in said


def test_sigterm_under_torchrun_finishes_the_step_and_saves(tmp_path: Path) -> None:
    with _torchrun(tmp_path) as process:
        process.terminate()
        process.wait(60)
    last = _lines(tmp_path)
    assert committed_folders(tmp_path / "checkpoints")[0].name == f"step-{last:08d}"
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "stopped"
    assert "error:" not in (tmp_path / "stderr.txt").read_text()
