"""The catalog: every file decodes strictly, carries its sources, and is found by name."""

from __future__ import annotations

import csv
import math
import tomllib
from pathlib import Path

import pytest

from planner.foundation.decode import decode, encode
from planner.foundation.errors import InputError
from planner.foundation.suggest import nearest_names, normalized
from planner.foundation.units import GIB
from planner.hardware import catalog
from planner.hardware.device_file import DeviceFile, load_device_file
from planner.hardware.instance import load_instances
from planner.hardware.measured_tables import table_of
from planner.hardware.network import NetworkFile, load_networks, parse_network

DEVICES = catalog.device_names()
MODELS = list(catalog.model_index())


def test_the_catalog_has_its_size() -> None:
    assert len(DEVICES) == 41
    assert len(MODELS) == 124
    assert len(catalog.instances()) == 182


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_file_is_whole_and_sane(name: str) -> None:
    facts = catalog.load_device(name)
    assert facts.name == name
    assert decode(DeviceFile, encode(facts), source=name) == facts
    for group in (facts.memory, facts.peak_tflops, facts.link, facts.measured, facts.pcie, facts.power):
        assert group is None or group.sources
    device = facts.device()
    assert 8 * GIB < device.usable_memory_bytes < device.memory_bytes < 400 * GIB
    assert facts.peak_tflops.bf16 or facts.peak_tflops.fp16
    if facts.measured is not None and facts.peak_tflops.bf16 is not None:
        assert 0.4 < facts.measured.bf16_gemm_tflops / facts.peak_tflops.bf16 < 1.0
    assert catalog.load_network(facts.network).link(8).latency_s > 0


def same(written: object, decoded: object) -> bool:
    """Whether every value of a file is in what was decoded, and nothing else that says anything."""
    if isinstance(written, dict) and isinstance(decoded, dict):
        silent = (None, (), "", False)
        return all(same(written[key], decoded[key]) for key in written) and all(
            decoded[key] in silent for key in set(decoded) - set(written)
        )
    if isinstance(written, list) and isinstance(decoded, tuple | list):
        return len(written) == len(decoded) and all(map(same, written, decoded))
    return written == decoded


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_file_is_what_its_decoded_form_says(name: str) -> None:
    table = tomllib.loads((catalog.data_folder() / "devices" / f"{name}.toml").read_text())
    assert same(table, encode(catalog.load_device(name)))
    assert not same(table, {**encode(catalog.load_device(name)), "title": "another"})
    assert not same({**table, "aliases": ["other"]}, encode(catalog.load_device(name)))


@pytest.mark.parametrize("name", DEVICES)
def test_what_is_unverified_names_keys_of_its_group(name: str) -> None:
    table = tomllib.loads((catalog.data_folder() / "devices" / f"{name}.toml").read_text())
    groups = [table, *(value for value in table.values() if isinstance(value, dict))]
    for group in groups:
        for key in group.get("unverified", []):
            assert key in group, (name, key)


def figures_of(name: str) -> dict[str, str]:
    with (Path(__file__).parents[2] / "data" / "device_figures.csv").open(
        encoding="utf-8", newline=""
    ) as file:
        return next(row for row in csv.DictReader(file) if row["device"] == name)


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_file_states_the_gathered_figures(name: str) -> None:
    """Every number against the table that the files were written from; empty there is unknown here.

    Links and PCIe are given both ways there. Two figures were found later: PCIe6 of three Blackwell parts.
    """
    facts, row = catalog.load_device(name), figures_of(name)
    peaks = facts.peak_tflops
    stated: dict[str, float | None] = {
        "nominal_gb": facts.memory.nominal_gb,
        "reported_mib": facts.memory.reported_mib,
        "usable_gib": facts.memory.usable_gib,
        "bandwidth_gb_per_s": facts.memory.bandwidth_gb_per_s,
        **{key: getattr(peaks, key) for key in ("fp32", "tf32", "bf16", "fp16", "fp8", "fp4")},
        "measured_bf16": facts.measured.bf16_gemm_tflops if facts.measured else None,
        "link_both_ways_gb_per_s": 2 * facts.link.gb_per_s,
        "pcie_generation": facts.pcie.generation if facts.pcie else None,
        "tdp_w": facts.power.tdp_w if facts.power else None,
        **{key: getattr(facts.price, key, None) for key in ("low_usd", "typical_usd", "high_usd")},
        "year": facts.year,
    }
    if row["pcie_both_ways_gb_per_s"]:
        assert facts.pcie is not None
        stated["pcie_both_ways_gb_per_s"] = 2 * facts.pcie.gb_per_s
    for key, value in stated.items():
        assert value == (float(row[key]) if row[key] else None), key


