"""`plan list` and `plan show` of devices, networks and links, as people and programs read them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.hardware import catalog

WIDTH = 120


def text_of(*args: str) -> str:
    result = CliRunner().invoke(cli, list(args))
    assert result.exit_code == 0, result.output
    return result.stdout


def json_of(*args: str) -> Any:
    return json.loads(text_of(*args, "--json"))


@pytest.mark.parametrize("what", ["devices", "networks", "links"])
def test_a_list_fits_the_screen_and_says_where_its_figures_are_from(what: str) -> None:
    lines = text_of("list", what).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "ources" in lines[-1], "a legend ends the table"
    rows = json_of("list", what)[what]
    assert len(rows) == lines.index("") - 1
    assert all(row.get("sources") or row.get("source") for row in rows)


def test_figures_from_memory_are_marked_in_the_list() -> None:
    rows = {row["name"]: row for row in json_of("list", "devices")["devices"]}
    assert rows["rtx-3090"]["unverified"] == ["fp32_tflops", "bf16_tflops", "fp16_tflops", "typical_usd"]
    assert rows["h100-sxm-80gb"]["unverified"] == []
    line = next(line for line in text_of("list", "devices").splitlines() if line.startswith("rtx-3090 "))
    assert "71?" in line and "936 " in line


@pytest.mark.parametrize("name", catalog.device_names())
def test_every_number_of_a_device_stands_beside_its_source(name: str) -> None:
    shown = json_of("show", "device", name)
    figures = {figure["figure"]: figure for figure in shown["figures"]}
    for figure in figures.values():
        assert figure["source"] and figure["origin"] in ("read", "memory", "derived", "unknown")
        assert (figure["origin"] == "unknown") == (figure["value"] is None)
        assert figure["origin"] != "memory" or "from memory" in figure["source"]
    for group, facts in shown["facts"].items():
        if isinstance(facts, dict):
            numbers = [k for k, v in facts.items() if isinstance(v, (int, float))]
            assert {f"{group}.{key}" for key in numbers} <= set(figures)
            assert all(figures[f"{group}.{key}"]["origin"] == "memory" for key in facts.get("unverified", ())
                       if key in numbers)  # fmt: skip
    assert max(map(len, text_of("show", "device", name).splitlines())) <= WIDTH


def test_show_device_summarises_what_was_measured() -> None:
    shown = json_of("show", "device", "h100")
    rows = {(row["op"], row["ranks"]): row for row in shown["measured_collectives"]}
    assert len(rows) == 12
    assert rows[("all_reduce", 8)] == {
        "op": "all_reduce", "ranks": 8, "latency_us": 15.59, "busbw_1mib_gb_per_s": 66.19,
        "busbw_16mib_gb_per_s": 233.83, "busbw_256mib_gb_per_s": 425.0,
    }  # fmt: skip
    assert shown["measured_products"]["own"] and len(shown["measured_products"]["rows"]) == 168
    text = text_of("show", "device", "h100")
    assert "697" in text and "425" in text and "AIC" in text


def test_show_device_says_what_is_not_measured_and_why() -> None:
    assert "degraded" in text_of("show", "device", "l40s")
    borrowed = json_of("show", "device", "v100")["measured_products"]
    assert not borrowed["own"] and borrowed["table"] == "a100_sxm"
    assert json_of("show", "device", "mi300x")["measured_products"] is None
    assert "unknown" in text_of("show", "device", "v100"), "the peak in bf16"


@pytest.mark.parametrize("name", catalog.networks().common)
def test_every_network_is_shown_with_its_sources(name: str) -> None:
    shown = json_of("show", "network", name)
    assert shown["name"] == name and shown["sources"]
    if name != "none":
        assert shown["bytes_per_s_per_device"] > 0 and 0 < shown["share"] <= 1
    text = text_of("show", "network", name)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert ("unverified" in text) == bool(shown["unverified"])


def test_show_network_gives_the_measured_curves() -> None:
    shown = json_of("show", "network", "efa3200")
    assert len(shown["measured_collectives"]) == 47
    assert {row["link"][:6] for row in shown["link_figures"]} == {
        "EFA v1",
        "EFA v2",
        "EFA v3",
        "EFA v4",
        "EFA si",
    }
    assert "381.8" in text_of("show", "network", "efa3200")


def test_an_unknown_network_is_refused_with_the_nearest() -> None:
    result = CliRunner().invoke(cli, ["show", "network", "hdr300x8"])
    assert result.exit_code == 2 and "hdr200x8" in result.stderr


def test_show_cluster_says_what_collectives_reach() -> None:
    text = text_of("show", "cluster", "2x8:a100-sxm-80gb@hdr200x8")
    assert "reach 81%" in text and "measured curves (AIC, a100_sxm)" in text
    assert "measured curves" not in text_of("show", "cluster", "2x8:mi300x@hdr200x8")


@pytest.mark.parametrize("what", ["devices", "links"])
def test_a_list_answers_without_what_it_does_not_need(what: str) -> None:
    """What keeps `plan list` quick: no validation library, no numbers library."""
    code = (
        "import sys\nfrom planner.cli import cli\n"
        f"try:\n    cli.main(['list', '{what}'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'pydantic', 'numpy', 'pandas', 'rich', 'torch', 'networkx', 'pulp', 'scipy'}))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "[]"
