"""`plan check`: a true plan holds; each kind of damage is found by the check that is about it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.cost.evaluate import CostModel
from planner.foundation.units import GIB
from planner.hardware.catalog import load_model
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import PlanningProblem
from planner.model.workload import Workload
from planner.search.solve import make_plan
from planner.strategy.plan import Certificate, Plan, decode_plan, encode_plan, load_plan, save_plan
from planner.strategy.plan_check import check_plan
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages


@pytest.fixture(scope="module")
def plan() -> Plan:
    """llama-3-8b over tensor, pipeline and data parallelism, evaluated but not searched."""
    problem = PlanningProblem(
        model=load_model("llama-3-8b"),
        workload=Workload(seq=2048, batch=16),
        cluster=parse_cluster("2x8:h100"),
        profile=None,
        memory_limit_bytes=78 * GIB,
    )
    degrees = Degrees(tp=4, pp=2, dp_shard=2, zero=Zero.OPTIMIZER, num_micro_batches=8)
    evaluation = CostModel(problem).evaluate(Strategy(degrees=degrees, stages=even_stages(32, 2)))
    step_s = evaluation.estimate.step_time_s
    certificate = Certificate(
        status="optimal",
        objective_s=step_s,
        lower_bound_s=step_s * 0.99,
        gap=0.01,
        wall_s=1.0,
        shapes=1,
        pruned=0,
        milps=1,
        verified=True,
    )
    return make_plan(problem, evaluation, certificate, {"memory": 3}, ())


def broken(plan: Plan, change: Callable[[Any], None]) -> list[str]:
    """Names of the checks that fail after `change` of the plan's JSON."""
    document = json.loads(json.dumps(encode_plan(plan)))
    change(document)
    return [check.name for check in check_plan(decode_plan(document, source="plan.json")) if not check.holds]


def put(path: str, value: Any) -> Callable[[Any], None]:
    """Sets the value at a dotted path."""

    def change(document: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for parent in parents:
            document = document[parent]
        document[last] = value

    return change


def test_a_true_plan_holds_in_memory_and_from_its_file(plan: Plan, tmp_path: Path) -> None:
    assert [check.faults for check in check_plan(plan)] == [()] * 8
    save_plan(plan, tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == plan
    assert all(check.holds for check in check_plan(again))


@pytest.mark.parametrize(
    ("path", "value", "check"),
    [
        ("stages.0.layers", [0, 15], "rules"),
        ("stages.1.layers", [15, 32], "rules"),
        ("stages.1.recompute.none", 3, "rules"),
        ("strategy.tp", 3, "rules"),
        ("workload.batch", 17, "rules"),
        ("ranks.shape", [2, 1, 2, 1, 1, 2], "rank grid"),
        ("ranks.axes", ["tp", "pp", "dp_replicate", "dp_shard", "cp", "ep"], "rank grid"),
        ("schedule_table.0.0", "1F0", "schedule table"),
        ("schedule_table.0.0", "0F7", "schedule table"),
        ("schedule_table.0.0", "0B0", "schedule table"),
        ("schedule_table.0.0", "banana", "schedule table"),
        ("schedule_table.0", ["0F0"], "schedule table"),
        ("schedule_table", [], "schedule table"),
        ("estimate.breakdown.compute_s", 99.0, "estimate"),
        ("estimate.tokens_per_s", 1.0, "estimate"),
        ("estimate.peak_memory_bytes", 1, "estimate"),
        ("estimate.step_time_interval_s", [0.0, 1e-9], "estimate"),
        ("estimate.memory_limit_bytes", 1, "estimate"),
        ("solver.objective_s", 1e-6, "certificate"),
        ("solver.lower_bound_s", 1e6, "certificate"),
        ("solver.verified", False, "certificate"),
        ("model.spec.vocab", 128257, "digests"),
        ("cluster.inter.latency_s", 1.0, "digests"),
        ("workload.tokens", 5, "digests"),
        ("inputs.digests", {}, "digests"),
    ],
)
def test_damage_is_found_by_its_check(plan: Plan, path: str, value: Any, check: str) -> None:
    assert check in broken(plan, put(path, value))


def test_the_command_prints_the_checks_and_exits_4_on_a_fault(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    save_plan(plan, file)
    good = CliRunner().invoke(cli, ["check", str(file)])
    assert good.exit_code == 0 and good.stdout.count("holds") == 8
    document = json.loads(file.read_text())
    put("model.spec.vocab", 128257)(document)
    file.write_text(json.dumps(document))
    bad = CliRunner().invoke(cli, ["check", str(file)])
    assert bad.exit_code == 4
    assert "the model was changed" in bad.stdout and "digests" in bad.stderr
    report = json.loads(CliRunner().invoke(cli, ["check", str(file), "--json"]).stdout)
    assert not report["ok"] and len(report["checks"]) == 8


def test_solve_hands_out_no_certificate_that_does_not_hold(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [
        "solve",
        "--model",
        "llama-3-8b",
        "--cluster",
        "2x8:h100",
        "--seq",
        "2048",
        "--batch",
        "16",
        "-o",
    ]
    assert plan.solver is not None
    for factor, code in ((1.0, 0), (0.9, 4)):
        solver = dataclasses.replace(plan.solver, objective_s=factor * plan.solver.objective_s)
        answer = dataclasses.replace(plan, solver=solver)
        monkeypatch.setattr("planner.search.solve_for.solve_for", lambda *given, answer=answer: answer)
        done = CliRunner().invoke(cli, [*words, str(tmp_path / f"{code}.json")])
        assert done.exit_code == code
        assert (tmp_path / f"{code}.json").exists() is (code == 0)
