"""`plan replan` on made-up run folders: what it reads, what it takes over, what it refuses."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from planner.cli import cli
from planner.commands.running.train_again import resume_words
from planner.foundation.decode import to_json
from planner.foundation.units import DAY_S, GIB
from planner.job.objective import Goal, Minimise, Objective, Rest, goal_left, goal_of
from planner.model.workload import AdapterModules, Adapters
from planner.report.run_record import load_report_input
from planner.strategy.plan import Plan, load_plan, save_plan
from planner.strategy.plan_check import check_plan
from runtime.checkpoint.store import (
    CHECKPOINT_SCHEMA,
    COMMIT,
    INDEX,
    CheckpointIndex,
    Commit,
    digest_file,
    index_text,
    plan_facts,
    plan_identity,
    step_folder,
)
from runtime.train.metrics import Earlier, MetricsLog, Seen
from runtime.train.session import keep_plan

SHARD = "shard-00000.safetensors"
STEPS, TOKENS_PER_STEP = 40, 16 * 64
HOUR_USD = 36.0


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    words = "solve --model shardwise-demo --cluster local:4 --seq 64 --batch 16 --fix tp=2 --fix dp=2"
    tokens = str(STEPS * TOKENS_PER_STEP)
    result = call(*words.split(), "--tokens", tokens, "--reproducible", "-o", str(path))
    assert result.exit_code == 0, result.output
    found = load_plan(path)
    cluster = dataclasses.replace(found.cluster, price_usd_per_hour=HOUR_USD)
    return dataclasses.replace(found, cluster=cluster)


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words), prog_name="plan")


def answer(folder: Path, *more: str, cluster: str = "local:2", code: int = 0) -> Any:
    """The JSON document of `plan replan`."""
    pins = () if "--fix" in more else ("--fix", "tp=1", "--fix", "pp=2")  # a short search
    result = call("replan", str(folder), "--cluster", cluster, "--reproducible", "--json", *pins, *more)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def refused(folder: Path, *more: str, cluster: str = "local:2", code: int = 2) -> str:
    """What `plan replan` says where it answers nothing."""
    result = call("replan", str(folder), "--cluster", cluster, "--reproducible", *more)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    return result.stderr


def checkpoint(folder: Path, plan: Plan, step: int) -> Path:
    """A whole checkpoint without a tensor."""
    path = step_folder(folder / "checkpoints", step)
    path.mkdir(parents=True)
    run = {**plan_identity(plan), **plan_facts(plan), "seed": 7, "data.digest": "abc"}
    index = CheckpointIndex(
        schema_version=CHECKPOINT_SCHEMA, step=step, world=4, run=run, values={}, tensors={}
    )
    (path / INDEX).write_text(index_text(index))
    (path / SHARD).write_bytes(bytes(1000))
    files = {name: digest_file(path / name) for name in (INDEX, SHARD)}
    commit = Commit(schema_version=CHECKPOINT_SCHEMA, step=step, files=files)
    (path / COMMIT).write_text(to_json(commit))
    return path


def log(folder: Path, plan: Plan, steps: int, step_time_s: float, **values: Any) -> None:
    """metrics.jsonl of so many steps of an hour each, of which the first three are not timed."""
    predicted_s = plan.estimate.step_time_s
    lines = [
        {
            "step": step,
            "loss": 3.0,
            "step_time_s": step_time_s,
            "timed": step > 3,
            "peak_memory_bytes": [1, 2, 3, 4],
            "predicted_step_time_s": predicted_s,
            "wall_s": 3600.0 * step,
            "cost_usd": HOUR_USD * step,
            **values,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder: Path, plan: Plan, *, at: tuple[int, ...] = (5, 10), **options: Any) -> Path:
    """A run of `plan` that was killed at step 12, with checkpoints."""
    folder.mkdir(exist_ok=True)
    save_plan(plan, folder / "plan.json")
    log(folder, plan, 12, 1.5 * plan.estimate.step_time_s)
    for step in at:
        checkpoint(folder, plan, step)
    data = {"data": ["a.txt:0.7", "b c.txt:0.3"], "tokenizer": "byte", "columns": {"text": "body"}}
    told = {"steps": STEPS, "data": data, "seed": 7, "keep": 2, "checkpoint_every": 5, **options}
    (folder / "options.json").write_text(json.dumps(told))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------- the answer


def test_the_rest_of_a_run_is_planned_and_nothing_of_it_is_touched(plan: Plan, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", plan)
    before, new = contents(folder), tmp_path / "new.json"
    found = answer(folder, "-o", str(new), "--top", "1")
    assert contents(folder) == before
    own = load_plan(new)
    assert found["plan"] == json.loads(new.read_text())
    assert (own.model, own.workload, own.cluster.devices) == (plan.model, plan.workload, 2)
    assert str(own.engine) == "native" and all(check.holds for check in check_plan(own))
    assert (found["run"]["step"], found["run"]["logged_steps"], found["run"]["steps"]) == (10, 12, STEPS)
    assert (found["run"]["spent_s"], found["run"]["spent_usd"]) == (12 * 3600.0, 12 * HOUR_USD)
    assert found["checkpoint"]["bytes"] > 1000 and found["checkpoint"]["path"].endswith("step-00000010")
    assert found["measured"]["pace"] == pytest.approx(1.5) and found["measured"]["steps"] == 9
    left, at_pace = found["left"], found["left_at_own_pace"]
    assert (left["steps"], left["tokens"]) == (30, 30 * TOKENS_PER_STEP)
    assert left["seconds"] == pytest.approx(30 * own.estimate.step_time_s)
    assert at_pace["seconds"] == pytest.approx(1.5 * left["seconds"]) and found["ends_at"] is None
    assert found["left_by_old_plan"]["cost_usd"] == pytest.approx(
        30 * plan.estimate.step_time_s * HOUR_USD / 3600
    )
    assert "steps 11 to 12 came after the newest whole checkpoint" in " ".join(found["remarks"])
    assert found["diff"]["statement"].startswith("new is faster")
    weights = 12 * plan.model.params_total
    degrees = own.strategy.degrees
    all_ranks = sum(found["resharding"]["read_bytes_by_pipeline_rank"]) * degrees.world // degrees.pp
    assert all_ranks == pytest.approx(weights * degrees.dp_replicate, rel=0.01)
    command = "plan train {} --resume --run-dir {} --steps 40 --data a.txt:0.7 --data 'b c.txt:0.3'"
    assert found["command"].startswith(command.format(new, folder))
    assert found["command"].endswith("--text-key body --seed 7 --tokenizer byte --checkpoint-every 5")


def test_the_answer_for_people_names_both_plans_and_the_command(plan: Plan, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", plan)
    pins = ("--fix", "tp=1", "--fix", "pp=2")
    result = call("replan", str(folder), "--cluster", "local:2", *pins, "--time-limit", "900")
    assert result.exit_code == 0 and result.stderr == ""
    text = result.stdout
    parts = ("step 10 of 40", "+50.0%", "old plan", "local:4", "local:2", "resharding", "ends", "$432")
    joined = " ".join(text.split())  # lines break by the length of the folder's name
    for part in parts:
        assert part in joined, part
    assert text.splitlines()[-1].startswith("  plan train NEW.json --resume --run-dir")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(plan: Plan, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", plan)
    shard = step_folder(folder / "checkpoints", 10) / SHARD
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    found = answer(folder)
    assert (found["checkpoint"]["step"], found["left"]["steps"]) == (5, 35)
    assert [SHARD in each and "checksum" in each for each in found["passed_over"]] == [True]
    assert "steps 6 to 12 came after" in " ".join(found["remarks"])
    (step_folder(folder / "checkpoints", 5) / SHARD).unlink()
    found = answer(folder)
    assert found["checkpoint"] is None and found["left"]["steps"] == STEPS
    assert found["resharding"]["read_bytes_by_pipeline_rank"] == []
    assert f"plan train NEW.json --run-dir {folder}-anew --steps 40" in found["command"]


def test_without_a_checkpoint_the_run_begins_again(plan: Plan, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", plan, at=())
    (folder / "options.json").unlink()
    found = answer(folder)
    remarks = " ".join(found["remarks"])
    assert "begins again at step 0" in remarks and "add --data" in remarks
    assert found["command"] == f"plan train NEW.json --run-dir {folder} --steps 40"


def test_a_run_that_goes_on_now_is_said_to(plan: Plan, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", plan)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    assert "a process is training" not in " ".join(answer(folder)["remarks"])
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        assert "a process is training" in answer(folder)["remarks"][0]
    finally:
        os.close(handle)


def test_other_devices_take_no_pace_and_no_limit_over(plan: Plan, tmp_path: Path) -> None:
    tight = dataclasses.replace(plan, estimate=dataclasses.replace(plan.estimate, memory_limit_bytes=GIB))
    folder = make_run(tmp_path / "run", tight)
    found = answer(folder)
    assert found["plan"]["estimate"]["memory_limit_bytes"] == GIB
    assert "the memory limit is that of the run's plan, 1 GiB" in found["remarks"]
    found = answer(folder, "--fix", "tp=1", "--fix", "pp=1", cluster="2x8:h100-sxm-80gb")
    assert found["plan"]["estimate"]["memory_limit_bytes"] > 60 * GIB
    assert found["measured"]["pace"] == pytest.approx(1.5) and found["left_at_own_pace"] is None
    assert "devices are other ones: h100-sxm-80gb, not cpu" in found["remarks"]
    assert found["command"].startswith("torchrun --nnodes 2 --nproc-per-node 8 --no-python plan train")
    fp8 = dataclasses.replace(plan, workload=dataclasses.replace(plan.workload, precision="fp8"))
    folder = make_run(tmp_path / "fp8", fp8)
    assert "the run trains in fp8, and no fp8 peak of" in refused(folder, cluster="1x8:a100-sxm-80gb")


def test_where_a_batch_does_not_divide_only_a_new_run_may_change_it(plan: Plan, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", plan)
    found = answer(folder, "--fix", "dp=3", cluster="local:3", code=3)
    assert found["binding"]["rule"] == "batch_divides" and "--batch 15 or 18" in found["binding"]["detail"]
    assert [each["flag"] for each in found["repairs"]] == ["--fix dp=1"]
    assert {"--batch 15", "--batch 18"} <= {each["flag"] for each in found["other_repairs"]}
    result = call("replan", str(folder), "--cluster", "local:3", "--fix", "dp=3", "--time-limit", "2")
    assert result.exit_code == 3 and "by a new run alone: this one keeps batch" in result.stdout


# ---------------------------------------------------------------------------------------------- its goal


def test_what_was_spent_is_taken_off_deadline_and_budget(plan: Plan, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", plan, at=(10,))
    limits = ("--steps", "2000", "--deadline", "30d", "--budget", "100000")
    where: dict[str, Any] = {"cluster": "2*p5.48xlarge"}
    pins, new = ("--fix", "tp=1", "--fix", "pp=1"), tmp_path / "new.json"
    found = answer(folder, *limits, *pins, "--objective", "cost", "-o", str(new), **where)
    objective = found["plan"]["objective"]
    assert objective["deadline_days"] == pytest.approx(29.5)
    assert objective["budget_usd"] == pytest.approx(100_000 - 12 * HOUR_USD)
    assert objective["rest"]["tokens"] == 1990 * TOKENS_PER_STEP
    assert objective["days"] == pytest.approx(found["left"]["days"])
    assert found["plan"]["workload"]["tokens"] == STEPS * TOKENS_PER_STEP
    own = load_plan(new)
    assert all(check.holds for check in check_plan(own)), check_plan(own)
    assert goal_of(own.objective) == Goal(minimise=Minimise.COST, deadline_s=30 * DAY_S, budget_usd=100_000)
    again = make_run(tmp_path / "again", own, at=(10,))
    found = answer(again, "--steps", "2000", *pins, **where)
    assert found["plan"]["objective"]["deadline_days"] == pytest.approx(29.5)
    assert found["plan"]["objective"]["minimise"] == "cost"
    told = refused(folder, "--steps", "2000", "--deadline", "10h", "--budget", "400", code=3, **where)
    assert "the run has taken 12 h already" in told and "the run has cost $432.00 already" in told


def test_a_goal_that_the_runs_own_pace_misses_is_told(plan: Plan, tmp_path: Path) -> None:
    """12 h are spent. What is left takes 1,990 steps as predicted, and half as long again at that pace."""
    folder = make_run(tmp_path / "run", plan)
    left_s = answer(folder, "--steps", "2000")["left"]["seconds"]
    deadline = f"{12 + 1.2 * left_s / 3600:.6f}h"
    remarks = answer(folder, "--steps", "2000", "--deadline", deadline)["remarks"]
    assert "at the run's own pace the deadline is missed" in remarks[-1]
    log(folder, plan, 12, plan.estimate.step_time_s, cost_usd=None)
    found = answer(folder, "--budget", "7k", "--fix", "tp=1", "--fix", "pp=1", cluster="1*p5.48xlarge")
    assert found["plan"]["objective"]["budget_usd"] == 7000
    assert "what the run has cost is not known, and is not taken off the budget" in found["remarks"]


def test_a_goal_needs_what_it_counts(plan: Plan, tmp_path: Path) -> None:
    workload = dataclasses.replace(plan.workload, tokens=None)
    endless = make_run(tmp_path / "run", dataclasses.replace(plan, workload=workload))
    (endless / "options.json").unlink()
    assert "--steps: is not known" in refused(endless, "--deadline", "3d")
    found = answer(endless)
    assert found["left"] is None and "--steps N --seed 7" in found["command"]
    assert "--budget: needs a price, and local:2 has none" in refused(
        endless, "--budget", "5k", "--steps", "99"
    )


def test_what_is_left_of_a_goal() -> None:
    rest = Rest(tokens=1, spent_days=2.0, spent_usd=None)
    goal = Goal(deadline_s=3 * DAY_S, budget_usd=7.0)
    assert goal_left(goal, rest) == Goal(deadline_s=DAY_S, budget_usd=7.0)
    assert goal_of(None) == Goal()
    whole = Objective(
        minimise=Minimise.TIME, deadline_days=1.0, budget_usd=None, offered="", nodes=1, nodes_unused=0,
        days=0.5, cost_usd=None, lower_bound=0.5, gap=0.0, status="optimal",
    )  # fmt: skip
    assert goal_of(whole) == Goal(deadline_s=DAY_S)
    assert goal_of(dataclasses.replace(whole, rest=rest)) == goal_left(Goal(deadline_s=5 * DAY_S), rest)


# -------------------------------------------------------------------------------------------- bad input


def test_what_is_no_run_is_named(plan: Plan, tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nothing")
    assert "holds no plan.json" in refused(tmp_path)
    save_plan(plan, tmp_path / "plan.json")
    assert "is a file" in refused(tmp_path / "plan.json")
    assert "nothing ran there" in refused(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    assert "is not JSON" in refused(tmp_path)


def test_what_does_not_fit_the_run_is_named(plan: Plan, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", plan)
    assert "--steps: is 10, and the newest whole checkpoint is at step 10" in refused(folder, "--steps", "10")
    assert "is the plan that the run has" in refused(folder, "-o", str(folder / "plan.json"))
    told = refused(folder, "--memory-limit", "1x", "--fix", "tp=2", cluster="loca:2")
    assert "--cluster: 'loca:2'" in told and "--memory-limit: '1x'" in told
    assert "uses no clock" in refused(folder, "--time-limit", "3")
    other = dataclasses.replace(plan, model=dataclasses.replace(plan.model, vocab=600))
    checkpoint(folder, other, 11)
    told = refused(folder)
    assert "step-00000011: model.vocab: is 600 in the checkpoint, 512 now" in told
    (folder / "options.json").write_text('{"steps": {"a": 1}, "log": [3]}')
    checkpoint(folder, plan, 12)
    told = refused(folder)
    assert "options.json: steps: is a dict" in told and "options.json: log: is a list" in told


def test_no_torch_is_needed(plan: Plan, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", plan)
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom planner.cli import cli\n"
        f"cli.main(['replan', {str(folder)!r}, '--cluster', 'local:2', '--reproducible', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoint"]["step"] == 10


# ------------------------------------------------------------------------- the folder of a run of two plans


def test_a_new_plan_keeps_the_one_before_and_its_papers(plan: Plan, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", plan)
    for name in ("summary.json", "timeline.json"):
        (folder / name).write_text("{}" if name == "summary.json" else "[]")
    keep_plan(plan, folder, 10)
    assert not (folder / "earlier").exists()
    others = [dataclasses.replace(plan, rejected={"rule": count}) for count in (1, 2, 3)]
    keep_plan(others[0], folder, 10)
    kept = folder / "earlier" / "step-00000010"
    assert {path.name for path in kept.iterdir()} == {"plan.json", "summary.json", "timeline.json"}
    assert load_plan(kept / "plan.json") == plan and load_plan(folder / "plan.json") == others[0]
    (folder / "summary.json").write_text('{"status": "of a plan that led nowhere"}')
    keep_plan(others[1], folder, 10)
    assert load_plan(kept / "plan.json") == plan and (kept / "summary.json").read_text() == "{}"
    assert load_plan(folder / "plan.json") == others[1] and not (folder / "summary.json").exists()
    keep_plan(others[2], folder, 0)
    assert [path.name for path in (folder / "earlier").iterdir()] == ["step-00000010"]


def test_a_report_tells_the_plans_apart(plan: Plan, tmp_path: Path) -> None:
    """Of one number of ranks, by what each step's plan predicted."""
    folder = make_run(tmp_path / "run", plan)
    estimate = dataclasses.replace(plan.estimate, step_time_s=2 * plan.estimate.step_time_s)
    slower = dataclasses.replace(plan, estimate=estimate)
    keep_plan(slower, folder, 10)
    first = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:10]
    log(folder, slower, 14, 9.0, predicted_cost_usd=5.0)
    rest = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[10:]
    (folder / "metrics.jsonl").write_text("".join(first + rest))
    found = load_report_input(folder)
    assert found.run is not None
    assert [step.timed for step in found.run.steps] == [False] * 10 + [True] * 4
    assert found.run.step_time_s == 9.0 and found.run.predicted_cost_usd(found.plan) == 5.0
    notes = f"Steps 1 to 10 ran by {plan.strategy.degrees.label()} on local:4"
    assert found.run.notes[0] == "10 steps ran by an earlier plan: not timed." and notes in found.run.notes[1]
    (folder / "earlier" / "step-00000010" / "plan.json").write_text("{")
    found = load_report_input(folder)
    assert found.run is not None and "The plan of the steps up to 10 cannot be read" in found.run.notes[1]


