"""`plan explain`, `plan diff` and the answer of `plan solve` without a plan, on the command line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from planner.advice import repairs
from planner.advice.resolve import Effort
from planner.cli import cli
from planner.commands.shared.infeasible import INFEASIBLE_EXIT, LEAST_SHARE, tell_infeasible
from planner.job.problem import PlanningProblem
from planner.search.solve import SolveOptions
from planner.strategy.fixed_choices import FixedChoices, parse_fixed_choices
from tests.planner.catalog_problems import problem

ASKED = ("--model", "gpt2", "--cluster", "1x2:a100-sxm-40gb", "--seq", "1024", "--batch", "8")
TOO_LARGE = ("--model", "llama-3-8b", "--cluster", "1x2:a100-sxm-40gb", "--seq", "2048", "--batch", "8")
COLUMNS = 100


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="plan")


def run_json(*arguments: str, code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The best plan, and the best of two stages."""
    folder = tmp_path_factory.mktemp("plans")
    files = (str(folder / "best.json"), str(folder / "piped.json"))
    for file, fixes in zip(files, ((), ("--fix", "pp=2")), strict=True):
        result = run("solve", *ASKED, *fixes, "--time-limit", "3", "-o", file)
        assert result.exit_code in (0, 5), result.output
    return files


def test_explain_says_what_binds_and_what_more_buys(plans: tuple[str, str]) -> None:
    result = run("explain", plans[0], "--time-limit", "0.5")
    assert result.exit_code == 0, result.output
    for said in ("what binds", "compute", "headroom", "what more would buy", "one more node", "runners-up"):
        assert said in result.stdout
    labels = [line for line in result.stdout.splitlines() if len(line) > COLUMNS]
    assert not labels


def test_explain_json_has_every_part_and_adds_up(plans: tuple[str, str]) -> None:
    document = run_json("explain", plans[0], "--time-limit", "0.5")
    written = json.loads(Path(plans[0]).read_text())
    assert document["step_time_s"] == pytest.approx(written["estimate"]["step_time_s"])
    assert sum(bind["seconds"] for bind in document["binds"]) == pytest.approx(document["step_time_s"])
    assert {more["change"] for more in document["more"]} >= {"1 GiB more a device", "batch twice as large"}
    assert len(document["runners_up"]) == len(written["alternatives"])
    assert document["stages"][0]["memory"]["total_bytes"] > 0
    assert "shipped" in document["basis"] or "datasheet" in document["basis"]


def test_why_not_answers_each_choice(plans: tuple[str, str]) -> None:
    asked = ("tp=1", "pp=2", "ep=2", "recompute=full")
    flags = [word for choice in asked for word in ("--why-not", choice)]
    document = run_json("explain", plans[0], *flags, "--time-limit", "0.5")
    answers = {each["choice"]: each for each in document["why_not"]}
    assert tuple(answers) == asked
    assert answers["tp=1"]["answer"] == "own"
    assert answers["pp=2"]["answer"] == "slower" and answers["pp=2"]["slower"] > 0
    assert answers["pp=2"]["strategy"]["pp"] == 2
    assert answers["ep=2"]["answer"] == "infeasible" and answers["ep=2"]["legal"] == ["1"]
    assert answers["ep=2"]["binding"]["rule"] == "ep_needs_experts"
    assert "more" not in document
    text = run("explain", plans[0], *flags, "--time-limit", "0.5").stdout
    assert "is the plan's own choice" in text and "slower" in text and "nearest first" in text


def test_wrong_choices_are_exit_2_all_at_once(plans: tuple[str, str]) -> None:
    result = run("explain", plans[0], "--why-not", "tpp=2", "--why-not", "zero=9", "--why-not", "x")
    assert result.exit_code == 2 and result.stdout == ""
    assert "Did you mean tp?" in result.stderr and "Legal here: 3, 2, 1, 0" in result.stderr
    assert len(result.stderr.splitlines()) == 3


def test_the_front_is_a_table_and_a_document(plans: tuple[str, str]) -> None:
    document = run_json("explain", plans[0], "--pareto", "--time-limit", "0.5")["pareto"]
    needs = [point["needed_bytes"] for point in document["plans"]]
    assert needs == sorted(needs, reverse=True) and needs[-1] == document["infeasible_below_bytes"]
    assert "no plan is feasible" in run("explain", plans[0], "--pareto", "--time-limit", "0.5").stdout


def test_another_profile_is_said(plans: tuple[str, str], tmp_path: Path) -> None:
    """A plan made without a profile, explained by one, and the reverse."""
    written = json.loads(Path(plans[0]).read_text())
    written["inputs"]["digests"]["profile"] = "sha256:0"
    file = tmp_path / "other.json"
    file.write_text(json.dumps(written))
    assert "made with another" in run_json("explain", str(file), "--why-not", "tp=1")["basis"]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"tp": 3}, "world_size"), ({"micro_batch": 3}, "batch_divides")],
)
def test_a_plan_that_breaks_rules_is_exit_2(
    plans: tuple[str, str], tmp_path: Path, change: dict[str, int], said: str
) -> None:
    written = json.loads(Path(plans[0]).read_text())
    written["strategy"] |= change
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(written))
    result = run("explain", str(file))
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.output


