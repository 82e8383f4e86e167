"""`plan calibrate --from-run`: what a run left behind becomes a row of runs.csv that can be predicted."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from planner.calibration.run_history import steady, warmup
from planner.calibration.run_log import read_flat_yaml
from planner.calibration.run_setup import run_problem
from planner.calibration.runs import COLUMNS, READERS, Run, read_runs, runs_csv
from planner.calibration.tracker_names import QUANTITIES, SETTINGS, quantity_of
from planner.cli import cli
from planner.hardware.cluster_text import parse_cluster
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.strategy.estimate import Rejected
from planner.strategy.plan import Plan, save_plan
from planner.strategy.strategy import Degrees, Stage, Zero, even_stages
from tests.plans import make_plan, split, tiny_gpt2, tiny_llama

DEGREES = Degrees(tp=2, pp=2, dp_shard=2, zero=Zero.OPTIMIZER, num_micro_batches=4, sequence_parallel=True)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["calibrate", *map(str, arguments)])


def plan_on_h100(degrees: Degrees = DEGREES, stages: tuple[Stage, ...] | None = None) -> Plan:
    plan = make_plan(
        tiny_llama(),
        degrees,
        stages,
        precision=Precision.BF16,
        recompute=Recompute.FULL if not stages else Recompute.NONE,
    )
    return dataclasses.replace(plan, cluster=parse_cluster("2x4:h100-sxm-80gb@ndr400x8"))


def step(number: int, seconds: float, *, timed: bool = True, **more: object) -> str:
    line = {"step": number, "loss": 2.0, "step_time_s": seconds, "tokens_per_s": 100.0, "timed": timed}
    return json.dumps({**line, "peak_memory_bytes": [2**30] * 7 + [2**31], **more})


def trained(folder: Path, lines: list[str], plan: Plan | None = None) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    save_plan(plan or plan_on_h100(), folder / "plan.json")
    return folder


def converted(*arguments: str | Path, output: Path) -> tuple[Run, Result]:
    result = call(*arguments, "-o", output)
    assert result.exit_code == 0, result.output
    (run,) = read_runs([output]).runs
    return run, result


def faults(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.output


# Runs of `plan train`


def test_a_run_of_plan_train_becomes_the_problem_that_it_ran(tmp_path: Path) -> None:
    plan = plan_on_h100()
    lines = [step(1, 9.0, timed=False), step(2, 7.0, timed=False), step(3, 1.0), step(4, 1.2), step(5, 1.1)]
    run, result = converted("--from-run", trained(tmp_path / "mine", lines, plan), output=tmp_path / "r.csv")
    assert (run.id, run.step_time_s, run.peak_memory_gib) == ("mine", 1.1, 2.0)
    assert "median of 3 steps after 2 of warm-up" in result.output
    setup = run_problem(run, None)
    assert not isinstance(setup, Rejected)
    assert setup.strategy == plan.strategy
    assert setup.problem.cluster == plan.cluster
    assert setup.problem.model.params_total == plan.model.params_total
    assert setup.problem.workload == plan.workload


def test_what_a_row_cannot_hold_is_said(tmp_path: Path) -> None:
    plan = plan_on_h100(stages=split(3, 1))
    _, result = converted(
        "--from-run", trained(tmp_path / "a", [step(1, 1.0)], plan), output=tmp_path / "r.csv"
    )
    assert "its stages are uneven" in result.output
    mixed = (*split(2), Stage(first=2, end=4, recompute=even_stages(2, 1, Recompute.FULL)[0].recompute))
    plan = plan_on_h100(stages=mixed)
    _, result = converted(
        "--from-run", trained(tmp_path / "b", [step(1, 1.0)], plan), output=tmp_path / "r.csv"
    )
    assert "2 of 4 blocks recompute otherwise" in result.output


def test_a_bare_log_needs_the_plan_that_is_named(tmp_path: Path) -> None:
    log, plan = tmp_path / "log.jsonl", tmp_path / "other.json"
    log.write_text("".join(step(n, 1.0) + "\n" for n in range(5)))
    save_plan(plan_on_h100(), plan)
    run, _ = converted("--from-run", log, "--plan", plan, output=tmp_path / "r.csv")
    assert (run.tp, run.device, run.layers) == (2, "h100-sxm-80gb", 4)
    without = call("--from-run", log)
    assert without.exit_code == 0
    assert "no prediction without: model (or layers, hidden, heads, ffn, vocab), device" in without.output


def test_a_killed_run_loses_its_last_line_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    whole = [step(n, 1.0) for n in range(1, 6)]
    folder = trained(tmp_path / "a", whole)
    (folder / "metrics.jsonl").write_text("\n".join(whole) + "\n" + whole[0][:40])
    _, result = converted("--from-run", folder, output=tmp_path / "r.csv")
    assert "the last line is cut off" in result.output
    (folder / "metrics.jsonl").write_text("\n".join([whole[0][:40], "[]", *whole]) + "\n")
    text = faults(call("--from-run", folder))
    assert "line 1: is not a JSON object" in text and "line 2: is not a JSON object" in text


BAD_STEPS = {
    "nan": (float("nan"), "step_time_s: is nan"),
    "infinite": (math.inf, "step_time_s: is inf"),
    "negative": (-1.0, "step_time_s: is -1.0"),
    "zero": (0.0, "step_time_s: is 0.0"),
    "text": ("fast", "step_time_s: is fast"),
    "flag": (True, "step_time_s: is True"),
    "nested": ({}, "step_time_s: is {}"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_step_time_that_is_none_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    value, fault = BAD_STEPS[name]
    folder = trained(tmp_path / "a", [step(1, 1.0), step(2, value), step(3, value)])  # type: ignore[arg-type]
    text = faults(call("--from-run", folder))
    assert f"line 2: {fault}" in text and f"line 3: {fault}" in text


def test_faults_of_several_runs_are_listed_at_once(tmp_path: Path) -> None:
    other = trained(tmp_path / "other", [step(1, 1.0)])
    document = json.loads((other / "plan.json").read_text())
    (other / "plan.json").write_text(json.dumps({**document, "schema_version": 99}))
    (other / "metrics.jsonl").write_text("nothing\n")
    empty, absent = tmp_path / "empty.jsonl", tmp_path / "absent.jsonl"
    empty.write_text("")
    (tmp_path / "bare").mkdir()
    paths = [other, empty, absent, tmp_path / "bare"]
    text = faults(call(*(word for path in paths for word in ("--from-run", str(path)))))
    for fault in ("is 99; this version reads", "line 1: is not a JSON", "holds no step", "no such file"):
        assert fault in text
    assert "holds neither metrics.jsonl (plan train) nor run-ID.wandb" in text


def test_a_resumed_run_counts_its_own_plan_and_each_step_once(tmp_path: Path) -> None:
    earlier = [step(n, 9.0, peak_memory_bytes=[2**34] * 4) for n in (1, 2)]
    folder = trained(tmp_path / "a", [*earlier, step(3, 5.0), step(3, 1.0), step(4, 1.0)])
    (folder / "summary.json").write_text(json.dumps({"executed_differences": ["zero is 0, not 1"]}))
    run, result = converted("--from-run", folder, output=tmp_path / "r.csv")
    assert (run.step_time_s, run.peak_memory_gib) == (1.0, 2.0)
    assert "2 steps ran by an earlier plan" in result.output
    assert "differs from its plan: zero is 0, not 1" in result.output
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in earlier))
    assert "metrics.jsonl: has no step that ran by the plan.json" in faults(call("--from-run", folder))
    (folder / "summary.json").write_text("{")
    (folder / "metrics.jsonl").write_text("[1]\nx\n")
    text = faults(call("--from-run", folder))
    assert "summary.json: is not JSON" in text and "metrics.jsonl" in text


def test_a_folder_without_its_plan_is_told_how_to_get_one(tmp_path: Path) -> None:
    folder = trained(tmp_path / "a", [step(1, 1.0)])
    (folder / "plan.json").unlink()
    assert "--plan FILE" in faults(call("--from-run", folder))
    assert call("--from-run", folder, "--set", "device=h100-sxm-80gb").exit_code == 0


# W&B


CONFIG = """\
wandb_version: 1

