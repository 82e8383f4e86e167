"""The text of --cluster, cluster files, and this machine as a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.foundation.decode import decode, encode
from planner.foundation.errors import InputError
from planner.hardware import local_machine as machine
from planner.hardware.cluster import ClusterSpec
from planner.hardware.cluster_text import parse_cluster


def test_shape_device_and_network() -> None:
    cluster = parse_cluster("128x8:a100-sxm-80gb@hdr200x8")
    (group,) = cluster.groups
    assert cluster.name == "128x8:a100-sxm-80gb@hdr200x8"
    assert (group.nodes, group.devices_per_node, group.slots_per_node) == (128, 8, None)
    assert cluster.devices == 1024
    assert cluster.intra.bytes_per_s == 300e9
    assert cluster.inter.bytes_per_s == 25e9
    assert cluster.price_usd_per_hour is None and not cluster.local


def test_without_a_network_the_usual_one_is_taken_and_said() -> None:
    cluster = parse_cluster("2x8:h100")
    assert cluster.name == "2x8:h100-sxm-80gb@ndr400x8"
    assert any("assumed" in source for source in cluster.inter.sources)
    assert not any("assumed" in source for source in parse_cluster("1x8:h100").inter.sources)


@pytest.mark.parametrize(
    "text",
    [
        "128x8:a100-sxm-80gb@hdr200x8",
        "2x8:h100",
        "16*p5.48xlarge",
        "2x8:h100+4*p4d.24xlarge",
        "1x8:h100@none",
    ],
)
def test_the_name_reads_back_as_the_same_cluster(text: str) -> None:
    cluster = parse_cluster(text)
    again = parse_cluster(cluster.name)
    assert (again.name, again.groups, again.intra) == (cluster.name, cluster.groups, cluster.intra)
    assert decode(ClusterSpec, encode(cluster), source="test") == cluster


def test_none_takes_no_time_inside_nodes_either() -> None:
    cluster = parse_cluster("64x8:h100@none")
    for link in (cluster.intra, cluster.inter):
        assert link.bytes_per_s is None and link.latency_s == 0.0


def test_instances_bring_devices_network_and_price() -> None:
    cluster = parse_cluster("16*p5.48xlarge")
    assert cluster == parse_cluster("16*aws/p5.48xlarge")
    assert cluster.devices == 128
    assert cluster.groups[0].device.name == "h100-sxm-80gb"
    assert cluster.inter.bytes_per_s == 50e9
    assert cluster.price_usd_per_hour == pytest.approx(16 * 55.04)
    unpriced = parse_cluster("2*p5e.48xlarge")
    assert unpriced.price_usd_per_hour is None


def test_an_instance_without_a_known_network_needs_one_only_between_nodes() -> None:
    alone = parse_cluster("1*lambda/gpu_8x_h100_sxm5")
    assert alone.inter == alone.intra
    with pytest.raises(InputError, match="@eth25"):
        parse_cluster("2*lambda/gpu_8x_h100_sxm5")
    assert parse_cluster("2*lambda/gpu_8x_h100_sxm5@ndr400x8").inter.bytes_per_s == 50e9


def test_a_mixed_cluster_has_the_slowest_links_and_the_sum_of_prices() -> None:
    mixed = parse_cluster("2*p5.48xlarge + 4*p4d.24xlarge")
    assert [group.device.name for group in mixed.groups] == ["h100-sxm-80gb", "a100-sxm-40gb"]
    assert mixed.intra.bytes_per_s == 300e9
    assert mixed.inter.bytes_per_s == 6.25e9
    assert mixed.price_usd_per_hour == pytest.approx(2 * 55.04 + 4 * 21.957642)
    assert parse_cluster("2*p5.48xlarge+1x8:h100").price_usd_per_hour is None
    order = parse_cluster("4*p4d.24xlarge+2*p5.48xlarge")
    assert (order.intra, order.inter, order.devices) == (mixed.intra, mixed.inter, mixed.devices)


def test_a_scale_up_domain_joins_nodes() -> None:
    rack = parse_cluster("18x4:gb200@nvl72")
    assert rack.inter.bytes_per_s == rack.intra.bytes_per_s == 900e9
    assert (rack.groups[0].nodes, rack.groups[0].devices_per_node) == (18, 4)
    two = parse_cluster("36x4:gb200@nvl72")
    assert (two.groups[0].nodes, two.groups[0].devices_per_node) == (2, 72)
    assert two.inter.bytes_per_s == 50e9
    part = parse_cluster("32x4:gb200@nvl72-xdr800")
    assert (part.groups[0].nodes, part.groups[0].devices_per_node) == (2, 64)
    assert part.inter.bytes_per_s == 100e9
    assert part.devices == 128


def test_more_devices_than_a_bridge_joins_use_pcie() -> None:
    assert parse_cluster("1x2:h100-nvl").intra.bytes_per_s == 300e9
    assert parse_cluster("1x8:h100-nvl").intra.bytes_per_s == 63e9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "NODESxGPUS"),
        ("banana", "NODESxGPUS"),
        ("h100", "NODESxGPUS"),
        ("8:h100", "NODESxGPUS"),
        ("x8:h100", "NODESxGPUS"),
        ("-1x8:h100", "NODESxGPUS"),
        ("1.5x8:h100", "NODESxGPUS"),
        ("٣x8:h100", "NODESxGPUS"),
        ("1x8:h100@", "NODESxGPUS"),
        ("1x8:h100@ndr400x8@none", "NODESxGPUS"),
        ("+", "NODESxGPUS"),
        ("1x8:h100+", "NODESxGPUS"),
        ("local+1x8:h100", "local"),
        ("local:", "NODESxGPUS"),
        ("local:x", "NODESxGPUS"),
        ("0x8:h100", "1 to 1000000"),
        ("1x0:h100", "1 to 1024"),
        ("99999999999x8:h100", "1 to 1000000"),
        ("1000000x1024:h100", "at most 1048576"),
        ("9999999999999999999x8:h100", "NODESxGPUS"),
        ("1x8:h101", "h100"),
        ("1x8:h100@hdr400x8", "hdr200x8"),
        ("1x8:h100@foo", "hdr200x8"),
        ("0*p5.48xlarge", "1 to 1000000"),
        ("4*p5.48xlage", "p5.48xlarge"),
        ("1x8:h100@none+1x8:h100", "@none"),
        ("1x128:gb200@nvl72", "larger than"),
        ("x" * 5000, "5000 characters"),
        ("1x8:absent.toml", "no such file"),
        ("absent.toml", "no such file"),
        ("1x8:h100\0", "h100"),
    ],
)
def test_a_wrong_cluster_is_one_clear_error(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_cluster(text)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_all_parts_are_reported_at_once() -> None:
    with pytest.raises(InputError) as caught:
        parse_cluster("1x8:h101+0x8:a100+banana")
    assert len(caught.value.problems) == 3


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "accelerators", list)


@pytest.mark.usefixtures("cpu_only")
def test_local_without_accelerators_is_processes_on_the_cpu() -> None:
    cluster = parse_cluster("local:4")
    (group,) = cluster.groups
    assert cluster.name == "local:4" and cluster.local
    assert (group.nodes, group.devices_per_node) == (1, 4)
    assert group.slots_per_node == machine.usable_cores()
    assert group.device.name == "cpu"
    assert group.device.peak_fp32_flops is None
    assert 4 * group.device.memory_bytes <= machine.physical_memory_bytes()
    assert 0 < group.device.usable_memory_bytes < group.device.memory_bytes
    assert cluster.intra.bytes_per_s is not None and cluster.intra.latency_s > 0
    assert parse_cluster("local").devices == machine.usable_cores()


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("text", ["local:0", "local:257", "local:999999999999"])
def test_an_absurd_number_of_processes_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="1 to 256"):
        parse_cluster(text)


def test_local_with_accelerators_is_those(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "accelerators", lambda: [("NVIDIA H100 80GB HBM3", 81559)] * 2)
    cluster = parse_cluster("local")
    assert cluster.devices == 2 and cluster.groups[0].device.name == "h100-sxm-80gb"
    assert cluster.groups[0].slots_per_node is None
    assert parse_cluster("local:1").devices == 1
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        parse_cluster("local:4")


def test_an_unknown_accelerator_keeps_its_memory_and_no_guessed_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "accelerators", lambda: [("NVIDIA Z9", 16_000)])
    device = parse_cluster("local").groups[0].device
    assert device.memory_bytes == 16_000 * 2**20
    assert device.peak_bf16_flops is None and "unknown" in device.sources[0]


def test_different_accelerators_are_not_taken_for_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "accelerators", lambda: [("NVIDIA L4", 23034), ("NVIDIA T4", 15360)])
    with pytest.raises(InputError, match="differ"):
        parse_cluster("local")
    assert parse_cluster("local:1").groups[0].device.name == "l4"


def fake_driver(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_driver_is_asked_and_hidden_devices_stay_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver(tmp_path, "printf 'NVIDIA L4, 23034\\nTesla T4, 15360\\n'", monkeypatch)
    both = [("NVIDIA L4", 23034), ("Tesla T4", 15360)]
    assert machine.accelerators() == both
    cases = {
        "0": both[:1],
        "1": both[1:],
        "": [],
        "-1": [],
        "0,1": both,
        "0,7,1": both[:1],
        "GPU-1": both[:1],
    }
    for visible, seen in cases.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert machine.accelerators() == seen, visible


@pytest.mark.parametrize("script", ["exit 9", "echo nonsense", "echo 'Failed to initialize NVML'; exit 1"])
def test_a_broken_driver_means_no_accelerators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    fake_driver(tmp_path, script, monkeypatch)
    assert machine.accelerators() == []


def write(folder: Path, text: str) -> str:
    file = folder / "lab.toml"
    file.write_text(text)
    return str(file)


def test_a_cluster_file(tmp_path: Path) -> None:
    from planner.hardware.catalog import data_folder

    own = (data_folder() / "devices" / "a100-sxm-80gb.toml").read_text().replace("a100-sxm-80gb", "mine")
    (tmp_path / "mine.toml").write_text(own)
    text = """
    price_usd_per_hour = 12.5
    [[groups]]
    nodes = 2
    devices_per_node = 8
    device = "mine.toml"
    network = "hdr200x4"
    [[groups]]
    nodes = 1
    instance = "p5.48xlarge"
    [inter]
    gb_per_s = 20
    latency_us = 8
    sources = ["measured"]
    """
    cluster = parse_cluster(write(tmp_path, text))
    assert cluster.name == "lab"
    assert [group.device.name for group in cluster.groups] == ["mine", "h100-sxm-80gb"]
    assert cluster.inter.bytes_per_s == 20e9 and cluster.inter.latency_s == pytest.approx(8e-6)
    assert cluster.intra.bytes_per_s == 300e9
    assert cluster.price_usd_per_hour == 12.5


INSTANCE = "[[groups]]\nnodes = 1\ninstance = 'p5.48xlarge'\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "groups"),
        ("groups = []", "is empty"),
        ("[[groups]]\nnodes = 1", "either `device` or `instance`"),
        ("[[groups]]\nnodes = 1\ndevice = 'h100'", "devices_per_node"),
        ("[[groups]]\nnodes = 1\ninstance = 'p5.48xlarge'\ndevices_per_node = 8", "known from the instance"),
        ("[[groups]]\nnodes = 0\ndevice = 'h100'\ndevices_per_node = 8", "1 to 1000000"),
        ("[[groups]]\nnodes = true\ndevice = 'h100'\ndevices_per_node = 8", "groups.0.nodes"),
        ("[[groups]]\nnods = 1\ndevice = 'h100'\ndevices_per_node = 8", "did you mean 'nodes'"),
        ("name = 'local:4'\n" + INSTANCE, "name"),
        ("price_usd_per_hour = -1.0\n" + INSTANCE, "price_usd_per_hour"),
        ("price_usd_per_hour = nan\n" + INSTANCE, "price_usd_per_hour"),
        (
            INSTANCE + "[intra]\ngb_per_s = 0\nlatency_us = 1",
            "intra.gb_per_s",
        ),
        (
            INSTANCE + "[intra]\ngb_per_s = 1\nlatency_us = -1",
            "latency_us",
        ),
        ("when = 2026-01-01", "plain data"),
        ("[[groups", "is not TOML"),
    ],
)
def test_a_wrong_cluster_file_names_the_path(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_cluster(write(tmp_path, text))
    assert said in str(caught.value)
    assert "lab.toml" in str(caught.value)