def earlier_of(folder: Path, last_step: int) -> Earlier:
    """What a launch that goes on after `last_step` reads of those before."""
    found = MetricsLog(folder, last_step=last_step)
    found.close()
    return found.earlier


def test_dollars_of_launches_add_up_and_unknown_ones_stay_unknown(plan: Plan, tmp_path: Path) -> None:
    log(tmp_path, plan, 4, 1.0, predicted_cost_usd=0.5)
    earlier = earlier_of(tmp_path, 3)
    assert (earlier.wall_s, earlier.steps_s, earlier.cost_usd) == (4 * 3600.0, 3.0, 4 * HOUR_USD)
    seen = Seen(first_step=3, earlier=earlier)
    cheaper = dataclasses.replace(plan.cluster, price_usd_per_hour=1.0)
    other = dataclasses.replace(plan, cluster=cheaper)
    assert seen.cost_usd(other, 6 * 3600.0) == pytest.approx(4 * HOUR_USD + 2.0)
    assert seen.predicted_cost_usd(other, 7) == pytest.approx(0.5 + 7 * plan.estimate.step_time_s / 3600)
    free = dataclasses.replace(
        plan,
        cluster=dataclasses.replace(cheaper, price_usd_per_hour=None),
        estimate=dataclasses.replace(plan.estimate, cost_usd=None),
    )
    assert seen.cost_usd(free, 6 * 3600.0) is None and seen.predicted_cost_usd(free, 7) is None
    log(tmp_path, plan, 4, 1.0, cost_usd=None)
    unknown = Seen(first_step=4, earlier=earlier_of(tmp_path, 4))
    assert unknown.cost_usd(other, 6 * 3600.0) is None


def test_the_command_says_again_what_the_run_was_told(plan: Plan, tmp_path: Path) -> None:
    told = {
        "init_from": "weights", "compile": False, "any_device": True, "log": ["wandb"], "hf_config": "c",
        "profile_steps": 3, "run_dir": "elsewhere", "resume": False, "lr": 0.01, "keep": 2,
    }  # fmt: skip
    words = resume_words(plan, "p", tmp_path, "9", told, resume=True)
    own = ["plan", "train", "p", "--resume", "--run-dir", str(tmp_path), "--steps", "9"]
    assert words[: len(own)] == own
    assert words[len(own) :] == [
        *("--backend", "transformers", "--lr", "0.01", "--no-compile", "--any-device", "--log", "wandb"),
        *("--hf-config", "c"),
    ]
    assert "weights" in resume_words(plan, "p", tmp_path, "9", told, resume=False)
    lora = dataclasses.replace(plan.workload, adapters=Adapters(rank=4, modules=AdapterModules.ALL))
    adapted = dataclasses.replace(plan, workload=lora)
    assert "weights" in resume_words(adapted, "p", tmp_path, "9", told, resume=True)
