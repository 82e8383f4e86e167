"""`plan calibrate`: a fit finds the constants that made the runs, and says what it cannot know."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.calibration.calibrate import TIME_ERROR, calibrate, scopes, usable
from planner.calibration.fit import MAX_RUNS, Scope, Unknown, evenly, fit
from planner.calibration.predict import Measured, step_time_s, with_constants
from planner.calibration.runs import Run, read_runs
from planner.cli import cli
from planner.cost.constants import TIME_SPECS, TimeConstants, time_constants_of
from planner.cost.evaluate import CostModel
from planner.foundation.errors import InputError
from planner.job.engine_settings import NATIVE, Engine, EngineSettings
from planner.profile.profile import PROFILE_SCHEMA, Constant, Profile, load_profile

REFERENCE = Path(__file__).parents[3] / "bench" / "data" / "h100_reference.csv"
HEADER = (
    "id,group,framework,layers,hidden,ffn,heads,kv_heads,vocab,gated_mlp,tied_embeddings,seq_len,device,nodes,"
    "gpus_per_node,network,precision,attention,fused_kernels,tp,pp,dp,zero,recompute,micro_batch,global_batch,"
    "status,step_time_s"
)
TRUTH = {"gemm_scale": 0.8, "tp_scale": 2.0, "elementwise_scale": 0.9, "action_s": 1e-3}


def empty() -> Profile:
    return Profile(
        schema_version=PROFILE_SCHEMA, name="none", device="", device_title="", backend="",
        created="", versions={}, devices_per_node=8, slots_per_node=None, layers=(),
        comms=(), contention=(), constants=(),
    )  # fmt: skip


def grid(tmp_path: Path, framework: str = "Megatron-LM", device: str = "a100-sxm-80gb") -> list[Run]:
    """Layouts of two models whose step times are still to be made."""
    lines = [HEADER]
    for layers, hidden, heads in ((24, 2048, 16), (32, 4096, 32)):
        for tp, pp, micro_batch in (
            (1, 1, 1),
            (1, 2, 2),
            (2, 1, 4),
            (2, 4, 1),
            (4, 2, 2),
            (8, 1, 1),
            (4, 1, 4),
        ):
            for recompute in ("none", "full"):
                dp = 16 // tp // pp
                lines.append(
                    f"{len(lines)},h{hidden}-{recompute},{framework},{layers},{hidden},{4 * hidden},{heads},"
                    f"{heads},50304,false,true,2048,{device},2,8,hdr200x8,bf16,flash,,{tp},{pp},{dp},1,{recompute},"
                    f"{micro_batch},64,ok,1.0"
                )
    path = tmp_path / "grid.csv"
    path.write_text("\n".join(lines) + "\n")
    return list(read_runs([path]).runs)


def time_of(run: Measured, profile: Profile) -> float:
    """A run's step time in closed form, by a profile's constants."""
    model = CostModel(dataclasses.replace(run.setup.problem, profile=profile))
    return step_time_s(model, run.setup.strategy)


def made_by(runs: list[Run], constants: dict[str, float], noise: float = 0.0) -> list[Run]:
    """The runs with the step times that a model with these constants predicts."""
    draw = random.Random(0)
    truth = with_constants(empty(), [Constant(name=n, value=v, origin="made") for n, v in constants.items()])
    measured, _ = usable(runs, None)
    return [
        dataclasses.replace(m.run, step_time_s=time_of(m, truth) * math.exp(draw.gauss(0, noise)))
        for m in measured
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return made_by(grid(tmp_path_factory.mktemp("runs")), TRUTH)


@pytest.fixture(scope="module")
def measured(runs: list[Run]) -> list[Measured]:
    return usable(runs, None)[0]


def quiet(text: str) -> None:
    assert text


def test_the_closed_form_is_the_replay_for_even_stages(measured: list[Measured]) -> None:
    checked = 0
    for run in measured:
        model = CostModel(dataclasses.replace(run.setup.problem, profile=empty()))
        replayed_s = model.evaluate(run.setup.strategy).estimate.step_time_s
        closed_s = step_time_s(model, run.setup.strategy)
        assert closed_s <= replayed_s * (1 + 1e-9)
        if run.setup.strategy.degrees.pp == 1:
            assert closed_s == pytest.approx(replayed_s, rel=1e-9)
            checked += 1
        assert closed_s == pytest.approx(replayed_s, rel=0.02)
    assert checked > 5


def test_a_fit_explains_the_runs_that_its_constants_made(measured: list[Measured]) -> None:
    found = fit(measured, Scope(), empty(), quiet)
    assert max(abs(error) for error in found.errors) < 0.03
    assert max(abs(error) for error in found.left_out) < 0.10
    values = {u.name: v for u, v in zip(found.unknowns, found.values, strict=True)}
    for name in ("gemm_scale", "tp_scale"):
        assert values[name] == pytest.approx(TRUTH[name], rel=0.15)


def test_what_the_runs_cannot_determine_is_named_and_left_out(measured: list[Measured]) -> None:
    found = fit(measured, Scope(), empty(), quiet)
    known = {u.name for index, u in enumerate(found.unknowns) if found.determined(index)}
    assert "gemm_scale" in known
    assert not {"probability_passes", "compiled_host_share", "compiled_elementwise_share"} & known
    assert {constant.name for constant in found.constants(empty())} == known


def test_one_step_predicts_what_a_fit_without_the_group_finds(runs: list[Run]) -> None:
    noisy, _ = usable(made_by(runs, TRUTH, noise=0.04), None)
    found = fit(noisy, Scope(), empty(), quiet)
    group = noisy[0].group
    rest = [run for run in noisy if run.group != group]
    again = fit(rest, Scope(), empty(), quiet)
    profile = with_constants(
        empty(),
        [again.scope.constant(u, v, "") for u, v in zip(again.unknowns, again.values, strict=True)],
    )
    pairs = [
        (left_out, time_of(run, profile) / run.step_time_s - 1)
        for run, left_out in zip(found.runs, found.left_out, strict=True)
        if run.group == group
    ]
    assert len(pairs) == 7
    assert sum(abs(linear - refitted) for linear, refitted in pairs) / len(pairs) < 0.03
    assert max(abs(error) for error in found.errors) < 0.2


def test_outliers_bend_the_fit_little(runs: list[Run]) -> None:
    broken = [dataclasses.replace(run, step_time_s=3 * (run.step_time_s or 0)) for run in runs[:2]]
    found = fit(usable([*broken, *runs[2:]], None)[0], Scope(), empty(), quiet)
    assert sorted(abs(error) for error in found.errors)[len(found.errors) // 2] < 0.03


def test_runs_that_something_slowed_do_not_move_the_constants(runs: list[Run]) -> None:
    """A third of all, 40 % slower: a loss that grows with the error's size misses the others by 5 %."""
    slowed = [dataclasses.replace(run, step_time_s=1.4 * (run.step_time_s or 0)) for run in runs[::3]]
    rest = [run for index, run in enumerate(runs) if index % 3]
    found = fit(usable([*slowed, *rest], None)[0], Scope(), empty(), quiet)
    assert max(abs(error) for error in found.errors[len(slowed) :]) < 0.03
    values = {u.name: v for u, v in zip(found.unknowns, found.values, strict=True)}
    for name in ("gemm_scale", "tp_scale"):
        assert values[name] == pytest.approx(TRUTH[name], rel=0.15)


