"""What runs tell of blocks besides constants: the same block takes the same time in every run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.calibration.calibrate import TIME_ERROR, calibrate, usable
from planner.calibration.runs import Run
from planner.calibration.validate import Validation, validate
from planner.cli import cli
from planner.cost import evaluate
from planner.cost.constants import problem_time_constants
from planner.cost.evaluate import NINE_IN_TEN, CostModel
from planner.cost.layer import LayerShape
from planner.cost.stage.layer_cost import LayerModel, block_shape
from planner.foundation.decode import encode
from planner.foundation.errors import InputError
from planner.job.problem import PlanningProblem
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.profile.profile import BlockResidual, BlockResiduals, Constant, LayerKind, Profile, load_profile
from planner.strategy.strategy import Degrees, Schedule, Strategy, Zero, even_stages
from tests.planner import instances
from tests.planner.calibration.test_calibration import (
    HEADER,
    TRUTH,
    empty,
    grid,
    made_by,
    quiet,
    read_runs,
    time_of,
)

SLOW = 0.2
"""ln of the time over its price that a block takes here where tp is 2 and a rank has two sequences."""


def shape(**changes: object) -> LayerShape:
    usual = LayerShape(
        kind=LayerKind.BLOCK, tp=2, sequence_parallel=False, micro_batch=2, seq=128, precision=Precision.BF16
    )
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def problem(told: float = SLOW, of: LayerShape | None = None, **scope: str) -> PlanningProblem:
    """A problem of whose blocks many runs told at one shape."""
    plain = instances.problem()
    residual = BlockResidual(
        shape=block_shape(plain.model.segments[0].block, of or shape(), plain), log_ratio=told, weight=1e4
    )
    residuals = BlockResiduals(spread=0.2, noise=0.02, told=(residual,), **scope)
    return dataclasses.replace(plain, profile=instances.profile(residuals=(residuals,)))


def ratio(of: PlanningProblem, asked: LayerShape) -> float:
    """The time of a layer over what it is without what runs told."""
    both = [
        LayerModel(p, problem_time_constants(p)).cost(asked)
        for p in (of, dataclasses.replace(of, profile=None))
    ]
    told, priced = (cost.forward_s + cost.backward_s for cost in both)
    return told / priced


def test_a_shape_that_ran_takes_what_its_runs_tell() -> None:
    assert ratio(problem(), shape()) == pytest.approx(math.exp(SLOW), rel=1e-3)
    assert ratio(problem(-SLOW), shape()) == pytest.approx(math.exp(-SLOW), rel=1e-3)


@pytest.mark.parametrize("changes", [{"tp": 1}, {"micro_batch": 4}, {"seq": 256, "micro_batch": 1}])
def test_shapes_an_octave_away_are_told_of_by_half(changes: dict[str, object]) -> None:
    assert 1.05 < ratio(problem(), shape(**changes)) < math.exp(0.6 * SLOW)


@pytest.mark.parametrize("changes", [{"tp": 16}, {"micro_batch": 64}])
def test_shapes_unlike_all_that_ran_keep_their_price(changes: dict[str, object]) -> None:
    assert ratio(problem(), shape(**changes)) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("kind", [LayerKind.EMBEDDING, LayerKind.HEAD])
def test_the_ends_of_a_model_are_no_blocks(kind: LayerKind) -> None:
    assert ratio(problem(), shape(kind=kind)) == 1.0


def test_recomputation_is_another_kind_and_never_quicker_than_none() -> None:
    full = shape(recompute=Recompute.FULL)
    assert ratio(problem(), full) == pytest.approx(math.exp(SLOW / 2), rel=1e-3)
    quick = problem(-1.0, of=full)
    assert ratio(quick, full) < 0.85
    layers = LayerModel(quick, problem_time_constants(quick))
    whole, none = layers.cost(full), layers.cost(shape())
    assert whole.forward_s == pytest.approx(none.forward_s) and whole.backward_s >= none.backward_s


def test_the_narrowest_scope_speaks_even_where_it_tells_nothing() -> None:
    of = problem()
    assert of.profile is not None
    silent = BlockResiduals(spread=0.1, noise=0.02, told=(), device=of.device.name)
    narrow = dataclasses.replace(of.profile, residuals=(*of.profile.residuals, silent))
    assert ratio(dataclasses.replace(of, profile=narrow), shape()) == 1.0
    other = dataclasses.replace(silent, device="another")
    wide = dataclasses.replace(of.profile, residuals=(*of.profile.residuals, other))
    assert ratio(dataclasses.replace(of, profile=wide), shape()) > 1.2


@pytest.mark.parametrize(("micro_batch", "doubt"), [(2, 0.01), (64, 0.2)])
def test_blocks_unlike_all_that_ran_widen_the_interval(micro_batch: int, doubt: float) -> None:
    of = problem()
    assert of.profile is not None
    known = Constant(name=TIME_ERROR, value=0.05, origin="told")
    scale = Constant(name="tp_scale", value=1.0, origin="told")
    told = dataclasses.replace(of, profile=dataclasses.replace(of.profile, constants=(known, scale)))
    degrees = Degrees(
        tp=2, pp=1, dp_replicate=1, dp_shard=2, zero=Zero.NONE, micro_batch=micro_batch, num_micro_batches=1,
        sequence_parallel=False, schedule=Schedule.ONE_F_ONE_B,
    )  # fmt: skip
    strategy = Strategy(degrees=degrees, stages=even_stages(of.model.layers, 1))
    estimate = CostModel(told).evaluate(strategy).estimate
    width = (estimate.step_time_interval_s[1] / estimate.step_time_s - 1) / estimate.coverage.fitted
    assert estimate.coverage.fitted > 0
    assert width == pytest.approx(math.hypot(0.05, NINE_IN_TEN * doubt), rel=0.1)


# From runs


def models(tmp_path: Path) -> list[Run]:
    """Layouts of three models of one width, each a group, whose step times are still to be made."""
    lines = [HEADER]
    for layers in (16, 24, 32):
        for tp, dp, micro_batch in (
            (1, 16, 1),
            (1, 16, 2),
            (2, 8, 1),
            (2, 8, 2),
            (2, 8, 4),
            (4, 4, 2),
            (8, 2, 2),
        ):
            lines.append(
                f"{len(lines)},L{layers},Megatron-LM,{layers},4096,16384,32,32,50304,false,true,2048,a100-sxm-80gb,"
                f"2,8,hdr200x8,bf16,flash,,{tp},1,{dp},1,none,{micro_batch},64,ok,1.0"
            )  # fmt: skip
    path = tmp_path / "models.csv"
    path.write_text("\n".join(lines) + "\n")
    return list(read_runs([path]).runs)


def slow_where(runs: list[Run]) -> list[Run]:
    """Their step times, blocks of tp 2 and two sequences being slower than any constant says."""
    measured, _ = usable(made_by(runs, TRUTH), None)
    found = []
    for run in measured:
        problem, degrees = run.setup.problem, run.setup.strategy.degrees
        layers = CostModel(problem).layout(degrees)
        told = [
            BlockResidual(
                shape=block_shape(problem.model.segments[0].block, layers.shape_of(LayerKind.BLOCK), problem),
                log_ratio=SLOW,
                weight=1e6,
            )
        ]
        slow = (degrees.tp, degrees.micro_batch) == (2, 2)
        residuals = (BlockResiduals(spread=0.2, noise=0.02, told=tuple(told)),) if slow else ()
        factor = time_of(run, dataclasses.replace(empty(), residuals=residuals)) / time_of(run, empty())
        found.append(dataclasses.replace(run.run, step_time_s=run.step_time_s * factor))
    return found


def worst(judged: Validation) -> float:
    return max(abs(row.error) for row in judged.rows if row.error is not None)


def test_other_models_of_the_same_blocks_are_predicted_with_what_runs_tell(tmp_path: Path) -> None:
    runs = slow_where(models(tmp_path))
    seen, unseen = [run for run in runs if run.layers != 24], [run for run in runs if run.layers == 24]
    found = calibrate(seen, name="seen", base=None, progress=quiet)
    (told,) = found.profile.residuals
    assert {(each.shape.tp, each.shape.tokens) for each in told.told if each.log_ratio > 0.1} == {(2, 4096)}
    without = dataclasses.replace(found.profile, residuals=())
    assert worst(validate(unseen, lambda device: without)) > 0.1
    assert worst(validate(unseen, lambda device: found.profile)) < 0.05
    plain = calibrate(seen, name="seen", blocks=False, progress=quiet)
    assert plain.profile.residuals == () and plain.blocks[0].left_out == found.fits[0].left_out
    fit, blocks = found.fits[0], found.blocks[0]
    assert max(map(abs, blocks.left_out)) < max(map(abs, fit.left_out)) / 2


def test_runs_that_constants_explain_tell_nothing_more(tmp_path: Path) -> None:
    found = calibrate(made_by(grid(tmp_path), TRUTH, noise=0.04), name="made", base=None, progress=quiet)
    assert found.profile.residuals == () and found.blocks[0].left_out == found.fits[0].left_out


def test_a_framework_whose_runs_tell_nothing_is_not_told_by_its_family(tmp_path: Path) -> None:
    plain = made_by(grid(tmp_path, framework="Megatron-Core"), TRUTH)
    found = calibrate([*slow_where(models(tmp_path)), *plain], name="both", progress=quiet)
    counts = {told.framework: len(told.told) for told in found.profile.residuals}
    assert counts["Megatron-LM"] == 7 and counts["Megatron-Core"] == 0 and counts[""] > 0


def test_what_a_base_profile_told_is_left_behind(tmp_path: Path) -> None:
    runs = slow_where(models(tmp_path))
    fresh = calibrate(runs, name="runs", base=None, progress=quiet).profile
    again = calibrate(
        runs, name="runs", base=dataclasses.replace(fresh, constants=()), progress=quiet
    ).profile
    assert (again.constants, again.residuals) == (fresh.constants, fresh.residuals)


def test_the_command_says_what_blocks_took_and_the_file_holds_it(tmp_path: Path) -> None:
    runs = slow_where(models(tmp_path))
    times = {run.id: run.step_time_s for run in runs}
    table, made = tmp_path / "slow.csv", (tmp_path / "models.csv").read_text().splitlines()
    rows = [f"{line.removesuffix(',1.0')},{times[line.split(',')[0]]}" for line in made[1:]]
    table.write_text("\n".join([made[0], *rows]) + "\n")
    profile = tmp_path / "profile.json"
    said = CliRunner().invoke(cli, ["calibrate", str(table), "-o", str(profile)])
    assert said.exit_code == 0, said.output
    assert "block shapes" in said.stdout and "with blocks" in said.stdout
    document = CliRunner().invoke(cli, ["calibrate", str(table), "-o", str(profile), "--json"])
    (fit,) = json.loads(document.stdout)["fits"]
    assert fit["blocks"]["shapes"] == 7 and fit["blocks"]["left_out_mape"] < fit["left_out_mape"]
    read = load_profile(profile)
    assert len(read.residuals[0].told) == 7
    assert worst(validate(runs, lambda device: read)) < 0.05


@pytest.mark.parametrize(("name", "value"), [("weight", 0.0), ("noise", -1.0), ("tokens", 0)])
def test_a_file_with_blocks_that_cannot_be_is_refused(tmp_path: Path, name: str, value: float) -> None:
    profile = problem().profile
    assert profile is not None
    document = json.loads(json.dumps(encode(profile)))
    (told,) = document["residuals"]
    holder = {"weight": told["told"][0], "noise": told, "tokens": told["told"][0]["shape"]}[name]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(document))
    assert load_profile(path) == profile
    holder[name] = value
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=rf"residuals\[0\].*{name} {value:g}"):
        load_profile(path)


def test_a_device_that_no_run_was_on_has_a_wider_interval(tmp_path: Path) -> None:
    runs = made_by(grid(tmp_path), TRUTH)
    profile: Profile = calibrate(runs, name="a100", base=None, progress=quiet).profile

    def width(device: str) -> float:
        ((run,), _) = usable([dataclasses.replace(runs[0], device=device)], profile)
        estimate = CostModel(run.setup.problem).evaluate(run.setup.strategy).estimate
        low, high = estimate.step_time_interval_s
        return (high - low) / estimate.step_time_s

    assert width("h100-sxm-80gb") > 2 * evaluate.TIME_ERROR["fitted"] - 1e-9
    assert width("a100-sxm-80gb") < evaluate.TIME_ERROR["fitted"]
