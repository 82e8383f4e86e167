"""`plan validate`: errors, order, regret and verdicts of predictions, the JSON of the contract, the page."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from scipy import stats

from bench import accuracy
from planner.calibration.run_setup import RunSetup, run_problem
from planner.calibration.runs import MemoryKind, Status, read_runs
from planner.calibration.validate import ValidatedRow, choose, judge, judge_group, kendall_tau, validate
from planner.cli import cli
from planner.commands.accuracy.validate import profile_choice
from planner.report.curves import log_ticks
from planner.report.scatter import scatter_page
from planner.strategy.estimate import Verdict

DATA = Path(__file__).parents[3] / "bench" / "data"
REFERENCE = DATA / "h100_reference.csv"
ROW_KEYS = {
    "id",
    "group",
    "predicted_step_time_s",
    "step_time_s",
    "error",
    "predicted_peak_memory_gib",
    "peak_memory_gib",
    "memory_error",
    "verdict",
    "status",
}
HEADER = (
    "id,group,layers,hidden,ffn,heads,vocab,gated_mlp,seq_len,device,nodes,gpus_per_node,tp,pp,dp,zero,"
    "recompute,micro_batch,global_batch,status,step_time_s,peak_memory_gib,memory_kind"
)
BODY = "24,1024,4096,16,50304,false,1024,a100-sxm-80gb,1,8"


def row(
    name: str,
    predicted_s: float | None,
    measured_s: float | None,
    verdict: Verdict = Verdict.SAFE,
    status: Status = Status.OK,
) -> ValidatedRow:
    both = predicted_s is not None and measured_s is not None
    return ValidatedRow(
        id=name,
        group="g",
        source="",
        framework="",
        strategy="tp1",
        predicted_step_time_s=predicted_s,
        step_time_s=measured_s,
        error=predicted_s / measured_s - 1 if both else None,  # type: ignore[operator]
        predicted_peak_memory_gib=1.0,
        peak_memory_gib=None,
        memory_error=None,
        memory_kind=None,
        verdict=verdict if predicted_s is not None else None,
        status=status,
    )


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["validate", *arguments])


# Figures


def test_errors_are_shares_of_the_measured() -> None:
    summary = judge([row("a", 1.2, 1.0), row("b", 0.9, 1.0), row("c", None, 5.0)]).summary
    assert summary.time_mape == pytest.approx(0.15)
    assert summary.time_bias == pytest.approx(0.05)
    assert (summary.n, summary.n_time, summary.rows, summary.memory_mape) == (2, 2, 3, None)


def test_the_share_inside_the_interval_counts_timed_rows() -> None:
    wide = dataclasses.replace(row("a", 1.2, 1.0), predicted_interval_s=(0.9, 1.5))
    narrow = dataclasses.replace(row("b", 1.2, 1.0), predicted_interval_s=(1.1, 1.3))
    assert judge([wide, narrow, row("c", None, 1.0)]).summary.within_interval == 0.5
    assert judge([row("c", None, 1.0)]).summary.within_interval is None


def test_tau_is_scipys_on_random_orders_with_ties() -> None:
    rng = random.Random(3)
    for _ in range(200):
        size = rng.randrange(2, 12)
        first = [float(rng.randrange(6)) for _ in range(size)]
        second = [float(rng.randrange(6)) for _ in range(size)]
        own = kendall_tau(first, second)
        if len(set(first)) == 1 or len(set(second)) == 1:
            assert own is None
        else:
            assert own == pytest.approx(stats.kendalltau(first, second).statistic, abs=1e-12)


def test_regret_is_the_chosen_rows_time_over_the_best() -> None:
    group = judge_group("g", [row("a", 1.0, 1.3), row("b", 1.1, 1.0), row("c", 2.0, 2.0)])
    assert (group.chosen, group.best, group.n) == ("a", "b", 3)
    assert group.regret == pytest.approx(0.3)


def test_a_row_judged_no_is_not_chosen_but_may_be_the_best() -> None:
    rows = [row("a", 1.0, 1.0, Verdict.NO), row("b", 2.0, 1.5, Verdict.RISKY)]
    group = judge_group("g", rows)
    assert (group.chosen, group.best) == ("b", "a")
    assert group.regret == pytest.approx(0.5)


def test_a_chosen_row_that_ran_out_of_memory_is_a_regret_of_one() -> None:
    rows = [row("a", 1.0, None, Verdict.RISKY, Status.OOM), row("b", 1.1, 1.0)]
    assert judge_group("g", rows).regret == 1.0
    refused = [dataclasses.replace(rows[0], verdict=Verdict.NO), rows[1]]
    assert judge_group("g", refused).regret == 0.0


def test_what_cannot_be_judged_is_left_open() -> None:
    assert choose([row("a", None, 1.0), row("b", 1.0, None)]) is None
    group = judge_group("g", [row("a", 1.0, 1.0, Verdict.NO)])
    assert (group.regret, group.kendall_tau, group.best) == (None, None, "a")


def test_verdicts_are_counted_by_outcome() -> None:
    rows = [
        row("a", 1.0, 1.0),
        row("b", 1.0, None, Verdict.SAFE, Status.OOM),
        row("c", 1.0, 1.0, Verdict.NO),
        row("d", 1.0, None, Verdict.NO, Status.OOM),
        row("e", 1.0, None, Verdict.NO, Status.OOM),
        row("f", None, 1.0),
    ]
    assert judge(rows).verdicts == {
        "safe_ran": 1,
        "safe_oom": 1,
        "risky_ran": 0,
        "risky_oom": 0,
        "no_ran": 1,
        "no_oom": 2,
    }


# Predictions


def test_every_reference_run_is_predicted_in_time_and_memory() -> None:
    result = validate(read_runs([REFERENCE]).runs, lambda device: None)
    assert (result.summary.n, result.summary.n_time, result.summary.n_memory) == (16, 16, 16)
    for each in result.rows:
        assert each.predicted_step_time_s and each.predicted_peak_memory_gib and each.verdict
        assert each.memory_kind is MemoryKind.ALLOCATED
        assert each.predicted_reserved_gib and each.reserved_error is not None
        assert each.predicted_device_gib and each.device_error is not None
        assert each.predicted_peak_memory_gib <= each.predicted_reserved_gib < each.predicted_device_gib


def test_a_run_is_predicted_alike_alone_and_among_others() -> None:
    runs = read_runs([DATA / "layout_sweeps.csv"]).runs[:40]
    together = validate(runs, lambda device: None).rows
    for index in (5, 17, 31):
        (alone,) = validate([runs[index]], lambda device: None).rows
        assert alone == together[index]


# The command


def test_json_has_the_keys_of_the_contract_and_nothing_else_is_on_stdout(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(
        f"{HEADER}\n"
        f"a,g,{BODY},1,1,8,1,none,4,32,ok,0.2,9.5,allocated\n"
        f"b,g,{BODY},2,1,4,0,full,4,32,ok,0.3,,\n"
        f"c,g,{BODY},1,1,8,0,none,64,512,oom,,,\n"
        f"d,g,{BODY},1,1,8,0,none,4,,ok,0.2,,\n",
        encoding="utf-8",
    )
    result = run(str(file), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert set(document) >= {"rows", "summary", "groups", "verdicts"}
    assert [each["id"] for each in document["rows"]] == ["a", "b", "c", "d"]
    for each in document["rows"]:
        assert set(each) >= ROW_KEYS
    first, _, oom, partial = document["rows"]
    assert first["error"] == pytest.approx(first["predicted_step_time_s"] / 0.2 - 1)
    assert first["memory_error"] == pytest.approx(first["predicted_peak_memory_gib"] / 9.5 - 1)
    assert (oom["status"], oom["error"]) == ("oom", None) and oom["verdict"] in list(Verdict)
    assert partial["predicted_step_time_s"] is None and "global_batch" in partial["reason"]
    assert set(document["summary"]) >= {"n", "time_mape", "time_bias", "memory_mape", "memory_bias"}
    (group,) = document["groups"]
    assert set(group) >= {"group", "n", "time_mape", "kendall_tau", "regret", "chosen", "best"}
    assert (group["group"], group["n"], group["best"]) == ("g", 3, "a")
    assert sum(document["verdicts"].values()) == 3


def test_text_shows_errors_verdicts_and_what_was_not_predicted(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(
        f"{HEADER}\na,g,{BODY},1,1,8,1,none,4,32,ok,0.2,,\nb,g,{BODY},1,1,8,1,none,4,,ok,0.2,,\n"
        f"c,g,{BODY},2,1,4,1,none,4,32,ok,0.3,,\n",
        encoding="utf-8",
    )
    result = run(str(file))
    assert result.exit_code == 0
    for words in (
        "2 predicted of 3",
        "mean error",
        "SAFE",
        "furthest off",
        "global_batch unknown",
        "tau",
        "basis",
    ):
        assert words in result.stdout


def test_bad_tables_are_refused_with_exit_code_2(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text("device,tp\nt4,zero\n", encoding="utf-8")
    result = run(str(file), str(tmp_path / "none.csv"))
    assert result.exit_code == 2 and result.stdout == ""
    assert "line 2, column tp" in result.stderr and "no such file" in result.stderr


def test_the_plot_is_one_page_that_loads_nothing_and_names_every_run(tmp_path: Path) -> None:
    page = tmp_path / "plot.html"
    result = run(str(REFERENCE), "--json", "--plot", str(page))
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"<svg", text)) == 2, "step time and peak memory"
    assert re.findall(r"(?:src|href)=[\"']https?:", text) == []
    for each in read_runs([REFERENCE]).runs:
        assert len(re.findall(f"<title>{each.id} [^<]*predicted", text)) == 2, "beside the pointer, in both"
    assert "torch-reference" in text and "role-legend" not in text, "one framework needs no legend"
    for words in ("<h2>Errors</h2>", "<h2>Choices</h2>", "<h2>Verdicts</h2>", "mean error"):
        assert words in text


def test_ticks_are_round_and_within_their_range() -> None:
    assert log_ticks(0.06, 1.2) == pytest.approx([0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0])
    assert log_ticks(0.09, 110.0) == pytest.approx([0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0])
    assert log_ticks(0.9, 1e8) == pytest.approx([10.0**n for n in range(9)])


def test_the_page_shows_the_worst_choice_first_and_escapes_groups() -> None:
    good = [dataclasses.replace(row(n, p, p), group="good") for n, p in (("a", 1.0), ("b", 2.0))]
    bad = [dataclasses.replace(row(n, p, 3 - p), group="<bad>") for n, p in (("c", 1.0), ("d", 2.0))]
    page = scatter_page(judge([*good, *bad]))
    assert page.index("&lt;bad&gt;") < page.index("<td>good</td>") and "100.0%" in page


def test_a_framework_is_escaped_on_the_page() -> None:
    bad = dataclasses.replace(row("a", 1.0, 1.0), framework="<script>alert(1)</script>")
    assert "<script>" not in scatter_page(judge([bad]))


def test_a_profile_with_layers_counts_for_its_own_device_alone() -> None:
    from planner.hardware.catalog import profile_files
    from planner.profile.profile import load_profile

    file = next(file for file in profile_files() if load_profile(file).layers)
    device = load_profile(file).device
    choice = profile_choice(file)
    assert choice(device) is not None and choice("h100-sxm-80gb") is None
    assert profile_choice(None)("h100-sxm-80gb") is None or device != "h100-sxm-80gb"


# The bench


@pytest.mark.parametrize("chosen", accuracy.SETS, ids=lambda chosen: chosen.name)
def test_what_is_fitted_on_never_holds_a_key_of_what_is_predicted(chosen: accuracy.RunSet) -> None:
    runs, also = accuracy.load_set(chosen)
    predicted = Counter(run.id for _, held in accuracy.splits(runs, chosen) for run in held)
    times = len(accuracy.parts_of(runs, chosen)) - 1 if chosen.narrow else 1
    wanted = {run.id for run in runs if chosen.keep(run) not in chosen.fit_only}
    assert predicted == dict.fromkeys(wanted, times) and wanted
    for fit, held in accuracy.splits(runs, chosen):
        assert not {chosen.keep(run) for run in (*fit, *also)} & {chosen.keep(run) for run in held}
        assert fit and held


def test_the_naive_rule_is_its_formula() -> None:
    (first, *_) = read_runs([DATA / "small_gpt.csv"]).runs
    setup = run_problem(dataclasses.replace(first, pp=2, dp=32, micro_batch=4), None)
    assert isinstance(setup, RunSetup)
    model, tokens = setup.problem.model, 512 * 2048
    attention = 30 * 2 * 2 * 3072 * (2048 + 1) / 2
    flops = tokens * (6 * model.params_total + 3 * attention) * 4 / 3
    assert accuracy.naive_time_s(setup) == pytest.approx(flops / (0.5 * 312e12 * 64) * (4 + 1) / 4)
