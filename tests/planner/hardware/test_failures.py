"""The file of failure rates, and what is usually assumed of a run."""

from __future__ import annotations

import dataclasses

import pytest

from planner.commands.shared.options import ProblemOptions
from planner.commands.shared.overhead_options import read_overheads
from planner.foundation.decode import load_toml
from planner.foundation.errors import Problem
from planner.foundation.units import DAY_S
from planner.hardware.catalog import data_folder, device_names, load_device
from planner.hardware.cluster_text import parse_cluster
from planner.hardware.failures import FailureFile, failure_file, rated_nodes, usual_failures_per_s
from planner.job.problem import BEST, NO_OVERHEADS, JobOverheads
from planner.sizing.usual_overheads import overhead_assumptions, usual_overheads, usual_storage_bytes_per_s

FILE = failure_file()


def test_the_file_decodes_strictly_to_what_is_read() -> None:
    assert load_toml(data_folder() / "failures.toml", FailureFile) == FILE


def test_every_rate_is_of_a_known_device_within_its_range_and_has_a_source() -> None:
    named = [name for rate in FILE.rates for name in (*rate.devices, *rate.alike)]
    assert set(named) <= set(device_names()) and len(named) == len(set(named))
    for rate in (FILE.assumed, *FILE.rates, FILE.spot):
        assert 0 < rate.low <= rate.per_1000_node_days <= rate.high
        assert rate.source and rate.as_of
    assert FILE.restart.low_s < FILE.restart.fixed_s < FILE.restart.high_s


@pytest.mark.parametrize(
    ("device", "rate", "measured"),
    [
        ("h100-sxm-80gb", 3.8, True),
        ("h200-sxm-141gb", 3.8, False),
        ("a100-sxm-80gb", 5.1, True),
        ("tpu-v4", 1.6, True),
        ("mi300x", 4.0, False),
        ("of my own", 4.0, False),
    ],
)
def test_devices_have_their_rates(device: str, rate: float, measured: bool) -> None:
    assert (FILE.of(device).per_1000_node_days, FILE.measured(device)) == (rate, measured)


@pytest.mark.parametrize(
    "cluster", ["64x1:h100@ndr400", "16x4:h100@ndr400x4", "8x8:h100@ndr400x8", "4x16:h100@ndr400x8"]
)
def test_nodes_of_any_size_count_by_their_devices(cluster: str) -> None:
    found = parse_cluster(cluster)
    assert rated_nodes(found) == 8
    assert usual_failures_per_s(found) == pytest.approx(8 * 3.8 / 1000 / DAY_S)


def test_a_rack_of_72_counts_as_nine_nodes_and_kinds_add_up() -> None:
    assert rated_nodes(parse_cluster("2x72:gb200@xdr800x72")) == 18
    mixed = usual_failures_per_s(parse_cluster("2x8:a100-sxm-80gb@hdr200x8+2x8:h100@ndr400x8"))
    assert mixed == pytest.approx(2 * (5.1 + 3.8) / 1000 / DAY_S)


# What is usual


def test_the_usual_storage_is_that_of_the_reference_architecture() -> None:
    for nodes, gb_per_s in ((1, 4), (32, 20), (128, 80)):
        assert usual_storage_bytes_per_s(8 * nodes) == pytest.approx(gb_per_s * 1e9)
    rates = [usual_storage_bytes_per_s(devices) for devices in range(1, 3000, 7)]
    assert rates == sorted(rates)


def test_what_was_said_stays_and_the_rest_is_usual() -> None:
    usual = usual_overheads(256)
    assert (usual.checkpoint_every, usual.checkpoint_async, usual.storage_bytes_per_s) == (BEST, True, 2e10)
    assert usual.failures_per_1000_node_days is usual.restart_s is usual.repair_s is None
    assert usual_overheads(256, spot=True).preemptions_per_1000_node_days == FILE.spot.per_1000_node_days
    said = JobOverheads(
        checkpoint_every=300,
        storage_bytes_per_s=1e9,
        failures_per_1000_node_days=0.0,
        preemptions_per_1000_node_days=7.0,
        eval_every=5,
        eval_s=1.0,
    )
    assert usual_overheads(256, said, spot=True) == said


DEVICE = load_device("h100").device()


def told(overheads: JobOverheads, said: JobOverheads = NO_OVERHEADS) -> set[str]:
    return {each.flag for each in overhead_assumptions(overheads, DEVICE, said)}


def test_every_default_is_told_with_its_source_and_what_was_said_is_not() -> None:
    spot = overhead_assumptions(usual_overheads(256, spot=True), DEVICE)
    assert all(each.what and each.value and each.source and each.flag for each in spot)
    every = {each.flag for each in spot}
    assert every == {
        "--failures",
        "--checkpoint-every",
        "--checkpoint-async",
        "--storage",
        "--restart",
        "--repair, --spares",
        "--preemptions",
        "--preemption-notice",
        "--preemption-restart",
    }
    assert told(usual_overheads(256)) == {flag for flag in every if "preemption" not in flag}
    said = JobOverheads(
        checkpoint_every=300,
        storage_bytes_per_s=1e9,
        checkpoint_async=True,
        failures_per_1000_node_days=0.0,
        restart_s=1.0,
        repair_s=1.0,
    )
    assert told(usual_overheads(256, said), said) == set()
    assert told(usual_overheads(256, said, spot=True), said) == {flag for flag in every if "preempt" in flag}
    assert told(NO_OVERHEADS) == set()


def test_a_rate_that_was_published_for_a_kin_says_so() -> None:
    sources = {}
    for name in ("h100", "h200", "mi300x"):
        device = load_device(name).device()
        (rate,) = (a for a in overhead_assumptions(usual_overheads(64), device) if a.flag == "--failures")
        sources[name] = rate.source
    assert sources["h100"].startswith("Llama 3")
    assert sources["h200"].startswith("assumed as for h100-sxm-80gb: Llama 3")
    assert sources["mi300x"].startswith("assumed for this device")


def test_options_that_need_others_count_alone_where_the_rest_is_filled_in() -> None:
    options = ProblemOptions(
        model="llama-3-8b",
        cluster="1x8:h100",
        seq=1,
        batch=1,
        tokens=None,
        precision=None,
        optimizer="adamw",
        method="pretrain",
        profile=None,
        memory_limit=None,
        failures=2.0,
        storage="1GB/s",
        restart="5min",
        preemptions="spot",
    )
    refused: list[Problem] = []
    read_overheads(options, refused)
    assert {problem.where for problem in refused} == {"--storage", "--failures", "--restart", "--preemptions"}
    kept: list[Problem] = []
    said = read_overheads(options, kept, completed=True)
    assert not kept
    usual = usual_overheads(8, said)
    assert (usual.failures_per_1000_node_days, usual.restart_s, usual.storage_bytes_per_s) == (
        2.0,
        300.0,
        1e9,
    )
    assert usual.checkpoint_every == BEST and usual.checkpoint_async
    assert not usual_overheads(8, dataclasses.replace(said, checkpoint_every=9)).checkpoint_async
    read_overheads(dataclasses.replace(options, spares=1, eval_every=3), kept, completed=True)
    assert {problem.where for problem in kept} == {"--spares", "--eval-every"}


def test_the_flags_that_are_told_are_those_of_the_command() -> None:
    from planner.commands.splitting.estimate import estimate

    names = {option for parameter in estimate.params for option in parameter.opts}
    flags = told(usual_overheads(8, spot=True))
    assert {flag for pair in flags for flag in pair.split(", ")} <= names
    assert dataclasses.replace(usual_overheads(8), spares=1) != usual_overheads(8)
