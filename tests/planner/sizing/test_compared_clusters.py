"""`plan compare --cluster`: clusters of one kind of node each, at the numbers that were named."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.foundation.errors import InputError
from planner.hardware.cluster_text import EqualNodes, parse_cluster, read_equal_nodes
from planner.hardware.prices import shipped_market
from planner.sizing.comparison import Pricing
from planner.sizing.offers import offers_of_clusters

ASKED = ["compare", "--model", "llama-3.2-1b", "--tokens", "1B", "--seq", "2048", "--batch", "128", "--json"]


def test_equal_nodes_are_read_as_they_stand() -> None:
    assert read_equal_nodes("8*p5.48xlarge") == EqualNodes(nodes=8, instance="p5.48xlarge")
    shaped = EqualNodes(nodes=4, devices_per_node=8, device="h100", network="ndr400x8")
    assert read_equal_nodes("4x8:h100@ndr400x8") == shaped
    assert read_equal_nodes("1x8:h100+1x8:a100") is None and read_equal_nodes("local:2") is None


def test_offers_name_their_clusters_again() -> None:
    texts = ["2*p5.48xlarge", "8*p5.48xlarge", "2*p5.48xlarge@eth100", "4x8:a100-sxm-80gb@hdr200x8"]
    rented, slower, owned = offers_of_clusters(shipped_market(), texts)
    assert rented.counts == (2, 8) and slower.counts == (2,) and owned.counts == (4,)
    assert rented.cluster_text(8) == "8*aws/p5.48xlarge"
    assert slower.cluster_text(2) == "2*aws/p5.48xlarge@eth100"
    for offer in (rented, slower, owned):
        for nodes in offer.counts:
            assert parse_cluster(offer.cluster_text(nodes)).devices == nodes * offer.devices_per_node


def test_only_the_named_numbers_are_options() -> None:
    named = ["2*p5.48xlarge", "4*p5.48xlarge", "1x8:a100-sxm-80gb"]
    asked = [*ASKED, *(word for text in named for word in ("--cluster", text)), "--pricing", "on-demand"]
    result = CliRunner().invoke(cli, [*asked, "--pricing", "on-premises"], prog_name="plan")
    assert result.exit_code == 0, result.output
    options = json.loads(result.stdout)["options"]
    found = {(option["device"], option["nodes"], option["rate"]["pricing"]) for option in options}
    assert found == {
        ("h100-sxm-80gb", 2, "on-demand"),
        ("h100-sxm-80gb", 4, "on-demand"),
        ("a100-sxm-80gb", 1, "on-premises"),
    }


def test_a_slower_network_is_no_sooner() -> None:
    asked = [
        *ASKED,
        "--cluster",
        "4*p5.48xlarge",
        "--cluster",
        "4*p5.48xlarge@eth10",
        "--pricing",
        "on-demand",
    ]
    options = json.loads(CliRunner().invoke(cli, asked, prog_name="plan").stdout)["options"]
    days = {option["cluster"]: option["days"] for option in options}
    assert days["4*aws/p5.48xlarge"] < days["4*aws/p5.48xlarge@eth10"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("1x8:h100+1x8:a100-sxm-80gb", "not of one kind of node"),
        ("local:2", "not of one kind of node"),
        ("8*p7.48xlarge", "no instance"),
        ("0x8:h100", "0 nodes"),
        ("8", "cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_told(text: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        offers_of_clusters(shipped_market(), [text])


def test_other_hardware_beside_clusters_is_refused() -> None:
    asked = [*ASKED, "--cluster", "2*p5.48xlarge", "--device", "h100", "--nodes", "4"]
    result = CliRunner().invoke(cli, asked, prog_name="plan")
    assert result.exit_code == 2 and "--device" in result.stderr and "--nodes" in result.stderr


def test_a_pricing_that_is_not_sold_is_told() -> None:
    with pytest.raises(InputError, match="sold spot"):
        offers_of_clusters(shipped_market(), ["4x8:a100-sxm-80gb"], (Pricing.SPOT,))
