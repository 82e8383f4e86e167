"""Plans of the own runtime are priced as `plan train` runs them: blocks compiled wherever there is no CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.calibration.plan_row import plan_columns
from planner.calibration.run_log import read_log
from planner.cli import cli
from planner.commands.splitting.estimate import strategy_of
from planner.cost.evaluate import CostModel
from planner.job.engine_settings import EngineSettings, native_settings
from planner.job.problem import PlanningProblem
from planner.strategy.estimate import Estimate
from planner.strategy.fixed_choices import parse_fixed_choices
from planner.strategy.rules import broken_rules
from tests.planner.calibration.test_from_run import DEGREES, plan_on_h100, step, trained
from tests.planner.catalog_problems import problem
from tests.plans import make_plan, tiny_llama

GPU = problem("llama-3-8b", "1x8:h100-sxm-80gb", 8192, 64)
PINS = ("tp=1", "pp=1", "zero=2", "micro_batch=1", "recompute=none")


def estimate(of: PlanningProblem, *pins: str, compiled: bool) -> Estimate:
    of = dataclasses.replace(of, engine_settings=EngineSettings(compiled=compiled))
    strategy = strategy_of(of, parse_fixed_choices(pins))
    assert not broken_rules(of, strategy)
    return CostModel(of).evaluate(strategy).estimate


def test_every_road_to_a_problem_takes_the_same_prices() -> None:
    assert GPU.engine_settings == native_settings(GPU.cluster) == EngineSettings(compiled=True)
    assert problem("gpt2", "local:4", 256, 16).engine_settings == EngineSettings()
    mixed = problem("llama-3-8b", "1x8:a100-sxm-80gb+1x8:h100-sxm-80gb", 4096, 64)
    assert (
        mixed.engine_settings.compiled
        and problem("llama-3-8b", "1x8:h100", 8192, 64, engine="native").engine_settings.compiled
    )
    assert not problem("llama-3-8b", "1x8:h100", 8192, 64, engine="torchtitan").engine_settings.compiled
    assert (
        plan_on_h100().problem.engine_settings.compiled
        and not make_plan(tiny_llama(), DEGREES).problem.engine_settings.compiled
    )


def test_compiled_blocks_are_quicker_and_are_held_to_the_memory_of_eager_ones() -> None:
    eager, compiled = (estimate(GPU, *PINS, compiled=compiled) for compiled in (False, True))
    assert 0.85 * eager.step_time_s < compiled.step_time_s < 0.97 * eager.step_time_s
    assert compiled.peak_memory_bytes == eager.peak_memory_bytes


def test_experts_are_charged_as_eager() -> None:
    """The runtime compiles what is around them alone."""
    routed = problem("mixtral-8x7b", "2x8:h100-sxm-80gb", 4096, 32)
    pins = ("tp=2", "pp=1", "ep=8", "zero=3", "micro_batch=1", "recompute=full")
    assert estimate(routed, *pins, compiled=True) == estimate(routed, *pins, compiled=False)


@pytest.mark.parametrize(("engine", "told"), [("any", True), ("native", True), ("torchtitan", False)])
def test_the_figures_say_what_they_rest_on(engine: str, told: bool) -> None:
    asked = ("--model", "llama-3-8b", "--cluster", "1x8:h100-sxm-80gb", "--seq", "8192", "--batch", "64")
    fixed = [word for pin in PINS for word in ("--fix", pin)]
    result = CliRunner().invoke(cli, ["estimate", *asked, *fixed, "--engine", engine])
    assert result.exit_code == 0 and ("blocks compiled" in " ".join(result.output.split())) == told


def test_a_run_without_a_compiler_is_told_so() -> None:
    pytest.importorskip("torch")
    from runtime.parallel.recompute import run_eagerly

    assert "times are those of compiled ones" in (run_eagerly(plan_on_h100(), compiled=False) or "")
    assert run_eagerly(plan_on_h100(), compiled=True) is None
    assert run_eagerly(make_plan(tiny_llama(), DEGREES), compiled=False) is None


@pytest.mark.parametrize("said", [True, False, None])
def test_a_row_says_whether_its_blocks_were_compiled(tmp_path: Path, said: bool | None) -> None:
    """By the run's summary; where that says nothing, as the plan was priced."""
    folder = trained(tmp_path / "run", [step(number, 1.0) for number in range(8)])
    executed = {} if said is None else {"compiled": said}
    (folder / "summary.json").write_text(json.dumps({"executed": executed, "executed_differences": []}))
    assert read_log(folder, None).compiled is said
    table = tmp_path / "r.csv"
    done = CliRunner().invoke(cli, ["calibrate", "--from-run", str(folder), "-o", str(table)])
    assert done.exit_code == 0, done.output
    header, row = (line.split(",") for line in table.read_text().splitlines()[:2])
    assert row[header.index("compile")] == str(said is not False).lower()
    assert plan_columns(make_plan(tiny_llama(), DEGREES))[0]["compile"] is False
