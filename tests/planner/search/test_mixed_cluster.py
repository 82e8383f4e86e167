"""Mixed clusters as users meet them: their text, links, plan.json, the commands and the report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from planner.cli import cli
from planner.commands.shared.options import ProblemOptions
from planner.commands.shared.problem import problem_of_plan, read_problem
from planner.cost.evaluate import CostModel
from planner.foundation.decode import decode, encode
from planner.foundation.errors import InputError
from planner.foundation.units import GIB
from planner.hardware.cluster import ClusterSpec
from planner.hardware.cluster_text import parse_cluster
from planner.report.page import render_page
from planner.report.run_record import ReportInput
from planner.report.sections import memory_figure
from planner.search.solve import make_plan
from planner.strategy.placement import is_mixed, parse_device_order, seen_from
from planner.strategy.plan import Plan, decode_plan, encode_plan, load_plan
from planner.strategy.plan_check import check_plan
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages

MIXED = "2x8:a100-sxm-40gb+2x8:h100-sxm-80gb"
WORDS = f"estimate --model llama-13b --cluster {MIXED} --seq 2048 --batch 64"
FIXED = ("tp=4", "pp=4", "zero=1")
DEGREES = Degrees(tp=4, pp=4, dp_shard=2, zero=Zero.OPTIMIZER, num_micro_batches=32)


GROUPS = (
    "[[groups]]\nnodes=2\ndevices_per_node=8\ndevice='a100-sxm-80gb'\n{}"
    "[[groups]]\nnodes=2\ndevices_per_node=8\ndevice='h100-sxm-80gb'\n{}"
)


def estimate(*words: str) -> Result:
    fixed = [word for text in FIXED for word in ("--fix", text)]
    return CliRunner().invoke(cli, [*WORDS.split(), *fixed, *words])


def options(cluster: str = MIXED, **more: Any) -> ProblemOptions:
    names = dict.fromkeys(ProblemOptions.__dataclass_fields__)
    values = {
        **names,
        "model": "llama-13b",
        "cluster": cluster,
        "seq": 2048,
        "batch": 64,
        "optimizer": "adamw",
        "method": "pretrain",
        "on_premises": False,
        "checkpoint_async": False,
    }
    return ProblemOptions(**{**values, **more})


@pytest.fixture(scope="module")
def plan() -> Plan:
    problem = read_problem(options()).problem
    degrees = dataclasses.replace(DEGREES, device_order=(1, 0))
    evaluation = CostModel(problem).evaluate(Strategy(degrees=degrees, stages=even_stages(40, 4)))
    return make_plan(problem, evaluation, None, {}, ())


# Clusters


def test_groups_keep_their_own_links() -> None:
    cluster = parse_cluster("16x8:a100-sxm-80gb+16x8:h100-sxm-80gb")
    slow, fast = cluster.groups
    assert (slow.intra, slow.inter) == (None, None), "they are the cluster's"
    assert fast.intra is not None and fast.intra.bytes_per_s == 450e9
    assert fast.inter is not None and fast.inter.bytes_per_s == 50e9
    assert decode(ClusterSpec, encode(cluster), source="test") == cluster
    for text in ("4x8:h100-sxm-80gb", "2x8:h100-sxm-80gb+2x8:h100-sxm-80gb", "1x8:h100+3x8:h100"):
        assert all(group.intra is group.inter is None for group in parse_cluster(text).groups), text
        assert not is_mixed(parse_cluster(text))
    assert is_mixed(cluster) and is_mixed(parse_cluster("1x4:h100+1x8:h100"))


def test_domains_are_joined_by_their_ports() -> None:
    """Two racks, each one domain of fast links, and a port of each device between them."""
    racks = parse_cluster("18x4:gb200@nvl72+18x4:gb200@nvl72")
    assert racks.intra.bytes_per_s == 900e9 and racks.inter.bytes_per_s == 50e9
    assert all(group.inter is not None and group.inter.bytes_per_s == 900e9 for group in racks.groups)


def test_parts_of_a_cluster_need_a_known_network() -> None:
    """One instance alone needs none, two kinds of them do, and each that has none is named."""
    one = "1*lambda/gpu_8x_h100_sxm5"
    assert parse_cluster(one).devices == 8
    with pytest.raises(InputError, match=r"gpu_8x_h100_sxm5@eth25") as caught:
        parse_cluster(f"{one}+{one}+1x8:a100")
    assert len(caught.value.problems) == 2
    joined = parse_cluster(f"{one}@ndr400x8+1x8:a100-sxm-80gb@hdr200x8")
    assert joined.inter.bytes_per_s == 25e9


def test_a_link_that_a_file_states_holds_for_all_groups(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(GROUPS.format("", "") + "[intra]\ngb_per_s=100\nlatency_us=1\n")
    cluster = parse_cluster(str(file))
    assert cluster.intra.bytes_per_s == 100e9
    assert all(group.intra is None for group in cluster.groups)


def test_a_file_states_the_links_of_a_group(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    link = "[groups.{}]\ngb_per_s={}\nlatency_us=3\n"
    file.write_text(GROUPS.format("", link.format("intra", 200) + link.format("inter", 20)))
    cluster = parse_cluster(str(file))
    slow, fast = cluster.groups
    assert (cluster.intra.bytes_per_s, cluster.inter.bytes_per_s) == (200e9, 20e9)
    assert slow.intra is not None and slow.intra.bytes_per_s == 300e9
    assert slow.inter is not None and slow.inter.bytes_per_s == 25e9
    assert fast.intra is None, "it is the slowest, and so the cluster's"
    assert fast.inter is not None and fast.inter.latency_s == 3e-6 < cluster.inter.latency_s
    file.write_text(GROUPS.format("", link.format("inter", 0)))
    with pytest.raises(InputError, match=r"groups\.1\.inter\.gb_per_s"):
        parse_cluster(str(file))


@pytest.mark.parametrize(
    ("text", "order"), [("1,0", (1, 0)), (" 0 , 1", (0, 1)), ("h100-sxm-80gb,a100-sxm-40gb", (1, 0))]
)
def test_an_order_is_of_numbers_or_names(text: str, order: tuple[int, ...]) -> None:
    assert parse_device_order(text, parse_cluster(MIXED)) == order


@pytest.mark.parametrize("text", ["", "0", "1,1", "0,1,2", "-1,0", "h100-sxm-80gb", "0,h100", "9" * 400])
def test_a_wrong_order_names_the_groups(text: str) -> None:
    with pytest.raises(InputError, match=r"0 \(a100-sxm-40gb\), 1 \(h100-sxm-80gb\)"):
        parse_device_order(text, parse_cluster(MIXED))
    twice = parse_cluster("1x8:h100-sxm-80gb+1x8:h100-sxm-80gb")
    with pytest.raises(InputError):
        parse_device_order("h100-sxm-80gb,h100-sxm-80gb", twice)


# What counts as known


def test_each_kind_of_device_has_its_profile_and_limit() -> None:
    asked = read_problem(options())
    slow, fast = (profile for _, profile in asked.problem.device_profiles)
    assert slow is not None and "a100-sxm-40gb" in slow.devices
    assert fast is not None and fast.device == "h100-sxm-80gb"
    assert asked.problem.profile is slow and asked.problem.device.name == "a100-sxm-40gb"
    assert "a100-sxm-40gb: shipped profile" in asked.basis and "h100-sxm-80gb: shipped profile" in asked.basis
    unknown = read_problem(options("1x8:v100-sxm-32gb+1x8:h100-sxm-80gb"))
    assert [profile is None for _, profile in unknown.problem.device_profiles] == [True, False]
    assert "v100-sxm-32gb: datasheet" in unknown.basis
    usable = [group.device.usable_memory_bytes for group in asked.problem.cluster.groups]
    assert [limit for _, limit in asked.problem.device_limits_bytes] == usable
    assert asked.problem.memory_limit_bytes == min(usable)
    assert seen_from(asked.problem, (1,)).memory_limit_bytes == usable[1]
    assert seen_from(asked.problem, (1,)).profile is fast


def test_a_stated_limit_caps_every_kind() -> None:
    capped = read_problem(options(memory_limit="60GiB")).problem
    small = capped.cluster.groups[0].device
    limits = ((small.name, small.usable_memory_bytes), ("h100-sxm-80gb", 60 * GIB))
    assert capped.device_limits_bytes == limits
    same = read_problem(options("1x8:h100-sxm-80gb+1x8:h100-sxm-80gb", memory_limit="100GiB")).problem
    alone = read_problem(options("2x8:h100-sxm-80gb", memory_limit="100GiB")).problem
    assert same.memory_limit_bytes == alone.memory_limit_bytes == 100 * GIB


def test_a_measured_profile_must_be_of_one_of_the_devices() -> None:
    from planner.hardware.catalog import profile_files
    from planner.profile.profile import load_profile

    path = next(path for path in profile_files() if load_profile(path).layers)
    with pytest.raises(InputError, match="a100-sxm-40gb and h100-sxm-80gb"):
        read_problem(options(profile=path))
    fitted = next(path for path in profile_files() if not load_profile(path).layers)
    asked = read_problem(options(profile=fitted))
    assert all(profile is not None for _, profile in asked.problem.device_profiles)


# plan.json


def test_a_mixed_plan_says_where_its_stages_run(plan: Plan) -> None:
    document = json.loads(json.dumps(encode_plan(plan)))
    assert document["strategy"]["device_order"] == [1, 0]
    stages = document["stages"]
    assert [stage["device"] for stage in stages] == ["h100-sxm-80gb"] * 2 + ["a100-sxm-40gb"] * 2
    assert [stage["devices"][0] for stage in stages] == [0, 8, 16, 24]
    assert stages[0]["memory_limit_bytes"] > 2 * stages[3]["memory_limit_bytes"] * 0.9
    assert document["estimate"]["memory_limit_bytes"] in {s["memory_limit_bytes"] for s in stages}
    again = decode_plan(document, source="plan.json")
    assert again == plan
    assert json.dumps(encode_plan(again)) == json.dumps(encode_plan(plan))
    assert [check.faults for check in check_plan(again)] == [()] * 8


def test_plans_without_the_new_keys_are_read(plan: Plan) -> None:
    document = json.loads(json.dumps(encode_plan(plan)))
    del document["strategy"]["device_order"]
    for stage in document["stages"]:
        del stage["device"], stage["memory_limit_bytes"]
    again = decode_plan(document, source="plan.json")
    assert again.strategy.degrees.device_order == ()
    assert all(stage.device == "" and stage.memory_limit_bytes is None for stage in again.stage_estimates)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda d: d["stages"][0].update(device="a100-sxm-40gb"), "rank grid"),
        (lambda d: d["strategy"].update(device_order=[]), "rank grid"),
        (lambda d: d["strategy"].update(device_order=[0, 0]), "rules"),
        (lambda d: d["stages"][2]["memory"].update(activations_bytes=60 * GIB), "estimate"),
        (lambda d: d["stages"][2].update(memory_limit_bytes=1), "estimate"),
        (lambda d: d["estimate"].update(peak_memory_bytes=1), "estimate"),
        (lambda d: d["estimate"].update(memory_limit_bytes=90 * GIB), "estimate"),
    ],
)
def test_damage_is_found(plan: Plan, change: Callable[[Any], None], check: str) -> None:
    document = json.loads(json.dumps(encode_plan(plan)))
    change(document)
    found = check_plan(decode_plan(document, source="plan.json"))
    assert check in [each.name for each in found if not each.holds]


# Commands and report


def test_estimate_places_stages_by_the_order() -> None:
    """Without one, as the groups are listed; with one, turned; each time with its own limit."""
    listed, turned = (
        json.loads(estimate(*words, "--json").stdout) for words in ((), ("--fix", "device_order=1,0"))
    )
    devices = [[stage["device"] for stage in document["stages"]] for document in (listed, turned)]
    assert devices[0] == devices[1][::-1] == ["a100-sxm-40gb"] * 2 + ["h100-sxm-80gb"] * 2
    assert listed["strategy"]["device_order"] == [] and turned["strategy"]["device_order"] == [1, 0]
    assert listed["estimate"]["step_time_s"] != turned["estimate"]["step_time_s"]


def test_the_text_names_devices_and_limits() -> None:
    text = estimate("--fix", "device_order=h100-sxm-80gb,a100-sxm-40gb").stdout
    assert "devices" in text and "groups1,0" in text
    assert "of 39.25 GiB" in text and "of 78.9 GiB" in text
    uniform = CliRunner().invoke(cli, WORDS.replace(MIXED, "4x8:h100-sxm-80gb").split()).stdout
    assert "devices" not in uniform.split("step time by cause")[0]


def test_a_wrong_order_is_wrong_use() -> None:
    done = estimate("--fix", "device_order=1,1")
    assert done.exit_code == 2
    assert "0 (a100-sxm-40gb), 1 (h100-sxm-80gb)" in str(done.exception) + done.stderr


def test_a_mixed_plan_is_written_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert estimate("--fix", "device_order=1,0", "-o", str(file)).exit_code == 0
    assert CliRunner().invoke(cli, ["check", str(file)]).exit_code == 0


def test_show_cluster_has_the_links_of_groups() -> None:
    text = CliRunner().invoke(cli, ["show", "cluster", MIXED]).stdout
    assert "inside its nodes" in text and "between its nodes" in text and "NVLink4" in text


def test_the_report_draws_each_limit(plan: Plan) -> None:
    figure = memory_figure(plan, None)
    assert "78.9 GiB on h100-sxm-80gb, 39.25 GiB on a100-sxm-40gb" in figure.caption
    assert figure.table is not None and figure.table.rows[3][0] == "stage 3 (a100-sxm-40gb)"
    page = render_page(ReportInput(plan=plan, run=None))
    assert "16 x A100-40GB SXM4 and 16 x H100-80GB SXM5" in page
    assert "NVLink4 within a node and ndr400x8 between nodes of h100-sxm-80gb" in page


def test_a_mixed_plan_is_explained_by_the_profiles_that_it_was_made_with(tmp_path: Path) -> None:
    """Each kind's own: the figures are those of the file."""
    file = tmp_path / "plan.json"
    asked = f"solve --model llama-3-8b --cluster {MIXED} --seq 2048 --batch 64 --fix tp=1 --fix pp=4"
    order = "device_order=h100-sxm-80gb,a100-sxm-40gb"
    made = CliRunner().invoke(
        cli, [*asked.split(), "--fix", "schedule=1f1b", "--fix", order, "-o", str(file)]
    )
    assert made.exit_code == 0, made.output
    plan = load_plan(file)
    assert plan.strategy.degrees.device_order == (1, 0)
    assert "profile h100-sxm-80gb" in plan.digests and "profile a100-sxm-40gb" in plan.digests
    again = problem_of_plan(plan, None)
    assert "shipped profile a100" in again.basis and "shipped profile h100" in again.basis
    estimate = CostModel(again.problem).evaluate(plan.strategy).estimate
    assert estimate.step_time_s == plan.estimate.step_time_s
    assert estimate.verdict is plan.estimate.verdict