_wandb:
    desc: null
    value:
        python_version: 3.11.4
        t:
            1:
            - 1
            - 5
model_name:
    desc: null
    value: llama-3-8b
trainer:
    value:
        num_nodes: 2
        devices: 8
tensor_model_parallel_size:
    value: 4   # of eight
seq_length:
    value: 4096
global_batch_size:
    value: 64
micro_batch_size:
    value: '2'
precision:
    value: bf16-mixed
gradient_checkpointing:
    value: true
notes:
    value: |
        tensor_model_parallel_size: 99
        more
"""


def wandb_folder(folder: Path) -> Path:
    files = folder / "files"
    files.mkdir(parents=True)
    (files / "config.yaml").write_text(CONFIG)
    (files / "wandb-metadata.json").write_text(json.dumps({"gpu": "NVIDIA H100 80GB HBM3", "gpu_count": 8}))
    summary = {"train/step_time": 2.5, "memory/max_reserved(GiB)": 61.5, "_step": 100, "loss": "NaN"}
    (files / "wandb-summary.json").write_text(json.dumps(summary))
    return folder


def test_a_local_folder_of_wandb_gives_settings_machine_and_last_figures(tmp_path: Path) -> None:
    run, result = converted("--from-run", wandb_folder(tmp_path / "run-1"), output=tmp_path / "r.csv")
    assert (run.model, run.device, run.nodes, run.gpus_per_node) == ("llama-3-8b", "h100-sxm-80gb", 2, 8)
    assert (run.tp, run.seq_len, run.global_batch, run.micro_batch) == (4, 4096, 64, 2)
    assert (run.precision, run.recompute) == ("bf16", "full")
    assert (run.step_time_s, run.peak_reserved_gib) == (2.5, 61.5)
    assert "no history (run-ID.wandb)" in result.output and "the last step alone" in run.notes
    assert not isinstance(run_problem(run, None), Rejected)


def test_a_panel_of_wandb_gives_a_median_and_the_batch_its_step_time(tmp_path: Path) -> None:
    path = tmp_path / "panel.csv"
    rates = [10.0] * 3 + [4000.0] * 10 + [3000.0, 4000.0]
    rows = [f'"{n}","{rate}","{rate}","{rate}"' for n, rate in enumerate(rates)]
    name = "run-7 - train/tokens_per_second_per_gpu"
    path.write_text("\n".join([f'"Step","{name}","{name}__MIN","{name}__MAX"', *rows]) + "\n")
    sizes = ["--set", "seq_len=4096", "--set", "global_batch=64", "--set", "nodes=2"]
    text = faults(call("--from-run", path, *sizes))
    assert "only with gpus_per_node" in text and "--set gpus_per_node=N" in text
    run, _ = converted("--from-run", path, *sizes, "--set", "gpus_per_node=8", output=tmp_path / "r.csv")
    assert run.step_time_s == pytest.approx(4096 * 64 / 16 / 4000)


def test_a_figure_of_another_name_is_named_by_the_user(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps({"t_iter": 1500 + n, "loss": None}) + "\n" for n in range(9)))
    text = faults(call("--from-run", path))
    assert "no step time and no tokens a second among its figures: t_iter, loss" in text
    assert "--metric step_time_s=NAME" in text and "iteration_time" in text
    assert "no figure 't_itr'" in faults(call("--from-run", path, "--metric", "step_time_ms=t_itr"))
    run, _ = converted("--from-run", path, "--metric", "step_time_ms=t_iter", output=tmp_path / "r.csv")
    assert run.step_time_s == pytest.approx(1.5055)


def test_exports_that_hold_no_one_history_are_refused(tmp_path: Path) -> None:
    several, table = tmp_path / "several.csv", tmp_path / "table.csv"
    several.write_text("Step,a - step_time,b - step_time\n1,2,3\n")
    table.write_text("Name,State,Runtime,step_time\nx,finished,9,1\n")
    text = faults(call("--from-run", several, "--from-run", table))
    assert "holds 2 runs: a, b" in text and "is a table of runs" in text


def test_lists_and_texts_of_a_configuration_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG + "betas:\n    value:\n    - 0.9\nempty:\n    value: null\nrange: [1, 2]\n")
    found = read_flat_yaml(path)
    assert found["trainer.num_nodes"] == "2" and found["tensor_model_parallel_size"] == "4"
    assert found["micro_batch_size"] == "2"
    assert not {"betas", "empty", "range", "notes"} & set(found)
    assert not any("python_version" in key for key in found)


# The command


def test_options_that_do_not_go_together_are_listed_at_once(tmp_path: Path) -> None:
    assert "is missing, and so is --from-run" in faults(call())
    text = faults(call("table.csv", "--set", "tp=2", "--metric", "step_time_s=x"))
    assert "-o: is missing" in text and "--set: says something" in text and "--metric: says" in text
    folder = trained(tmp_path / "a", [step(1, 1.0)])
    assert "only writes a table" in faults(call("--from-run", folder, "-o", tmp_path / "p.json"))
    wrong = ("--set", "tp=x", "--set", "tpp=1", "--set", "tp", "--metric", "speed=x")
    text = faults(call("--from-run", folder, *wrong))
    for fault in ("--set tp: 'x' is not a number", "'tpp' is not known", "'tp' is not NAME=VALUE", "'speed'"):
        assert fault in text


def test_own_runs_are_fitted_together_with_a_table(tmp_path: Path) -> None:
    folders = [trained(tmp_path / f"r{n}", [step(1, 0.01 * (n + 1))]) for n in range(3)]
    table = tmp_path / "table.csv"
    assert call("--from-run", folders[0], "--from-run", folders[1], "-o", table).exit_code == 0
    assert len(read_runs([table]).runs) == 2
    profile = tmp_path / "p.json"
    alone = call(table, "-o", profile)
    assert "2 of 2 rows can be used" in faults(alone)
    together = call(table, "--from-run", folders[2], "-o", profile, "--json")
    assert together.exit_code == 0, together.output
    assert json.loads(together.stdout)["fits"][0]["runs"] == 3


def test_stdout_holds_the_table_or_one_document_and_nothing_else(tmp_path: Path) -> None:
    folder = trained(tmp_path / "a", [step(1, 1.0)])
    assert call("--from-run", folder).stdout.splitlines()[0] == ",".join(COLUMNS)
    document = json.loads(call("--from-run", folder, "--json").stdout)
    assert document["runs"][0]["step_time_s"] == 1.0 and document["table"] is None


# Statistics and names


def test_the_steady_state_is_not_moved_by_warm_up_nor_by_checkpoints() -> None:
    values = [30.0, 8.0, 2.0, *[1.0] * 16, 20.0, 1.0, 1.0]
    assert steady(values).value == 1.0
    assert steady(values).left_out == 3
    assert steady([5.0]).spread is None and steady([5.0]).value == 5.0
    assert [warmup(n) for n in (1, 2, 4, 6, 30, 200, 10_000)] == [0, 1, 2, 3, 3, 20, 50]


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("train/step_time", "step_time_s"),
        ("train_step_timing in s", "step_time_s"),
        ("iteration-time", "step_time_s"),
        ("elapsed time per iteration (ms)", "step_time_ms"),
        ("throughput(tps)", "tokens_per_s_per_device"),
        ("throughput/device/tokens_per_sec", "tokens_per_s_per_device"),
        ("throughput/tokens_per_sec", "tokens_per_s"),
        ("throughput/batches_per_sec", "steps_per_s"),
        ("memory/max_reserved(GiB)", "reserved_gib"),
        ("peak_memory_alloc", "allocated_gib"),
        ("loss", None),
        ("time", None),
        ("_step", None),
    ],
)
def test_names_that_frameworks_use(name: str, quantity: str | None) -> None:
    assert quantity_of(name) == quantity


def test_no_name_means_two_things() -> None:
    names = [name for quantity in QUANTITIES.values() for name in quantity.names]
    assert len(names) == len(set(names))
    settings = [name for column in SETTINGS.values() for name in column]
    assert len(settings) == len(set(settings))
    assert set(SETTINGS) <= set(READERS)


def test_a_table_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    source = Path(__file__).parents[3] / "bench" / "data" / "h100_reference.csv"
    runs = read_runs([source]).runs
    path.write_text(runs_csv(runs))
    again = read_runs([path]).runs
    assert [dataclasses.replace(a, where="") for a in again] == [
        dataclasses.replace(r, where="") for r in runs
    ]


def test_a_model_of_another_family_round_trips(tmp_path: Path) -> None:
    plan = make_plan(tiny_gpt2(layers=4), Degrees(dp_replicate=2), precision=Precision.BF16)
    plan = dataclasses.replace(plan, cluster=parse_cluster("1x2:a100-sxm-80gb"))
    lines = [step(1, 1.0, peak_memory_bytes=[2**31] * 2)]
    run, _ = converted("--from-run", trained(tmp_path / "g", lines, plan), output=tmp_path / "r.csv")
    setup = run_problem(run, None)
    assert not isinstance(setup, Rejected)
    assert setup.problem.model.flops_per_token_forward(16) == plan.model.flops_per_token_forward(16)