def test_a_cluster_stands_on_its_own_where_that_predicts_it_better(tmp_path: Path) -> None:
    """A framework with many runs does not draw one with few that behaves as is usual."""
    other = grid(tmp_path, framework="NeMo")
    usual = [run for run in other if run.hidden == 2048]
    odd = [dataclasses.replace(run, framework="Megatron-LM") for run in usual]
    slow = {"gemm_scale": 0.45, "elementwise_scale": 4.0, "norm_scale": 10.0, "tp_scale": 5.0}
    few = made_by(usual[::3], {})
    made = calibrate([*made_by(odd, slow), *few], name="two", progress=quiet)
    rows = [m for m in usable(made_by(usual, {}), None)[0] if m.run.framework == "NeMo"]
    errors = [abs(time_of(run, made.profile) / run.step_time_s - 1) for run in rows]
    assert sum(errors) / len(errors) < 0.03


def test_constants_stay_within_their_bounds() -> None:
    for name, prior in TIME_SPECS.items():
        unknown = Unknown(name, "", prior.prior)
        low, high = unknown.bounds()
        assert unknown.value(0.0) == pytest.approx(prior.prior)
        assert prior.low <= unknown.value(low) <= unknown.value(high) <= prior.high
        assert low < 0 < high
        assert prior.low <= prior.prior <= prior.high and prior.spread > 0 and prior.meaning
    assert set(TIME_SPECS) == set(TimeConstants.__dataclass_fields__)


