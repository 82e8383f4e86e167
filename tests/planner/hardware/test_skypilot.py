"""SkyPilot's catalogs: files in the layout of its catalog v8, with made-up prices and the known defects."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.commands.running import doctor
from planner.hardware import catalog
from planner.hardware.cluster_text import parse_cluster
from planner.hardware.instance import Instance
from planner.hardware.prices import (
    SKYPILOT_VARIABLE,
    Market,
    device_memory_mib,
    joined,
    read_market,
    shipped_market,
    skypilot_folder,
)
from planner.hardware.skypilot import LiveCatalog, catalog_files, load_names, read_live

AWS = (
    "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,"
    "AvailabilityZone,Arch"
)
GCP = (
    "InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,"
    "SpotPrice"
)
AZURE = (
    "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,Generation"
)
VAST = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region"
RUNPOD = (
    "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Region,SpotPrice,Price,AvailabilityZone,"
    "GpuInfo"
)
VERDA = (
    "InstanceType,UpstreamCloudId,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,Price,"
    "SpotPrice"
)
NAMES = load_names(catalog.data_folder() / "skypilot.toml")
MEMORY = device_memory_mib()
SHIPPED = shipped_market().instances


def gpu(name: str, count: int, mib: int, total: int | None = None) -> str:
    whole = mib * count if total is None else total
    return (
        f"\"{{'Gpus': [{{'Name': '{name}', 'Manufacturer': 'NVIDIA', 'Count': {count}, "
        f"'MemoryInfo': {{'SizeInMiB': {mib}}}}}], 'TotalGpuMemoryInMiB': {whole}}}\""
    )


H100X8 = gpu("H100", 8, 81920)


def put(folder: Path, cloud: str, header: str, *rows: str, version: str = "v8") -> Path:
    file = folder / version / cloud / "vms.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join((header, *rows)) + "\n")
    os.utime(file, (1_793_000_000, 1_793_000_000))  # 26 October 2026
    return file


def read(folder: Path) -> LiveCatalog:
    return read_live(folder, NAMES, MEMORY, SHIPPED)


def by_name(found: LiveCatalog) -> dict[str, Instance]:
    return {instance.full_name: instance for instance in found.instances}


def warnings(found: LiveCatalog) -> str:
    return "\n".join(warning.text for warning in found.warnings)


def test_an_instance_with_the_cheapest_region_and_its_date(tmp_path: Path) -> None:
    put(
        tmp_path,
        "aws",
        AWS,
        "m5.large,,,2.0,8.0,,0.096,0.03,us-east-1,use1-az1,x86_64",
        f"p5.48xlarge,H100,8.0,192.0,2048.0,{H100X8},60.0,20.5,eu-north-1,eun1-az1,x86_64",
        f"p5.48xlarge,H100,8.0,192.0,2048.0,{H100X8},50.0,19.5,us-east-1,use1-az2,x86_64",
        f"p5.48xlarge,H100,8.0,192.0,2048.0,{H100X8},50.0,18.5,us-east-1,use1-az4,x86_64",
    )
    found = read(tmp_path)
    (instance,) = found.instances
    assert (instance.full_name, instance.device, instance.devices) == (
        "aws/p5.48xlarge",
        "h100-sxm-80gb",
        8,
    )
    assert (instance.ondemand_usd_per_hour, instance.spot_usd_per_hour) == (50.0, 18.5)
    assert (instance.region, instance.as_of) == ("us-east-1", "2026-10-26")
    assert (instance.vcpus, instance.ram_gib) == (192, 2048.0)
    assert instance.source.startswith("SkyPilot catalog v8 aws/vms.csv")
    assert instance.note == "on demand 50 to 60 over 2 regions"
    assert instance.network == "efa3200", "from our own row of that name"
    assert found.warnings == ()


def test_the_region_of_our_own_row_is_kept(tmp_path: Path) -> None:
    rows = [f"Standard_ND96isr_H100_v5,H100,8,96,1900,{H100X8},{price},,{region},V2" for price, region in
            ((90.0, "westus"), (95.0, "eastus"))]  # fmt: skip
    put(tmp_path, "azure", AZURE, *rows)
    assert by_name(read(tmp_path))["azure/Standard_ND96isr_H100_v5"].region == "eastus"


def test_google_hosts_and_accelerators_are_added_up(tmp_path: Path) -> None:
    info = "{'Gpus': [{'MemoryInfo': {'SizeInMiB': 81920}}]}"
    b200 = "{'Gpus': [{'MemoryInfo': {'SizeInMiB': 184320}}]}"
    put(
        tmp_path,
        "gcp",
        GCP,
        "a3-highgpu-8g,208.0,1872.0,,,,us-east4,us-east4-a,9.5,2.5",
        f",,,H100,8,{info},us-east4,us-east4-a,78.0,18.0",
        f",,,H100,8,{info},us-east4,us-east4-b,70.0,18.0",
        f",,,B200,8,{b200},us-central1,us-central1-b,90.0,30.0",
        "a4-highgpu-8g,224.0,3968.0,,,,us-central1,us-central1-b,20.0,5.0",
        "n1-standard-4,4.0,15.0,,,,us-east1,us-east1-b,0.19,0.04",
        ",,,T4,1,{'Gpus': [{'MemoryInfo': {'SizeInMiB': 16384}}]},us-east1,us-east1-b,0.35,0.14",
        ",,,P100,1,{'Gpus': [{'MemoryInfo': {'SizeInMiB': 16384}}]},us-east1,us-east1-b,1.4,0.4",
    )
    found = by_name(read(tmp_path))
    assert set(found) == {"gcp/a3-highgpu-8g", "gcp/a4-highgpu-8g", "gcp/n1-standard-4-1xt4"}
    h100 = found["gcp/a3-highgpu-8g"]
    assert (h100.ondemand_usd_per_hour, h100.spot_usd_per_hour, h100.vcpus) == (87.5, 20.5, 208)
    whole = found["gcp/a4-highgpu-8g"]
    assert whole.ondemand_usd_per_hour == 90.0, "these rows hold the host already"
    assert found["gcp/n1-standard-4-1xt4"].ondemand_usd_per_hour == pytest.approx(0.54)
    assert "H100 x8 has no host a3-highgpu-8g in its zone" in warnings(read(tmp_path))


def test_google_regions_that_disagree_are_left_out(tmp_path: Path) -> None:
    info = "{'Gpus': [{'MemoryInfo': {'SizeInMiB': 81920}}]}"
    put(
        tmp_path,
        "gcp",
        GCP,
        *(f"a3-highgpu-8g,208.0,1872.0,,,,{z},{z}-a,9.5,2.5" for z in ("us-central1", "us-east4", "asia")),
        f",,,H100,8,{info},us-central1,us-central1-a,33.6,23.9",
        f",,,H100,8,{info},us-east4,us-east4-a,78.4,17.9",
        f",,,H100,8,{info},asia,asia-a,90.0,17.9",
    )
    found = read(tmp_path)
    assert by_name(found)["gcp/a3-highgpu-8g"].ondemand_usd_per_hour == pytest.approx(87.9)
    assert "H100 x8 costs 33.6 in us-central1, 90 elsewhere" in warnings(found)


def test_google_tpu_slices_of_one_host_and_placeholders(tmp_path: Path) -> None:
    put(
        tmp_path,
        "gcp",
        GCP,
        *(f",,,tpu-v6e-4,1,tpu-v6e-4,r{i},r{i}-a,10.8,2.2" for i in range(4)),
        ",,,tpu-v6e-4,1,tpu-v6e-4,asia-east1,asia-east1-c,700.0,700.0",
        ",,,tpu-v6e-4,1,tpu-v6e-4,south,south-a,10.8,700.0",
        ",,,tpu-v6e-256,1,tpu-v6e-256,r1,r1-a,691.2,139.3",
        ",,,tpu-v5p-8,1,tpu-v5p-8,us-east5,us-east5-a,16.8,6.7",
    )
    found = read(tmp_path)
    live = by_name(found)
    v6e, v5p = live["gcp/tpu-v6e-4"], live["gcp/tpu-v5p-8"]
    assert (v6e.device, v6e.devices, v6e.ondemand_usd_per_hour) == ("tpu-v6e-trillium", 4, 10.8)
    assert (v5p.device, v5p.devices) == ("tpu-v5p", 4), "a v5p slice is named by its cores, two a chip"
    assert len(live) == 2, "a slice of 256 chips is a cluster"
    assert "2 rows left out: tpu-v6e-4 costs 175 dollars a device-hour" in warnings(found)


def test_twelve_devices_and_equal_spot_prices_of_azure(tmp_path: Path) -> None:
    twelve = gpu("H100", 12, 81920)
    put(
        tmp_path,
        "azure",
        AZURE,
        f"Standard_ND96isr_H100_v5,H100,12,96,1900,{twelve},98.3,98.3,eastus,V2",
        f"Standard_ND96isr_H100_v5,H100,12,96,1900,{twelve},98.3,98.3,westus,V2",
        f"Standard_ND96amsr_A100_v4,A100-80GB,8,96,1900,{gpu('A100', 8, 81920)},32.8,32.8,eastus,V2",
        f"Standard_NC24ads_A100_v4,A100-80GB,1,24,220,{gpu('A100', 1, 81920)},3.7,0.7,eastus,V2",
    )
    found = read(tmp_path)
    live = by_name(found)
    assert "azure/Standard_ND96isr_H100_v5" not in live
    assert "2 rows left out: Standard_ND96isr_H100_v5 has 12 devices" in warnings(found)
    assert live["azure/Standard_ND96amsr_A100_v4"].spot_usd_per_hour is None
    assert "spot prices left out" in warnings(found)
    assert live["azure/Standard_NC24ads_A100_v4"].device == "a100-pcie-80gb"
    assert live["azure/Standard_ND96amsr_A100_v4"].device == "a100-sxm-80gb"


def test_vast_states_the_memory_of_all_devices_and_spot_prices_of_0(tmp_path: Path) -> None:
    put(
        tmp_path,
        "vast",
        VAST,
        f'1x-H100_NVL-32,H100,1,32,64.0,{gpu("H100", 1, 95830)},2.1,0.00,"Bulgaria, BG, EU"',
        f'8x-H100_SXM-32,H100,8,32,64.0,{gpu("H100", 8, 652472, 652472)},16.0,0.00,"Vietnam, VN, AS"',
        f'2x-A100_SXM4-32,A100,2,32,64.0,{gpu("A100", 2, 81920, 81920)},1.5,0.00,"Slovenia, SI, EU"',
        f'1x-A100_PCIE-32,A100,1,32,64.0,{gpu("A100", 1, 81920)},0.9,0.00,"Oklahoma, US, NA"',
        f'1x-RTX_4090-32,RTX4090,1,32,64.0,{gpu("RTX4090", 1, 49140)},0.4,0.00,"Hong Kong, HK, AS"',
        f'5x-RTX_4090-32,RTX4090,5,32,64.0,{gpu("RTX4090", 5, 122820, 122820)},2.0,0.00,"Iceland, IS, EU"',
    )
    found = read(tmp_path)
    devices = {instance.name: instance.device for instance in found.instances}
    assert devices == {
        "1x-H100_NVL-32": "h100-nvl-94gb",
        "8x-H100_SXM-32": "h100-sxm-80gb",
        "2x-A100_SXM4-32": "a100-sxm-40gb",
        "1x-A100_PCIE-32": "a100-pcie-80gb",
    }
    assert all(instance.spot_usd_per_hour is None for instance in found.instances)
    text = warnings(found)
    assert "1x-RTX_4090-32 has 49140 MiB a device, which no RTX4090 has" in text
    assert "5x-RTX_4090-32 has 5 devices" in text
    assert "6 spot prices left out" not in text and "5 spot prices left out" in text


def test_runpod_states_gb_and_verda_json(tmp_path: Path) -> None:
    put(
        tmp_path,
        "runpod",
        RUNPOD,
        f"1x_A100-80GB_SECURE,A100-80GB,1.0,8.0,117.0,IN,1.39,1.39,AP-IN-1,{gpu('A100 PCIe', 1, 80)}",
        f"1x_H100-SXM_SECURE,H100-SXM,1.0,8.0,117.0,IN,1.5,2.7,AP-IN-1,{gpu('H100 SXM', 1, 80)}",
    )
    info = '"{""Gpus"": [{""Name"": ""B200"", ""MemoryInfo"": {""SizeInMiB"": 184320}}]}"'
    put(tmp_path, "verda", VERDA, f"8B200.240V,8B200.240V,240.0,1472.0,B200,8.0,{info},FIN-03,,13.69")
    live = by_name(read(tmp_path))
    assert live["runpod/1x_A100-80GB_SECURE"].device == "a100-pcie-80gb"
    assert live["runpod/1x-h100-sxm-secure"].spot_usd_per_hour == 1.5, "our own spelling of the name"
    only_spot = live["verda/8B200.240V"]
    assert (only_spot.ondemand_usd_per_hour, only_spot.spot_usd_per_hour) == (None, 13.69)


@pytest.mark.parametrize(
    ("count", "price", "spot", "reason"),
    [
        ("8", "nan", "", "'nan' for a number"),
        ("8", "inf", "", "'inf' for a number"),
        ("8", "-5", "", "costs -5"),
        ("8", "0", "", "not above 0"),
        ("8", "1e300", "", "median"),
        ("8", "12,5", "", "cells where the header has 11"),
        ("8", "free", "", "'free' for a number"),
        ("8", "60", "61", "more as spot"),
        ("8", "60", "-1", "costs -1"),
        ("8", "2", "", "median of all clouds"),
        ("8", "999", "", "median of all clouds"),
        ("7", "60", "", "7 devices"),
        ("2.5", "60", "", "2.5 devices"),
        ("1e9", "60", "", "devices"),
        ("-8", "60", "", "devices"),
        ("eight", "60", "", "'eight' for a number"),
    ],
)
def test_hostile_numbers_are_left_out_with_a_warning(
    tmp_path: Path, count: str, price: str, spot: str, reason: str
) -> None:
    good = f"p5en.48xlarge,H200,8,192,2048,{gpu('H200', 8, 144384)},63.0,20.0,us-east-1,a,x86_64"
    put(tmp_path, "aws", AWS, f"p5.48xlarge,H100,{count},192,2048,{H100X8},{price},{spot},us,a,x86_64", good)
    found = read(tmp_path)
    assert set(by_name(found)) == {"aws/p5en.48xlarge"}
    assert reason in warnings(found)
    assert "p5.48xlarge" in warnings(found)


@pytest.mark.parametrize("count", ["0.25", "", "0.5"])
def test_parts_of_a_device_are_no_instance_and_no_fault(tmp_path: Path, count: str) -> None:
    put(tmp_path, "aws", AWS, f"g6f.large,L4,{count},2,8,{gpu('L4', 1, 22888)},0.2,0.1,us,a,x86_64")
    assert read(tmp_path) == LiveCatalog(instances=(), warnings=())


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b"\x00\xff\xfe\x80" * 100, "is not text"),
        (b"\x00" * 50, "lacks the columns"),
        (b"hello\nworld\n", "lacks the columns InstanceType"),
        (b"InstanceType,Price\na,b\n", "lacks the columns AcceleratorName"),
        ((AWS + '\n"never closed,H100,8').encode(), "is not CSV"),
        ((AWS + "\n" + "x" * 200_000 + ",H100,8").encode(), "is not CSV"),
    ],
)
def test_files_that_are_none_become_one_warning(tmp_path: Path, content: bytes, fault: str) -> None:
    put(tmp_path, "aws", AWS).write_bytes(content)
    put(tmp_path, "nebius", VAST, f"gpu-h100,H100,8,128,1600,{H100X8},23.6,10.0,eu-north1")
    found = read(tmp_path)
    assert set(by_name(found)) == {"nebius/gpu-h100"}, "the other files are still read"
    (warning,) = found.warnings
    assert warning.provider == "aws" and fault in warning.text


def test_short_rows_and_wild_names_do_no_harm(tmp_path: Path) -> None:
    put(
        tmp_path,
        "aws",
        AWS,
        "p5.48xlarge,H100",
        f"p5@evil + rm,H100,8,192,2048,{H100X8},60.0,20.0,us,a,x86_64",
        f"p5\x1b[31m,H100,8,192,2048,{H100X8},60.0,20.0,us,a,x86_64",
        f"p5.48xlarge,H100,8,many,-1,{H100X8},60.0,20.0,us\x1b[31m,a,x86_64",
    )
    found = read(tmp_path)
    (instance,) = found.instances
    assert (instance.vcpus, instance.ram_gib, instance.region) == (None, None, "us[31m")
    assert "\x1b" not in warnings(found) and "3 rows left out" in warnings(found)


def test_a_folder_in_place_of_a_file_and_a_huge_one(tmp_path: Path) -> None:
    (tmp_path / "v8" / "aws" / "vms.csv").mkdir(parents=True)
    huge = put(tmp_path, "gcp", GCP)
    with huge.open("r+b") as file:
        file.truncate(65 * 1024 * 1024)
    text = warnings(read(tmp_path))
    assert "aws/vms.csv is a folder" in text and "gcp/vms.csv has 68157440 bytes" in text


def test_the_newest_version_of_each_cloud_is_read(tmp_path: Path) -> None:
    old = put(tmp_path, "azure", AZURE, version="v6")
    put(tmp_path, "aws", AWS, version="v9")
    new = put(tmp_path, "aws", AWS, version="v10")
    put(tmp_path, "aws", AWS, version="vnext")
    assert catalog_files(tmp_path) == {"aws": new, "azure": old}
    assert catalog_files(tmp_path / "absent") == {}


def test_where_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert skypilot_folder() is None
    monkeypatch.setenv(SKYPILOT_VARIABLE, str(tmp_path))
    assert skypilot_folder() == tmp_path
    monkeypatch.delenv(SKYPILOT_VARIABLE)
    monkeypatch.setenv("SKY_RUNTIME_DIR", str(tmp_path))
    assert skypilot_folder() is None
    (tmp_path / ".sky" / "catalogs").mkdir(parents=True)
    assert skypilot_folder() == tmp_path / ".sky" / "catalogs"
    monkeypatch.delenv("SKY_RUNTIME_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert skypilot_folder() == tmp_path / ".sky" / "catalogs"


def test_the_newer_of_two_prices_wins() -> None:
    own = next(row for row in SHIPPED if row.name == "Standard_ND96isr_H100_v5")
    assert own.as_of == "2026-09-06"
    for date, price, wins in (
        ("2026-09-05", 90.0, False),
        ("2026-09-06", 90.0, True),
        ("2026-10-01", 90.0, True),
        ("2026-10-01", None, False),
    ):
        live = _changed(own, as_of=date, ondemand_usd_per_hour=price)
        (row,) = joined((own,), (live,))
        assert (row == live) == wins, date
    undated = next(row for row in SHIPPED if row.as_of == "undated")
    live = _changed(undated, as_of="2025-01-01")
    other = _changed(undated, name="another")
    assert joined((undated,), (live, other)) == (live, other)


def _changed(instance: Instance, **values: object) -> Instance:
    import dataclasses

    return dataclasses.replace(instance, **values)  # type: ignore[arg-type]  # fields of an instance


@pytest.fixture
def live_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(SKYPILOT_VARIABLE, str(tmp_path))
    put(
        tmp_path,
        "aws",
        AWS,
        f"p5.48xlarge,H100,8,192,2048,{H100X8},44.0,12.0,us-east-1,a,x86_64",
        f"p9.48xlarge,B200,8,192,2048,{gpu('B200', 8, 184320)},100.0,30.0,us-east-1,a,x86_64",
    )
    put(tmp_path, "azure", AZURE, f"Standard_X,H100,12,96,1900,{H100X8},98.3,98.3,eastus,V2")
    return tmp_path


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(cli, list(arguments), prog_name="plan")
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.usefixtures("live_folder")
def test_the_commands_use_them_and_warn() -> None:
    listed = run("list", "instances", "--json")
    rows = {row["name"]: row for row in json.loads(listed.stdout)["instances"]}
    assert rows["aws/p5.48xlarge"]["ondemand_usd_per_hour"] == 44.0
    assert "SkyPilot catalog v8" in rows["aws/p5.48xlarge"]["source"]
    assert rows["aws/p9.48xlarge"]["device"] == "b200-sxm"
    assert len(rows) == len(SHIPPED) + 1
    assert "warning: SkyPilot's azure/vms.csv: 1 row left out: Standard_X has 12 devices" in listed.stderr
    shown = run("show", "cluster", "4*p5.48xlarge")
    assert "44 on demand, read, 2026-10-26 (SkyPilot catalog v8 aws/vms.csv" in shown.stdout
    assert "azure" not in shown.stderr, "only the providers that are named"
    unnetworked = CliRunner().invoke(cli, ["show", "cluster", "4*p9.48xlarge"], prog_name="plan")
    assert unnetworked.exit_code == 2 and "name it, as in" in unnetworked.stderr
    named = json.loads(run("show", "cluster", "4*p9.48xlarge@efa3200", "--json").stdout)
    assert named["price_usd_per_hour"] == 400.0


def findings(name: str) -> dict[str, str]:
    report = json.loads(run("doctor", "--json").stdout)
    (found,) = (finding for finding in report["findings"] if finding["what"] == name)
    return dict(found)


def test_doctor_says_which_catalogs_are_there(live_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_torch_facts", lambda: None)
    found = findings("SkyPilot's catalogs")
    assert found["state"] == "ok" and "aws, azure" in found["detail"] and "2026-10-26" in found["detail"]
    monkeypatch.setenv(SKYPILOT_VARIABLE, str(live_folder / "absent"))
    assert findings("SkyPilot's catalogs")["state"] == "note"


def test_the_users_own_price_wins_over_them(live_folder: Path) -> None:
    prices = live_folder / "prices.toml"
    prices.write_text('[instances."p9.48xlarge"]\nusd_per_hour = 70.0\n')
    market = read_market(prices, live=False)
    assert market.instance("p9.48xlarge").ondemand_usd_per_hour == 70.0
    assert market.instance("p5.48xlarge").ondemand_usd_per_hour == 44.0


@pytest.mark.usefixtures("live_folder")
def test_a_library_call_without_a_market_reads_the_shipped_catalog_alone() -> None:
    assert parse_cluster("1*p5.48xlarge").price_usd_per_hour == 55.04
    assert parse_cluster("1*p5.48xlarge", market=Market(instances=SHIPPED)).price_usd_per_hour == 55.04
    assert parse_cluster("1*p5.48xlarge", market=read_market()).price_usd_per_hour == 44.0


def test_every_device_of_the_names_is_in_the_catalog() -> None:
    devices = {device for found in NAMES.accelerators.values() for device in found}
    devices |= {tpu.device for tpu in NAMES.tpus.values()}
    assert devices <= set(catalog.device_names())
    for sizes in (*NAMES.hosts["gcp"], *NAMES.whole["gcp"]):
        assert sizes in NAMES.accelerators
