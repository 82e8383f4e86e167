"""`plan solve` and `plan estimate` with --engine, --max-tp, --objective, --deadline and --budget."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from planner.cli import cli
from planner.commands.shared.goal import read_deadline_s, read_usd
from planner.foundation.errors import InputError
from planner.search.layout_search import Budget, ShapeResult, ShapeSearch

MODEL = ("--model", "tinyllama-1.1b", "--seq", "1024", "--batch", "32")
PRICED = (*MODEL, "--cluster", "2*p5.48xlarge", "--tokens", "1B")
FIXED = ("--fix", "pp=1", "--fix", "recompute=none", "--fix", "micro_batch=2")
FEW = (*FIXED, "--fix", "sequence_parallel=false")
"""Small spaces, so that a search takes no time."""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="plan")


def solved(*arguments: str) -> Any:
    result = run("solve", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 2_592_000), ("1.5", 129_600), ("30d", 2_592_000), (" 12h ", 43_200), ("2w", 1_209_600)],
)
def test_deadlines(text: str, seconds: float) -> None:
    assert read_deadline_s(text) == seconds


@pytest.mark.parametrize("text", ["0", "0d", "-3", "soon", "", "nan", "1e40", "3 moons"])
def test_wrong_deadlines(text: str) -> None:
    with pytest.raises(InputError, match="--deadline"):
        read_deadline_s(text)


@pytest.mark.parametrize(
    ("text", "usd"), [("50000", 5e4), ("$50,000", 5e4), ("1.5M", 1.5e6), ("99.5", 99.5), ("20K", 2e4)]
)
def test_budgets(text: str, usd: float) -> None:
    assert read_usd(text) == usd


@pytest.mark.parametrize("text", ["0", "-5", "lots", "", "nan", "inf", "1e30", "5 euros"])
def test_wrong_budgets(text: str) -> None:
    with pytest.raises(InputError, match="--budget"):
        read_usd(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--objective", "speed"), ("'time', 'cost'",)),
        (("--engine", "jax"), ("torchtitan", "megatron")),
        (("--max-tp", "0"), ("--max-tp",)),
        (
            ("--objective", "cost"),
            ("--objective cost", "--tokens", "COUNT*INSTANCE", "--prices", "--on-premises"),
        ),
        (("--budget", "5000"), ("--budget", "--tokens", "--prices")),
        (("--deadline", "30"), ("--deadline", "--tokens")),
        (("--deadline", "soon", "--budget", "none"), ("'soon'", "'none'", "such as 30d", "$50,000")),
    ],
)
def test_wrong_use_is_told_with_its_cure(arguments: tuple[str, ...], said: tuple[str, ...]) -> None:
    """Exit code 2; the cluster has no price, and no tokens are given."""
    result = run("solve", *MODEL, "--cluster", "2x8:h100", *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert all(words in result.stderr for words in said), result.stderr


def test_all_that_is_missing_for_dollars_is_told_at_once() -> None:
    result = run("solve", *MODEL, "--cluster", "2x8:h100", "--objective", "cost", "--deadline", "x")
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 3


def test_least_cost_uses_the_nodes_that_pay(tmp_path: Path) -> None:
    """plan.json and the text name the objective and the nodes that are left unused."""
    cost = solved(*PRICED, *FEW, "--objective", "cost")
    time = solved(*PRICED, *FEW)
    objective = cost["objective"]
    assert objective["minimise"] == "cost" and objective["offered"] == "2*aws/p5.48xlarge"
    assert objective["nodes"] + objective["nodes_unused"] == 2
    assert cost["estimate"]["cost_usd"] <= time["estimate"]["cost_usd"]
    assert "objective" not in time and "engine" not in time
    path = tmp_path / "plan.json"
    text = run("solve", *PRICED, *FEW, "--objective", "cost", "-o", str(path)).stdout
    assert "least cost" in text and "1 left unused" in text and "whole run" in text
    assert run("check", str(path)).exit_code == 0


def test_a_deadline_and_a_budget_that_no_plan_meets() -> None:
    late = run("solve", *PRICED, *FEW, "--objective", "cost", "--deadline", "1s")
    assert late.exit_code == 3 and "the fastest plan takes" in late.stderr and "too long" in late.stderr
    dear = run("solve", *PRICED, *FEW, "--budget", "0.01")
    assert dear.exit_code == 3 and "the cheapest plan takes" in dear.stderr and "too much" in dear.stderr
    fine = solved(*PRICED, *FEW, "--deadline", "30", "--budget", "1M")
    assert fine["objective"]["deadline_days"] == 30 and fine["objective"]["budget_usd"] == 1e6


@pytest.mark.parametrize("engine", ["native", "torchtitan", "megatron", "deepspeed"])
def test_a_plan_for_an_engine_names_it(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    result = run("solve", *MODEL, "--cluster", "2x8:h100", *FIXED, "--engine", engine, "-o", str(path))
    assert result.exit_code == 0, result.output
    assert re.search(rf"^engine +{engine}$", result.stdout, re.MULTILINE)
    assert "priced as" in result.stdout
    assert json.loads(path.read_text())["engine"] == engine
    assert run("check", str(path)).exit_code == 0


def test_engines_have_prices_of_their_own() -> None:
    """The same strategy takes another time in another engine."""
    strategy = ("--fix", "tp=2", "--fix", "pp=2", "--fix", "sequence_parallel=true", "--fix", "zero=1")
    seen = {}
    for engine in ("native", "megatron"):
        arguments = (*MODEL, "--cluster", "2x8:h100", *strategy, "--engine", engine)
        result = run("estimate", *arguments, "--json")
        assert result.exit_code == 0, result.output
        seen[engine] = json.loads(result.stdout)["estimate"]["step_time_s"]
    assert seen["native"] != seen["megatron"]


@pytest.mark.parametrize(
    ("engine", "fixed", "rule"),
    [
        ("deepspeed", ("pp=2", "zero=3"), "deepspeed_pipeline_sharding"),
        ("megatron", ("pp=2", "schedule=gpipe"), "megatron_schedule"),
        ("torchtitan", ("zero=1",), "torchtitan_sharding"),
        ("deepspeed", ("recompute=selective",), "deepspeed_recompute"),
    ],
)
def test_estimate_refuses_what_an_engine_cannot_run(engine: str, fixed: tuple[str, ...], rule: str) -> None:
    pins = [word for text in fixed for word in ("--fix", text)]
    result = run("estimate", *MODEL, "--cluster", "2x8:h100", *pins, "--engine", engine, "--json")
    assert result.exit_code == 3
    violations = {each["rule"]: each for each in json.loads(result.stdout)["violations"]}
    assert rule in violations and violations[rule]["legal"] and violations[rule]["fix"]


def test_estimate_takes_the_engines_own_defaults() -> None:
    """torchtitan's tensor parallelism shards the sequence, DeepSpeed's context parallelism is Ulysses."""
    base = ("estimate", *MODEL, "--cluster", "1x8:h100", "--json")
    titan = run(*base, "--engine", "torchtitan", "--fix", "tp=2", "--fix", "zero=3")
    assert json.loads(titan.stdout)["strategy"]["sequence_parallel"] is True
    ulysses = run(*base, "--engine", "deepspeed", "--fix", "cp=2", "--fix", "zero=1")
    assert json.loads(ulysses.stdout)["strategy"]["cp_exchange"] == "all_to_all"
    plain = run(*base, "--fix", "tp=2", "--fix", "zero=1")
    assert json.loads(plain.stdout)["strategy"]["sequence_parallel"] is False


def test_solve_gives_context_parallelism_the_engines_way() -> None:
    few = (*MODEL, "--cluster", "1x8:h100", *FEW, "--fix", "cp=2", "--fix", "tp=1")
    assert solved(*few, "--engine", "deepspeed")["strategy"]["cp_exchange"] == "all_to_all"
    assert solved(*few, "--engine", "torchtitan")["strategy"]["cp_exchange"] == "gather"


def test_an_engine_that_cannot_train_the_model_says_so() -> None:
    result = run(
        "solve", *MODEL, "--cluster", "1x8:h100", *FEW, "--optimizer", "muon", "--engine", "megatron"
    )
    assert result.exit_code == 3
    assert "binding   megatron_optimizer" in result.stdout and "adamw or sgd" in result.stdout


def test_max_tp_limits_the_plan() -> None:
    few = (*MODEL, "--cluster", "1x8:h100", *FIXED)
    document = solved(*few, "--max-tp", "2")
    assert document["strategy"]["tp"] <= 2 and document["rejected"]["max_tp"] > 0
    refused = run("solve", *few, "--max-tp", "2", "--fix", "tp=4")
    assert refused.exit_code == 3
    assert "binding   max_tp" in refused.stdout and "tp=4 is above the --max-tp 2" in refused.stdout


@pytest.mark.parametrize(
    "extra",
    [(), ("--objective", "cost", "--deadline", "30"), ("--engine", "torchtitan"), ("--engine", "deepspeed")],
    ids=["time", "cost", "torchtitan", "deepspeed"],
)
def test_reproducible_plans_do_not_depend_on_the_process(extra: tuple[str, ...], tmp_path: Path) -> None:
    """The same inputs give the same bytes in processes whose hashes differ."""
    few = ("--fix", "pp=2", "--fix", "micro_batch=2", "--fix", "tp=1")
    written = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.json"
        command = [sys.executable, "-m", "planner.cli", "solve", *PRICED, *few, *extra, "--reproducible"]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([*command, "-o", str(path)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        written.append((path.read_bytes(), done.stdout))
    assert written[0] == written[1]


def test_a_plan_for_this_machine_is_one_that_it_trains() -> None:
    """On a local cluster solve is held to the native engine, says so, and yields to --engine."""
    asked = ("--model", "shardwise-demo", "--cluster", "local:2", "--seq", "256", "--batch", "16")
    document = solved(*asked)
    assert document["engine"] == "native"
    assert document["strategy"]["cp"] == document["strategy"]["ep"] == 1
    text = run("solve", *asked).stdout
    assert "plans that `plan train` runs on this machine (--engine any for all)" in " ".join(text.split())
    assert solved(*asked, "--engine", "torchtitan")["engine"] == "torchtitan"


def test_what_this_machine_cannot_train_is_refused_there_and_planned_elsewhere() -> None:
    """Windows of attention do not go round a ring of the native runtime."""
    fixes = ("pp=1", "cp=2", "cp_exchange=ring")
    pinned = ("--model", "gemma-3-270m", "--seq", "256", "--batch", "16", *(f"--fix={fix}" for fix in fixes))
    held = run("solve", *pinned, "--cluster", "local:2")
    assert held.exit_code == 3 and "native_context" in held.stdout
    assert "engine" not in solved(*pinned, "--cluster", "1x2:h100")
    assert "engine" not in solved(*pinned, "--cluster", "local:2", "--engine", "any")


def test_a_wider_gap_ends_the_search_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """--gap is what the proof may leave open: at 0 more shapes are searched, and the plan is no slower."""
    asked = ("--model", "gpt2", "--cluster", "1x4:h100", "--seq", "512", "--batch", "16", "--fix", "tp=1")
    searched: list[float] = []

    def run_shape(search: ShapeSearch, budget: Budget, run: Any = ShapeSearch.run) -> ShapeResult:
        searched.append(budget.tolerance)
        return run(search, budget)  # type: ignore[no-any-return]

    monkeypatch.setattr(ShapeSearch, "run", run_shape)
    exact, loose = (solved(*asked, "--gap", gap) for gap in ("0", "0.5"))
    assert searched.count(0.0) > searched.count(0.5)
    assert exact["estimate"]["step_time_s"] <= loose["estimate"]["step_time_s"]
    assert exact["solver"]["lower_bound_s"] > loose["solver"]["lower_bound_s"]
    wrong = run("solve", *asked, "--gap", "2")
    assert wrong.exit_code == 2 and "--gap" in wrong.output