def test_the_narrowest_constant_speaks() -> None:
    profile = dataclasses.replace(
        empty(),
        constants=(
            Constant(name="gemm_scale", value=0.5, origin=""),
            Constant(name="gemm_scale", value=0.6, origin="", framework="f"),
            Constant(name="gemm_scale", value=0.7, origin="", framework="f", device="d"),
            Constant(name="gemm_scale", value=0.8, origin="", framework="f", kernels="k"),
        ),
    )
    cases = [
        ("", "", "", 0.5),
        ("f", "", "", 0.6),
        ("f", "", "d", 0.7),
        ("f", "k", "d", 0.8),
        ("g", "k", "", 0.5),
    ]
    for framework, kernels, device, expected in cases:
        settings = EngineSettings(framework=framework, kernels=kernels)
        assert time_constants_of(profile, settings, device).gemm_scale == expected
    assert time_constants_of(None, NATIVE).gemm_scale == TIME_SPECS["gemm_scale"].prior
    assert time_constants_of(None, EngineSettings(engine=Engine.MEGATRON)).dp_exposed == 1.0


def test_scopes_go_from_the_general_to_the_particular(tmp_path: Path) -> None:
    one = usable(made_by(grid(tmp_path), TRUTH), None)[0]
    assert [scope for scope, _ in scopes(one)] == [Scope()]
    other = usable(made_by(grid(tmp_path, framework="NeMo", device="h100-sxm-80gb"), TRUTH), None)[0]
    found = [scope for scope, _ in scopes([*one, *other])]
    names = ("", "Megatron-LM", "NeMo")
    assert found == [Scope(framework=framework, engine="megatron") for framework in names]
    few, alone = ([scope for scope, _ in scopes([*one, *other[:count]])] for count in (2, 1))
    assert few == found and Scope(framework="NeMo", engine="megatron") not in alone


def test_many_runs_are_taken_evenly_from_every_group(measured: list[Measured]) -> None:
    many = measured * (2 + MAX_RUNS // len(measured))
    taken = evenly(many, MAX_RUNS)
    assert len(taken) == MAX_RUNS
    groups = {run.group for run in many}
    counts = [sum(run.group == group for run in taken) for group in groups]
    assert max(counts) - min(counts) <= MAX_RUNS // len(groups)


def test_a_profile_says_how_wrong_it_is(runs: list[Run]) -> None:
    result = calibrate(runs, name="grid", progress=quiet)
    assert result.profile.constant_of(TIME_ERROR, engine="megatron") == pytest.approx(
        max(abs(error) for error in result.fits[0].left_out), rel=1.0
    )
    assert result.unused == {}


def test_the_command_writes_a_profile_that_validate_reads(tmp_path: Path) -> None:
    output = tmp_path / "h100.json"
    answer = CliRunner().invoke(cli, ["calibrate", str(REFERENCE), "-o", str(output), "--json"])
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout)
    assert document["fits"][0]["time_mape"] < 0.05
    assert load_profile(output).layers == ()
    judged = CliRunner().invoke(cli, ["validate", str(REFERENCE), "--profile", str(output), "--json"])
    assert json.loads(judged.stdout)["summary"]["time_mape"] < 0.05


def test_runs_that_say_nothing_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("id,layers,status\n1,24,ok\n2,24,oom\n")
    answer = CliRunner().invoke(cli, ["calibrate", str(path), "-o", str(tmp_path / "p.json")])
    assert answer.exit_code == 2
    assert "0 of 2 rows can be used" in answer.stderr
    assert not (tmp_path / "p.json").exists()
    with pytest.raises(InputError):
        calibrate([], name="none", progress=quiet)


def test_messages_that_no_run_speaks_for_widen_the_interval(measured: list[Measured]) -> None:
    problem, strategy = measured[0].setup.problem, measured[0].setup.strategy
    told = [Constant(name=TIME_ERROR, value=0.02, origin="fitted", engine="megatron")]
    widths = []
    for more in ([], [Constant(name="dp_scale", value=1.0, origin="fitted")]):
        profile = with_constants(empty(), [*told, *more])
        estimate = CostModel(dataclasses.replace(problem, profile=profile)).evaluate(strategy).estimate
        low, high = estimate.step_time_interval_s
        widths.append((high - low) / estimate.step_time_s)
    assert estimate.breakdown.tp_comm_s + estimate.breakdown.dp_comm_s > 0
    assert widths[0] > widths[1] > 0