def test_diff_states_which_is_faster(plans: tuple[str, str]) -> None:
    result = run("diff", *plans)
    assert result.exit_code == 0, result.output
    assert "A is faster" in result.stdout and "mostly" in result.stdout
    assert "step time by cause" in result.stdout and "certificate" in result.stdout
    document = run_json("diff", *plans)
    assert document["faster"] == 1 and document["ratio"] > 1
    assert {each["path"] for each in document["strategy"]} >= {"pp"}
    assert "equally fast" in run("diff", plans[0], plans[0]).stdout


def test_diff_of_estimates_has_no_certificate(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{number}.json") for number in range(2)]
    for file, zero in zip(files, ("1", "3"), strict=True):
        assert run("estimate", *ASKED, "--fix", f"zero={zero}", "-o", file).exit_code == 0
    document = run_json("diff", *files)
    assert document["certificate"] == []
    assert [each["path"] for each in document["strategy"]] == ["zero"]
    assert run("explain", files[0], "--why-not", "zero=3", "--time-limit", "0.5").exit_code == 0


def test_a_plan_that_does_not_fit_is_explained_as_such(tmp_path: Path) -> None:
    file = str(tmp_path / "no.json")
    assert run("estimate", *TOO_LARGE, "--fix", "zero=1", "-o", file).exit_code == 0
    result = run("explain", file)
    assert result.exit_code == 0, result.output
    assert "exceeds the" in result.stdout and "No SAFE plan is known" in result.stdout
    front = run("explain", file, "--pareto", "--why-not", "recompute=full")
    assert front.exit_code == 0, front.output
    assert "No plan is SAFE within the limit" in front.stdout and "breaks memory" in front.stdout


def test_an_infeasible_problem_is_answered(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    document = run_json("solve", *TOO_LARGE, "--time-limit", "4", "-o", str(plan), code=3)
    assert not plan.exists()
    assert document["solver"]["status"] == "infeasible"
    bound = document["binding"]
    assert bound["rule"] == "memory"
    assert bound["short_bytes"] == bound["needed_bytes"] - bound["limit_bytes"] > 0
    assert "weights, gradients and optimizer state alone take" in bound["detail"]
    assert 0 < len(document["repairs"]) <= 3
    for repair in document["repairs"]:
        assert repair["verified"] and repair["flag"] and repair["change"] and repair["strategy"]["tp"] >= 1
    costs = [repair["device_seconds_per_token"] for repair in document["repairs"]]
    assert costs == sorted(costs)
    assert sum(document["rejected"].values()) == document["solver"]["shapes"]


def test_a_repair_works_as_typed() -> None:
    document = run_json("solve", *TOO_LARGE, "--time-limit", "4", code=3)
    flags = [repair["flag"] for repair in document["repairs"] if repair["flag"].startswith("--")]
    assert flags
    name, _, value = flags[0].partition(" ")
    arguments = dict(zip(TOO_LARGE[::2], TOO_LARGE[1::2], strict=True)) | {name: value}
    typed = [word for pair in arguments.items() for word in pair]
    assert run("solve", *typed, "--time-limit", "2").exit_code in (0, 5)


def test_an_infeasible_text_names_rule_shortfall_and_repairs() -> None:
    result = run("solve", *ASKED, "--fix", "tp=2", "--fix", "dp=2")
    assert result.exit_code == 3
    assert "binding   world_size" in result.stdout and "cheapest first" in result.stdout
    assert "verified" in result.stdout
    assert "no feasible plan" in result.stderr and "Traceback" not in result.output
    assert all(len(line) <= COLUMNS for line in result.stdout.splitlines())


def test_an_infeasible_answer_without_a_clock_is_the_same_twice() -> None:
    asked = ("solve", *ASKED, "--fix", "dp=2", "--fix", "micro_batch=3", "--reproducible")
    first, second = run_json(*asked, code=3), run_json(*asked, code=3)
    assert first == second and first["repairs"]


@pytest.mark.parametrize("used_s", [0.0, 100.0])
def test_an_infeasible_answer_has_what_the_search_left_of_the_time(
    used_s: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    efforts, answer = [], repairs.why_infeasible

    def noted(problem: PlanningProblem, pins: FixedChoices, effort: Effort) -> repairs.Infeasible:
        efforts.append(effort)
        return answer(problem, pins, effort)

    monkeypatch.setattr(repairs, "why_infeasible", noted)
    options = SolveOptions(pins=parse_fixed_choices(("tp=2", "dp=2")), time_limit_s=4.0)
    asked = problem("gpt2", "1x2:a100-sxm-40gb", 1024, 8)
    assert tell_infeasible(asked, options, time.monotonic() - used_s, as_json=True) == INFEASIBLE_EXIT
    (effort,) = efforts
    least_s, most_s = (3.0, 4.0) if used_s == 0 else (LEAST_SHARE * 4.0,) * 2
    assert effort.total_s is not None and least_s <= effort.total_s <= most_s
    assert json.loads(capsys.readouterr().out)["binding"]["rule"] == "world_size"