NAMES_OF_MEMORY = {
    "total_mib": "reported_mib", "mem_bw": "bandwidth_gb_per_s", "tdp": "tdp_w", "ici": "gb_per_s",
    "link": "gb_per_s", "link_bridge": "name", "price_low": "low_usd", "price_typ": "typical_usd",
    "price_high": "high_usd",
}  # fmt: skip


@pytest.mark.parametrize("name", DEVICES)
def test_what_was_recalled_is_marked(name: str) -> None:
    """Every figure that the table says is from memory is `unverified` in the file; fp16 goes with bf16."""
    facts, row = catalog.load_device(name), figures_of(name)
    groups = (facts, facts.memory, facts.peak_tflops, facts.link, facts.power, facts.price)
    marked = {key for group in groups if group is not None for key in group.unverified}
    prices = {key for key in ("low_usd", "typical_usd", "high_usd") if getattr(facts.price, key, None)}
    expected: set[str] = set()
    for word in filter(None, row["unverified"].split(";")):
        expected |= prices if word == "price" else {NAMES_OF_MEMORY.get(word, word)}
    if "bf16" in expected and facts.peak_tflops.fp16 is not None:
        expected.add("fp16")
    assert marked == expected


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_has_a_curve_or_a_share_or_is_known_to_have_neither(name: str) -> None:
    """What collectives reach of the link: measured, taken from a like link, or unknown and so nominal."""
    facts = catalog.load_device(name)
    unknown = {"mi250x", "gaudi2", "gaudi3", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e-trillium"}
    unknown.add("tpu-v7x-ironwood")
    curve, share = table_of(name, "collectives"), facts.link.share
    assert (curve is not None) + (share is not None) + (name in unknown) == 1
    if share is not None:
        assert any(source.startswith("share: ") for source in facts.link.sources)
        assert facts.link_of(1).share == share
        assert facts.link_of(1).share_origin == "fitted"


def test_published_figures_of_known_devices() -> None:
    """Spot checks against figures that many sources print."""
    h100 = catalog.load_device("h100").device()
    assert (h100.name, h100.peak_bf16_flops, h100.memory_bandwidth_bytes_per_s) == (
        "h100-sxm-80gb",
        989e12,
        3350e9,
    )
    assert h100.link_bytes_per_s == 450e9
    a100 = catalog.load_device("a100-80gb").device()
    assert (a100.peak_bf16_flops, a100.peak_fp32_flops) == (312e12, 19.5e12)
    v100 = catalog.load_device("v100").device()
    assert v100.peak_bf16_flops is None and v100.peak_fp16_flops == 125e12


def test_the_sources_of_one_model_are_those_of_the_index() -> None:
    for name, entry in catalog.model_index().items():
        assert catalog.model_sources(name) == entry.sources
    for other in ("", "none", "llama-7b ", 'llama-7b"]\n["llama-13b', "../llama-7b"):
        assert catalog.model_sources(other) is None


def test_names_and_aliases_are_unambiguous() -> None:
    devices = [catalog.load_device(name) for name in DEVICES]
    device_names = [normalized(n) for d in devices for n in {d.name, *d.aliases}]
    assert len(device_names) == len(set(device_names))
    reported = [normalized(n) for d in devices for n in d.reported_names]
    assert len(reported) == len(set(reported))
    index = catalog.model_index()
    model_names = [normalized(n) for name, entry in index.items() for n in {name, *entry.aliases}]
    assert len(model_names) == len(set(model_names))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_catalog_loads_with_its_sources(name: str) -> None:
    model = catalog.load_model(name)
    assert model.name == name
    assert model.sources
    assert not any("not read" in source or "not described" in source for source in model.sources)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("llama-3-8b", "llama-3-8b"),
        ("Llama-3-8B", "llama-3-8b"),
        ("gpt3-175b", "gpt-3-175b"),
        ("gpt2", "gpt-2-124m"),
        ("gpt2_xl", "gpt-2-xl"),
        ("llama-3.1-70b", "llama-3.1-70b"),
    ],
)
def test_models_are_found_however_they_are_written(text: str, name: str) -> None:
    assert catalog.load_model(text).name == name


