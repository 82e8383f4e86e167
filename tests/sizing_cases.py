"""Sizing requests of small models on few offers, as tests ask for them."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

from click.testing import CliRunner, Result

from planner.cli import cli
from planner.hardware.catalog import load_model
from planner.hardware.prices import shipped_market
from planner.job.objective import Goal
from planner.model.workload import Workload
from planner.sizing.comparison import Comparison, Offer, SizingRequest
from planner.sizing.offers import Wanted, find_offers
from planner.sizing.search import compare

MARKET = shipped_market()
BILLION = 10**9


@cache
def offers(*instances: str) -> tuple[Offer, ...]:
    """These instances of the shipped market."""
    return find_offers(MARKET, Wanted(instances=instances))


def request(
    model: str,
    *instances: str,
    seq: int = 2048,
    batch: int = 256,
    tokens: int = 100 * BILLION,
    goal: Goal | None = None,
    **more: Any,
) -> SizingRequest:
    """A run on these instances."""
    workload = Workload(seq=seq, batch=batch, tokens=tokens)
    asked = {"offers": offers(*instances)} | more
    return SizingRequest(model=load_model(model), workload=workload, goal=goal or Goal(), **asked)


def compared(asked: SizingRequest) -> Comparison:
    return compare(asked, MARKET)


@cache
def sample() -> Comparison:
    """A comparison with several devices, providers, ways to pay and counts, and offers without a plan."""
    names = "p5.48xlarge", "a3-highgpu-8g", "p4d.24xlarge", "lambda/gpu_1x_a10", "gcp/g2-standard-4"
    return compared(request("llama-3-8b", *names, batch=512, counts=(1, 2, 4, 8)))


def priced(offer: Offer, factor: float) -> Offer:
    """The offer with every price times a factor."""

    def times(usd: float | None) -> float | None:
        return None if usd is None else usd * factor

    rates = tuple(
        dataclasses.replace(
            rate,
            usd_per_node_hour=times(rate.usd_per_node_hour),
            low_usd_per_node_hour=times(rate.low_usd_per_node_hour),
            high_usd_per_node_hour=times(rate.high_usd_per_node_hour),
        )
        for rate in offer.rates
    )
    return dataclasses.replace(offer, rates=rates)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="plan")


def document(*arguments: str, code: int = 0) -> Any:
    """What a command prints with --json: one document of plain JSON and nothing else."""
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output

    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(result.stdout, parse_constant=refused)
