"""Sensitivity of the best option: by hand, by laws, and against taking every option apart."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from planner.cost.goodput import Job, figures_of
from planner.foundation.units import DAY_S
from planner.hardware import catalog
from planner.hardware.prices import on_premises_inputs
from planner.job.objective import Goal, Minimise
from planner.sizing.comparison import Option, Pricing, Rate, Sensitivity, SizedPlan
from planner.sizing.sensitivity import best_of, failure_factor, owned, sensitivities
from planner.sizing.usual_overheads import usual_overheads
from planner.strategy.estimate import Coverage, JobFigures, TimeBreakdown, Verdict
from planner.strategy.strategy import Degrees, RecomputeCounts, Stage, Strategy

COST = Goal(minimise=Minimise.COST)
PLAN = SizedPlan(
    label="dp 8",
    strategy=Strategy(
        degrees=Degrees(micro_batch=1, num_micro_batches=1),
        stages=(Stage(first=0, end=1, recompute=RecomputeCounts(none=1)),),
    ),
    step_time_s=10.0,
    step_time_interval_s=(9.0, 12.0),
    lower_bound_s=8.0,
    tokens_per_s=1.0,
    mfu=0.4,
    verdict=Verdict.SAFE,
    peak_memory_bytes=1,
    memory_limit_bytes=2,
    breakdown=TimeBreakdown(),
    coverage=Coverage(),
)
LOSSES = JobFigures(
    data_stall_s=0.0,
    straggler_s=0.0,
    checkpoint_stall_s=0.0,
    checkpoint_bytes=0,
    checkpoint_wait_s=None,
    failure_share=0.1,
    between_failures_s=1e5,
    best_checkpoint_every=None,
    goodput=0.9,
    days=None,
    cost_usd=None,
    checkpoint_every=1000,
)


def option(
    days: float,
    usd: float | None,
    *,
    instance: str = "node",
    nodes: int = 4,
    pricing: Pricing = Pricing.ON_DEMAND,
    ends: tuple[float, float] | None = None,
    losses: JobFigures | None = None,
    interval: tuple[float, float] = (9.0, 12.0),
) -> Option:
    price = None if usd is None else usd / (days * 24 * nodes)
    low, high = (None, None) if ends is None or price is None else (price * ends[0], price * ends[1])
    return Option(
        cluster="",
        provider="lab" if pricing is not Pricing.ON_PREMISES else "",
        instance=instance if pricing is not Pricing.ON_PREMISES else "",
        device="h100-sxm-80gb",
        nodes=nodes,
        devices=8 * nodes,
        devices_per_node=8,
        network="ndr400x8",
        region="",
        rate=Rate(
            pricing=pricing, usd_per_node_hour=price, low_usd_per_node_hour=low, high_usd_per_node_hour=high
        ),
        plan=dataclasses.replace(PLAN, step_time_interval_s=interval),
        step_time_s=10.0,
        days=days,
        days_interval=(days * 0.9, days * 1.2),
        cost_usd=usd,
        cost_interval_usd=None,
        usd_per_billion_tokens=None,
        goodput=0.9 if losses else 1.0,
        losses=losses,
    )


def row(rows: tuple[Sensitivity, ...], what: str) -> Sensitivity:
    (found,) = [row for row in rows if what in row.what]
    return found


def test_prices_by_hand() -> None:
    cheap, dear = option(30, 1000, instance="a"), option(10, 1100, instance="b")
    rows = sensitivities([cheap, dear], COST)
    together = row(rows, "all prices")
    assert (together.low_cost_usd, together.high_cost_usd) == (pytest.approx(800), pytest.approx(1200))
    assert together.best_stays
    alone = row(rows, "lab/a, on-demand alone")
    assert alone.low_cost_usd == pytest.approx(800) and alone.best_at_low == cheap.name
    assert alone.high_cost_usd == pytest.approx(1100) and alone.best_at_high == dear.name
    assert alone.high_days == 10 and not alone.best_stays


def test_step_times_by_hand() -> None:
    narrow = option(10, 1000, instance="a", interval=(9.9, 10.1))
    wide = option(10, 1050, instance="b", interval=(8.0, 12.0))
    found = row(sensitivities([narrow, wide], COST), "step times")
    assert found.best_at_low == wide.name and found.low_cost_usd == pytest.approx(840)
    assert found.low_days == pytest.approx(8.0)
    assert found.best_at_high == narrow.name and found.high_cost_usd == pytest.approx(1010)


def test_failures_by_hand() -> None:
    """Checkpoints 10,000 s apart, a failure in 100,000 s, a tenth of the time lost in all.

    A tenth of the time between failures: x / (exp(x) - 1) is 0.9508 of it kept, so restarts keep 0.9465.
    """
    failing = option(10, 1000, losses=LOSSES)
    found = row(sensitivities([failing], COST), "failures")
    restarts = 0.9 / (0.1 / math.expm1(0.1))
    fewer = 0.05 / math.expm1(0.05) * math.sqrt(restarts)
    more = 0.2 / math.expm1(0.2) * restarts**2
    assert found.low_days == pytest.approx(10 * 0.9 / fewer) and found.low_days < 10
    assert found.high_days == pytest.approx(10 * 0.9 / more) and found.high_days > 10
    assert found.high_cost_usd == pytest.approx(1000 * 0.9 / more)
    assert not [r for r in sensitivities([option(10, 1000)], COST) if "failures" in r.what]


@pytest.mark.parametrize("factor", [0.5, 2.0, 7.0])
@pytest.mark.parametrize("devices", [8, 256, 16_384])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_failures_as_the_goodput_model_has_them(factor: float, devices: int, asynchronous: bool) -> None:
    """The same interval, the rate of failures stated: the days of both are those of figures_of."""
    rate = 5.0
    job = Job(
        step_s=10.0,
        compute_s=8.0,
        tokens_per_step=1_000_000,
        tokens=100_000_000_000,
        devices=devices,
        nodes=devices // 8,
        rated_nodes=devices / 8,
        usual_failures_per_s=0.0,
        checkpoint_bytes=1e12,
        staging_s=2.0,
    )
    said = dataclasses.replace(usual_overheads(devices), failures_per_1000_node_days=rate, device_spread=0.01)
    said = dataclasses.replace(said, checkpoint_async=asynchronous)
    now = figures_of(job, said)
    assert now.checkpoint_every is not None and now.days is not None
    there = figures_of(
        job,
        dataclasses.replace(
            said, checkpoint_every=now.checkpoint_every, failures_per_1000_node_days=factor * rate
        ),
    )
    assert there.days is not None
    sized = dataclasses.replace(option(now.days, 1000, losses=now), goodput=now.goodput)
    assert failure_factor(sized, factor) == pytest.approx(there.days / now.days, rel=1e-9)


def test_use_of_hardware_on_premises_by_hand() -> None:
    device = owned(catalog.load_device("h100"), on_premises_inputs())
    assert device is not None
    rented = option(10, 1000)
    own = option(10, 900, pricing=Pricing.ON_PREMISES)
    found = row(sensitivities([rented, own], COST, [device], 0.7), "on premises")
    assert (found.low, found.high) == ("50%", "90%")
    assert found.best_at_low == rented.name and found.low_cost_usd == 1000
    assert found.high_cost_usd == pytest.approx(
        900 * device.usd_per_used_hour(0.9) / device.usd_per_used_hour(0.7)
    )
    assert not [r for r in sensitivities([rented], COST, [device], 0.7) if "on premises" in r.what]
    full = row(sensitivities([own], COST, [device], 0.95), "on premises")
    assert full.high == "100%"


def test_ranges_of_prices_move_only_who_has_one() -> None:
    listed, reserved = option(10, 1000), option(10, 1050, pricing=Pricing.RESERVED_1Y, ends=(0.9, 1.1))
    found = row(sensitivities([listed, reserved], COST), "as a range")
    assert found.best_at_low == reserved.name and found.low_cost_usd == pytest.approx(945)
    assert found.best_at_high == listed.name and found.high_cost_usd == 1000


def test_limits_decide_and_a_miss_is_told() -> None:
    slow, fast = option(30, 1000), option(10, 2000, nodes=16)
    goal = Goal(minimise=Minimise.COST, deadline_s=20 * DAY_S)
    assert best_of([slow, fast], goal) is fast
    tight = Goal(minimise=Minimise.COST, deadline_s=11 * DAY_S)
    found = row(sensitivities([slow, fast], tight), "step times")
    assert found.best_at_low == fast.name
    assert found.best_at_high.startswith("none keeps the limits; nearest")
    budget = Goal(minimise=Minimise.TIME, budget_usd=1900.0)
    prices = row(sensitivities([slow, fast], budget), "all prices")
    assert prices.best_at_low == fast.name and prices.best_at_high == slow.name


def test_unknown_prices_stay_unknown_and_never_win() -> None:
    unknown, known = option(10, None), option(12, 5000)
    assert best_of([unknown, known], COST) is known
    rows = sensitivities([unknown], COST)
    assert [r.what for r in rows if "price" in r.what] == []
    assert all(r.low_cost_usd is None and r.high_cost_usd is None for r in rows)
    assert sensitivities([], COST) == ()


def random_options(rng: random.Random, count: int) -> list[Option]:
    found = []
    for index in range(count):
        days = rng.uniform(1, 200)
        lost = rng.uniform(0, 0.3)
        pricing = rng.choice([Pricing.ON_DEMAND, Pricing.SPOT, Pricing.RESERVED_1Y, Pricing.ON_PREMISES])
        found.append(
            option(
                days,
                rng.choice([None, rng.uniform(1e4, 1e6), rng.uniform(1e4, 1e6)]),
                instance=f"i{index % 40}",
                nodes=rng.randint(1, 64),
                pricing=pricing,
                ends=(0.8, 1.3) if pricing in (Pricing.RESERVED_1Y, Pricing.ON_PREMISES) else None,
                losses=dataclasses.replace(LOSSES, failure_share=lost),
                interval=(10 * rng.uniform(0.7, 1), 10 * rng.uniform(1, 1.5)),
            )
        )
    return found


GOALS = [
    COST,
    Goal(),
    Goal(minimise=Minimise.COST, deadline_s=30 * DAY_S),
    Goal(minimise=Minimise.TIME, budget_usd=2e5),
]


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("seed", range(10))
def test_laws(goal: Goal, seed: int) -> None:
    """The low end is never worse than the high end by the goal, and as things are lies between."""
    options = random_options(random.Random(seed), 60)
    device = owned(catalog.load_device("h100"), on_premises_inputs())
    assert device is not None
    best = best_of(options, goal)
    rows = sensitivities(options, goal, [device], 0.7)
    assert len(rows) == 6 or best.cost_usd is None
    for found in rows:
        better, worse = (
            (found.high_cost_usd, found.low_cost_usd)
            if "in use" in found.what
            else (
                found.low_cost_usd,
                found.high_cost_usd,
            )
        )
        if goal == COST:
            assert better is not None and worse is not None and best.cost_usd is not None
            assert better <= best.cost_usd <= worse
        if goal == Goal():
            assert found.low_days <= best.days <= found.high_days
        if found.best_stays:
            assert best.name in found.best_at_low and best.name in found.best_at_high


@pytest.mark.parametrize("seed", range(5))
def test_one_more_option_never_makes_an_end_worse(seed: int) -> None:
    options = random_options(random.Random(seed), 40)
    fewer = {found.what: found for found in sensitivities(options[:-1], COST)}
    for found in sensitivities(options, COST):
        other = fewer.get(found.what)
        if other is None or other.low_cost_usd is None or "alone" in found.what:
            continue
        assert found.low_cost_usd is not None and found.low_cost_usd <= other.low_cost_usd
        assert found.high_cost_usd is not None and other.high_cost_usd is not None
        assert found.high_cost_usd <= other.high_cost_usd