def test_a_model_may_be_a_path(tmp_path: Path) -> None:
    text = (catalog.data_folder() / "models" / "llama-3-8b.json").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(text)
    for path in (tmp_path / "mine", tmp_path / "mine" / "config.json"):
        model = catalog.load_model(str(path))
        assert (model.name, model.params_total) == ("mine", 8_030_261_248)


@pytest.mark.parametrize("text", ["llama-3-80b", "lama-3-8b"])
def test_an_unknown_model_is_answered_with_the_nearest(text: str) -> None:
    with pytest.raises(InputError, match=r"Did you mean llama-3-8b"):
        catalog.load_model(text)


@pytest.mark.parametrize(
    "text", ["", "no-such-thing-at-all", "x" * 10_000, "a\0b", "./absent", "absent.json"]
)
def test_what_is_no_model_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError) as caught:
        catalog.load_model(text)
    assert len(str(caught.value)) < 12_000


def test_an_unknown_device_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="h100"):
        catalog.load_device("h101")


def test_a_device_is_known_by_what_its_driver_calls_it() -> None:
    known = catalog.device_reported_as("NVIDIA H100 80GB HBM3")
    assert known is not None and known.name == "h100-sxm-80gb"
    assert catalog.device_reported_as("NVIDIA Quadro 9") is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("gb_per_s = 300", "gb_per_s = -1"), "link.gb_per_s"),
        (("bf16 = 312", 'bf16 = "312"'), "peak_tflops.bf16"),
        (("bf16 = 312", "bf16 = nan"), "peak_tflops.bf16"),
        (("usable_gib = 79.25", "usable_gib = 90"), "memory.usable_gib"),
        (("usable_gib = 79.25", "usable_gb = 79.25"), "usable_gb"),
        (("reported_mib = 81920", "reported_mib = 0"), "memory.reported_mib"),
        (("domain = 8", "domain = 8\nshare = 1.2"), "link.share"),
        (("domain = 8", "domain = 8\nshare = 0"), "link.share"),
        (("tdp_w = 400", "tdp_w = -400"), "power.tdp_w"),
        (("typical_usd = 12000", "typical_usd = inf"), "price.typical_usd"),
    ],
)
def test_a_wrong_device_file_names_the_key(tmp_path: Path, change: tuple[str, str], fault: str) -> None:
    text = (catalog.data_folder() / "devices" / "a100-sxm-80gb.toml").read_text()
    assert change[0] in text
    file = tmp_path / "mine.toml"
    file.write_text(text.replace(*change))
    with pytest.raises(InputError, match=fault):
        load_device_file(file)


def test_networks_give_each_device_its_share() -> None:
    link = catalog.load_network("hdr200x8").link(8)
    assert link.bytes_per_s == 25e9 and link.latency_s > 0
    assert catalog.load_network("hdr200x4").link(8).bytes_per_s == 12.5e9
    assert catalog.load_network("eth100").link(4).bytes_per_s == pytest.approx(3.125e9)
    free = catalog.load_network("none").link(8)
    assert free.bytes_per_s is None and free.latency_s == 0
    beyond = catalog.load_network("nvl72-xdr800")
    assert beyond.domain == 72 and beyond.link(72).bytes_per_s == 100e9


def test_the_file_of_networks_comes_back_from_plain_data() -> None:
    file = catalog.networks()
    assert decode(NetworkFile, encode(file), source="networks.toml") == file
    text = (catalog.data_folder() / "clusters" / "networks.toml").read_text()
    assert same(tomllib.loads(text), encode(file))
    for name, kind in file.kinds.items():
        assert set(kind.unverified) <= {"latency_us", "share"}, name
        assert kind.share is None or any("share" in source for source in kind.sources), name


