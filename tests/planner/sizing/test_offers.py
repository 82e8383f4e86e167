"""Which offers a request finds, which numbers of nodes are tried, and what wrong names are told."""

from __future__ import annotations

import dataclasses
import random

import pytest

from planner.foundation.errors import InputError
from planner.hardware.catalog import device_names
from planner.hardware.cluster_text import parse_cluster
from planner.sizing.comparison import Offer, Pricing, Rate
from planner.sizing.floors import MOST_NODES, ODD, between, ladder, most_nodes
from planner.sizing.offers import ON_PREMISES, Wanted, find_offers
from tests.sizing_cases import MARKET, offers

ALL = find_offers(MARKET, Wanted())


def test_every_instance_of_the_market_and_every_device_is_an_offer() -> None:
    rented = [offer for offer in ALL if offer.instance]
    owned = [offer for offer in ALL if not offer.instance]
    assert [f"{o.provider}/{o.instance}" for o in rented] == [i.full_name for i in MARKET.instances]
    assert [o.device.name for o in owned] == list(device_names())
    assert {o.provider for o in owned} == {ON_PREMISES}
    assert len({o.name for o in ALL}) == len(ALL)


def test_a_cluster_of_each_offer_is_one_that_the_grammar_reads() -> None:
    for offer in ALL:
        for nodes in (1, 2) if offer.network else (1,):
            cluster = parse_cluster(offer.cluster_text(nodes), market=MARKET)
            assert cluster.devices == nodes * offer.devices_per_node
            assert cluster.groups[0].device.name == offer.device.name


def test_prices_are_those_of_the_instances_and_unknown_ones_stay_unknown() -> None:
    listed = {i.full_name: i.ondemand_usd_per_hour for i in MARKET.instances}
    assert None in listed.values()
    for offer in ALL:
        for rate in offer.rates:
            assert rate.usd_per_node_hour is None or rate.usd_per_node_hour > 0
        if offer.instance:
            first = offer.rates[0]
            assert first.pricing is Pricing.ON_DEMAND
            assert first.usd_per_node_hour == listed[offer.name]


def test_filters_keep_what_all_of_them_ask_for() -> None:
    h100 = find_offers(MARKET, Wanted(devices=("h100",), providers=("AWS", "gcp")))
    assert {o.device.name for o in h100} == {"h100-sxm-80gb"} and {o.provider for o in h100} == {"aws", "gcp"}
    own = find_offers(MARKET, Wanted(devices=("h100", "tpu-v5p"), providers=("on-premises",)))
    assert [o.device.name for o in own] == ["h100-sxm-80gb", "tpu-v5p"]
    assert not any(o.instance for o in own)
    assert [o.name for o in offers("p5.48xlarge")] == ["aws/p5.48xlarge"]
    spot = find_offers(MARKET, Wanted(pricings=(Pricing.SPOT,)))
    assert spot and all([r.pricing for r in o.rates] == [Pricing.SPOT] for o in spot)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (Wanted(devices=("h1000",)), ["--device: no device 'h1000'", "Did you mean", "h100"]),
        (Wanted(providers=("awz",)), ["--provider: no provider 'awz'", "Did you mean aws", "on-premises"]),
        (Wanted(instances=("p5.48xlarg",)), ["--instance: no instance", "p5.48xlarge"]),
        (
            Wanted(devices=("mi300x",), providers=("lambda",)),
            ["--device, --provider: there is no offer of mi300x with lambda", "a10", "azure"],
        ),
        (
            Wanted(instances=("p5.48xlarge",), pricings=(Pricing.ON_PREMISES,)),
            ["--instance, --pricing", "on-demand, spot"],
        ),
        (
            Wanted(instances=("p5.48xlarge",), devices=("mi300x",), providers=("gcp",)),
            ["--device, --provider, --instance", "name fewer"],
        ),
    ],
)
def test_wrong_names_are_told_with_the_nearest_and_names_without_an_offer_with_a_fix(
    wanted: Wanted, told: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        find_offers(MARKET, wanted)
    for words in told:
        assert words in str(error.value)
    assert "()" not in str(error.value) and "plan list offers" not in str(error.value)


def test_all_wrong_names_are_told_at_once() -> None:
    wanted = Wanted(devices=("h1000", "h2000"), providers=("awz",), instances=("p5.48xlarg",))
    with pytest.raises(InputError) as error:
        find_offers(MARKET, wanted)
    assert len(error.value.problems) == 4


def test_ladders_double_up_to_the_most() -> None:
    assert ladder(1) == (1,) and ladder(9) == (1, 2, 4, 8) and ladder(16) == (1, 2, 4, 8, 16)


def test_counts_between_two_share_out_the_batch_by_brute_force() -> None:
    draw = random.Random(5)
    for _ in range(40):
        few, per_node, batch = draw.randint(1, 40), draw.choice([1, 4, 8]), draw.choice([256, 480, 512, 500])
        many = few + draw.randint(1, 80)
        found = between(few, many, batch, per_node)
        for nodes in range(few + 1, many):
            devices = nodes * per_node
            pipeline = min(
                p for p in range(1, devices + 1) if devices % p == 0 and batch % (devices // p) == 0
            )
            assert (nodes in found) == (pipeline <= ODD)
        assert found == sorted(set(found)) and all(few < nodes < many for nodes in found)


def offer(instance: str, devices: int, network: str, prices: dict[Pricing, float | None]) -> Offer:
    rates = tuple(Rate(pricing=pricing, usd_per_node_hour=usd) for pricing, usd in prices.items())
    device = offers("p5.48xlarge")[0].device
    return Offer(
        provider="p", instance=instance, device=device, devices_per_node=devices, network=network, rates=rates
    )


def test_small_nodes_are_tried_only_below_a_larger_one_that_is_no_dearer() -> None:
    demand, spot = Pricing.ON_DEMAND, Pricing.SPOT
    small = offer("small", 1, "eth100", {demand: 2.0, spot: 1.0})

    def most(large: Offer, devices: int = 16384) -> int:
        return most_nodes([small, large], devices)["p/small"]

    assert most(offer("large", 8, "ndr400x8", {demand: 16.0, spot: 8.0})) == 7
    assert most(offer("large", 8, "ndr400x8", {demand: 15.0, spot: 8.1})) == 7
    for prices in ({demand: 16.0, spot: 12.0}, {demand: 16.0}, {demand: 20.0, spot: 8.0}, {demand: None}):
        assert most(offer("large", 8, "ndr400x8", dict(prices))) == MOST_NODES
    assert most(offer("large", 8, "", {demand: 16.0, spot: 8.0})) == MOST_NODES  # of which one alone is tried
    elsewhere = dataclasses.replace(offer("large", 8, "ndr400x8", {demand: 1.0, spot: 1.0}), provider="q")
    assert most(elsewhere) == MOST_NODES
    assert most(elsewhere, devices=100) == 100


def test_names_with_commas_are_names_one_by_one() -> None:
    from planner.commands.hardware.sizing_options import _each_of

    assert _each_of(("h100, a100-sxm-80gb", "l4", ",")) == ("h100", "a100-sxm-80gb", "l4")
