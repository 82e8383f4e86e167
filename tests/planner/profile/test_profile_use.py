"""Profiles used by mistake: of another device, release of torch, backend, format, model or year."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from planner.cli import cli
from planner.foundation.decode import to_json
from planner.foundation.errors import InputError
from planner.hardware.catalog import load_device, load_model, profile_files
from planner.hardware.cluster_text import parse_cluster
from planner.hardware.local_machine import cpu_device
from planner.model.workload import Precision
from planner.profile.choose import check_device, installed_torch, months_old, told_age, use_of
from planner.profile.profile import Profile, load_profile
from planner.strategy.plan import load_plan
from tests import profile_samples as samples

SHIPPED = {path.stem: load_profile(path) for path in profile_files()}
CPU = next(profile for profile in SHIPPED.values() if profile.device == "cpu")
FITTED = SHIPPED["h100-sxm-80gb-reference-runs"]
H100 = load_device("h100-sxm-80gb").device()
DAY = datetime.date.fromisoformat(CPU.created[:10])
LOCAL = parse_cluster("local:4")
HERE = dataclasses.replace(cpu_device(4), title=CPU.device_title)
TORCH = installed_torch() or CPU.versions["torch"]

ROOT = Path(__file__).parents[3]
ESTIMATE = "estimate --seq 256 --batch 16"


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


def written(profile: Profile, folder: Path) -> str:
    path = folder / "mine.json"
    path.write_text(to_json(profile), encoding="utf-8")
    return str(path)


def remarks(profile: Profile, **known: Any) -> tuple[str, ...]:
    given = {"model": load_model("shardwise-demo"), "precision": Precision.FP32, "today": DAY} | known
    return use_of(profile, given.pop("device", HERE), **given).remarks


def test_the_right_profile_is_used_without_a_remark() -> None:
    fitting = dataclasses.replace(CPU, versions={**CPU.versions, "torch": TORCH})
    assert remarks(fitting, cluster=LOCAL) == ()
    assert use_of(FITTED, H100, precision=Precision.BF16, today=DAY).remarks == ()


@pytest.mark.parametrize(
    ("change", "known", "told"),
    [
        ({"versions": {"torch": "1.0.0+cpu"}}, {"cluster": LOCAL}, "taken with torch 1.0.0+cpu, here is"),
        ({"backend": "mpi"}, {}, "messages went over mpi, those of cpu go over gloo"),
        ({}, {"precision": Precision.BF16}, "layers are in fp32, the run is in bf16"),
        ({}, {"model": load_model("gpt-2-124m")}, "no sample of 1 of the 1 layer classes of gpt-2-124m"),
        ({"device_title": "Z80"}, {"cluster": LOCAL}, f"measured on Z80, this is {CPU.device_title}"),
        ({}, {"today": DAY + datetime.timedelta(days=800)}, "it is 26 months old"),
        ({"created": "once"}, {}, "its date 'once' cannot be read"),
    ],
)  # fmt: skip
def test_what_does_not_quite_fit_is_told(change: dict[str, Any], known: dict[str, Any], told: str) -> None:
    fitting = {"versions": {**CPU.versions, "torch": TORCH}} | change
    (remark,) = remarks(dataclasses.replace(CPU, **fitting), **known)
    assert told in remark


def test_operators_alone_have_a_format_and_price_layers() -> None:
    swept = dataclasses.replace(CPU, layers=(), rates=samples.rates(), versions={})
    (remark,) = remarks(swept)
    assert remark == "its operators are in bf16, the run is in fp32"
    (remark,) = remarks(swept, precision=Precision.BF16)
    assert remark.endswith("layer classes of shardwise-demo, which its operators price")


def test_builds_of_one_release_are_one_version() -> None:
    public = TORCH.partition("+")[0]
    assert remarks(dataclasses.replace(CPU, versions={"torch": f"{public}+cu130"}), cluster=LOCAL) == ()


def test_versions_elsewhere_are_not_known_here() -> None:
    old = dataclasses.replace(CPU, versions={"torch": "1.0.0"})
    assert remarks(old) == ()


def test_a_profile_of_another_device_is_refused_with_both_names() -> None:
    with pytest.raises(InputError, match=r"measured on cpu \(80 layers, 292 operators.*h100-sxm-80gb"):
        check_device(CPU, ["h100-sxm-80gb"], "--profile x.json")
    check_device(CPU, ["h100-sxm-80gb", "cpu"], "--profile x.json")
    check_device(FITTED, ["a100-sxm-80gb"], "--profile x.json")
    with pytest.raises(InputError, match=r"d5 and 3 more: .*one of these"):
        check_device(CPU, [f"d{number}" for number in range(9)], "--profile x.json")


def test_a_fitted_profile_of_another_device_is_marked() -> None:
    a100 = load_device("a100-sxm-80gb").device()
    (remark,) = use_of(FITTED, a100, today=DAY).remarks
    assert remark == "fitted to runs on h100-sxm-80gb, none of them on a100-sxm-80gb"


@pytest.mark.parametrize(
    "words",
    [
        f"{ESTIMATE} --model llama-3-8b --cluster 1x8:h100",
        "solve --model llama-3-8b --cluster 1x8:h100 --seq 256 --batch 16",
        "size --model llama-3-8b --tokens 1B --seq 256 --batch 64 --device h100 --deadline 30d",
        "compare --model llama-3-8b --tokens 1B --seq 256 --batch 64 --device h100,a100 --deadline 30d",
    ],
)
def test_commands_refuse_a_profile_of_another_device(words: str, tmp_path: Path) -> None:
    result = run(*words.split(), "--profile", written(CPU, tmp_path))
    assert result.exit_code == 2, result.output
    for part in ("--profile", "was measured on cpu", "h100-sxm-80gb", "plan profile on that device"):
        assert part in result.stderr


def test_the_basis_and_the_json_of_an_estimate_carry_the_remarks(tmp_path: Path) -> None:
    old = dataclasses.replace(CPU, versions={"torch": "1.0.0"}, created="2020-01-01T00:00:00+00:00")
    words = [
        *f"{ESTIMATE} --model shardwise-demo --cluster local:4".split(),
        "--profile",
        written(old, tmp_path),
    ]
    plan_file = tmp_path / "plan.json"
    text = run(*words, "-o", str(plan_file)).stdout
    assert "mind: " in text and "months old" in text and "with torch 1.0.0" in text
    (use,) = json.loads(run(*words, "--json").stdout)["inputs"]["profiles"]
    assert use["device"] == "cpu" and use["measured"] and use["torch"] == "1.0.0"
    assert any("months old" in remark for remark in use["remarks"])
    assert load_plan(plan_file).profiles[0].remarks == tuple(use["remarks"])
    explained = run(
        "explain", str(plan_file), "--profile", written(old, tmp_path), "--json", "--why-not", "tp=2"
    )
    assert "months old" in json.loads(explained.stdout)["basis"]
    for command in ("explain", "rehearse"):
        refused = run(command, str(plan_file), "--profile", written(replace_device(old), tmp_path))
        assert refused.exit_code == 2 and "the plan's cluster is made of cpu" in refused.stderr


def replace_device(profile: Profile) -> Profile:
    return dataclasses.replace(profile, device="h100-sxm-80gb")


def test_a_plan_of_an_earlier_build_has_no_profiles(tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.json"
    words = f"{ESTIMATE} --model shardwise-demo --cluster local:4 -o {plan_file}"
    assert run(*words.split()).exit_code == 0
    document = json.loads(plan_file.read_text())
    del document["inputs"]["profiles"]
    plan_file.write_text(json.dumps(document))
    assert load_plan(plan_file).profiles == ()


def test_a_comparison_names_the_profiles_behind_it() -> None:
    words = "compare --model llama-3-8b --tokens 1B --seq 2048 --batch 64 --cluster 1x8:h100 --on-premises"
    words = words.replace(" --on-premises", " --pricing on-premises")
    found = json.loads(run(*words.split(), "--json").stdout)
    (told,) = [a for a in found["assumptions"] if a["what"].startswith("profile of")]
    assert told["value"] == FITTED.name and told["flag"] == "--profile"
    assert "fitted to runs on h100-sxm-80gb" in run(*words.split()).stdout


@pytest.mark.parametrize(
    ("days", "told"),
    [(0, "today"), (1, "1 day ago"), (45, "45 days ago"), (430, "14 months ago"), (-3, "today")],
)
def test_ages_in_words(days: int, told: str) -> None:
    assert told_age(CPU.created, DAY + datetime.timedelta(days=days)) == told


def test_a_year_has_twelve_months() -> None:
    months = months_old("2024-03-01T00:00:00+00:00", datetime.date(2026, 3, 1))
    assert months == pytest.approx(24, abs=0.05)
    assert months_old("yesterday", DAY) is None


@pytest.mark.parametrize("command", ["validate", "calibrate"])
def test_runs_on_another_device_refuse_a_measured_profile(command: str, tmp_path: Path) -> None:
    table = str(ROOT / "bench" / "data" / "h100_reference.csv")
    output = ["-o", str(tmp_path / "fitted.json")] if command == "calibrate" else []
    result = run(command, table, "--profile", written(CPU, tmp_path), *output)
    assert result.exit_code == 2
    assert "was measured on cpu" in result.stderr and "the runs are of h100-sxm-80gb" in result.stderr