@pytest.mark.parametrize(("old", "new", "fault"), [
    ("share = 0.81", "share = 1.81", r"kinds\.hdr\.share"),
    ("latency_us = 50", "latency_us = -1", r"kinds\.efa\.latency_us"),
    ("share = 0.86", 'share = "most"', r"kinds\.ndr\.share"),
    ("links = ", "linked = ", "linked"),
])  # fmt: skip
def test_a_wrong_file_of_networks_names_the_key(tmp_path: Path, old: str, new: str, fault: str) -> None:
    text = (catalog.data_folder() / "clusters" / "networks.toml").read_text()
    assert old in text
    (tmp_path / "networks.toml").write_text(text.replace(old, new))
    with pytest.raises(InputError, match=fault):
        load_networks(tmp_path / "networks.toml")


def test_a_network_says_what_of_it_is_reached() -> None:
    link = catalog.load_network("hdr200x8").link(8)
    assert (link.share, link.share_origin) == (0.81, "fitted")
    assert catalog.load_network("eth100").link(8).share_origin == "datasheet", "from memory"
    assert catalog.load_network("none").link(8).share is None


def test_every_common_network_reads_back() -> None:
    file = catalog.networks()
    for name in file.common:
        network = parse_network(name, file, "test")
        assert network.name == name and network.kind.sources
    assert parse_network("HDR200x8", file, "test").name == "hdr200x8"


@pytest.mark.parametrize(
    "text",
    [
        "", "hdr", "hdr200x0", "hdr0x8", "hdr400x8", "hdr200x8x2", "none8", "nvl72x2", "nvl72-none",
        "nvl72-nvl8", "nvl1", "foo100", "hdr200x8-ndr400", "eth999999", "200x8", "hdr 200", "nvl72-",
        "x" * 500,
    ],
)  # fmt: skip
def test_a_wrong_network_says_how_it_is_written(text: str) -> None:
    with pytest.raises(InputError, match="hdr200x8") as caught:
        catalog.load_network(text)
    assert len(str(caught.value)) < 700


def test_every_instance_resolves() -> None:
    for instance in catalog.instances():
        assert instance.device in DEVICES
        assert 1 <= instance.devices <= 16
        assert instance.price_mark in ("", "-") or instance.source or instance.provider
        if instance.network:
            link = catalog.load_network(instance.network).link(instance.devices)
            assert link.bytes_per_s is not None and 1e8 < link.bytes_per_s < 1e12
        price = instance.ondemand_usd_per_hour
        assert price is None or (math.isfinite(price) and 0 < price / instance.devices < 30)
        found = catalog.load_instance(instance.full_name)
        assert found == instance


def test_instances_are_found_with_and_without_their_provider() -> None:
    assert catalog.load_instance("p5.48xlarge") == catalog.load_instance("AWS/P5.48xlarge")
    with pytest.raises(InputError, match=r"p5\.48xlarge"):
        catalog.load_instance("p5.48xlage")
    with pytest.raises(InputError, match="providers"):
        catalog.load_instance("shadeform-listing-8x")
    with pytest.raises(InputError):
        catalog.load_instance("gcp/p5.48xlarge")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [(",8,", ",eight,", "devices"), ("devices,network", "devices,net", "network"), ("55.04", "nan", "usd")],
)
def test_a_wrong_instance_row_names_line_and_column(tmp_path: Path, old: str, new: str, fault: str) -> None:
    text = (catalog.data_folder() / "instances.csv").read_text()
    assert old in text
    file = tmp_path / "instances.csv"
    file.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=rf"line \d+.*{fault}"):
        load_instances(file)


def test_a_dash_between_digits_counts() -> None:
    assert normalized("LLaMA_2-7B") == normalized("llama2-7b") != normalized("llama-27b")


def test_nearest_ignores_case_and_dashes() -> None:
    assert nearest_names("GPT2XL", ["gpt-2-xl", "llama-7b"])[0] == "gpt-2-xl"
    assert nearest_names("zzzz", ["gpt-2-xl"]) == []
