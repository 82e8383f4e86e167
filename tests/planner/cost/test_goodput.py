"""Goodput against published runs, against a simulation of failures, and its laws."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import pytest

from planner.cost.goodput import Job, erlang_loss, figures_of
from planner.foundation.units import DAY_S
from planner.hardware.failures import failure_file
from planner.job.problem import BEST, JobOverheads
from planner.sizing.usual_overheads import usual_overheads
from planner.strategy.estimate import JobFigures

HOUR_S = 3600.0


def job(nodes: int = 100, **more: Any) -> Job:
    """A job on nodes of 8 devices that fail 4 times in 1000 days, with a checkpoint of 1 TB."""
    given = {
        "step_s": 10.0,
        "compute_s": 7.0,
        "tokens_per_step": 4_000_000,
        "tokens": None,
        "devices": 8 * nodes,
        "nodes": nodes,
        "rated_nodes": float(nodes),
        "usual_failures_per_s": 4.0 * nodes / (1000 * DAY_S),
        "checkpoint_bytes": 1e12,
        "staging_s": 1.0,
        "usd_per_hour": 50.0 * nodes,
    }
    return Job(**{**given, **more})


def goodput(of: Job, overheads: JobOverheads, **more: Any) -> float:
    return figures_of(of, dataclasses.replace(overheads, **more)).goodput


# Published runs


def test_llama_3_kept_over_nine_tenths_of_its_time() -> None:
    """16,384 H100, 419 unexpected interruptions in 54 days, storage of 2 TB/s: over 90 % (arXiv 2407.21783).

    A checkpoint of 405B weights with Adam's moments in fp32; the restart is the usual one.
    """
    h100 = failure_file().of("h100-sxm-80gb").per_1000_node_days
    assert h100 == pytest.approx(419 / 54 / 2048 * 1000, rel=0.01)
    run = job(2048, usual_failures_per_s=h100 * 2048 / (1000 * DAY_S), checkpoint_bytes=12 * 405e9)
    figures = figures_of(run, dataclasses.replace(usual_overheads(16_384), storage_bytes_per_s=2e12))
    assert figures.between_failures_s == pytest.approx(54 * DAY_S / 419, rel=0.01)
    assert 0.90 < figures.goodput < 0.96


def test_byterobust_kept_97_percent_on_9600_devices() -> None:
    """97 % of three months (arXiv 2509.16293), with the usual rate and restart: within 3 points."""
    figures = figures_of(job(1200, checkpoint_bytes=12 * 405e9), usual_overheads(9600))
    assert figures.goodput == pytest.approx(0.97, abs=0.03)


OPT = JobOverheads(
    checkpoint_every=BEST,
    storage_bytes_per_s=10e9,
    failures_per_1000_node_days=105 / 33 / 124 * 1000,
)
"""OPT-175B: 35 manual and 70 automatic restarts (arXiv 2205.01068) in the 33 days that it computed for."""


def test_opt_175b_lost_two_fifths_of_its_time_without_spare_nodes() -> None:
    """33 days of computing took 56: 59 %, 7.5 h between interruptions. A new machine took "hours" (its
    chronicles, 3 December 2021); three to four of them are 59 %, and no repair at all is far from it."""
    run = job(124, checkpoint_bytes=1.6e12, step_s=20.0)
    assert figures_of(run, OPT).between_failures_s == pytest.approx(7.5 * HOUR_S, rel=0.01)
    short, long = (goodput(run, OPT, repair_s=hours * HOUR_S) for hours in (3, 4))
    assert long < 33 / 56 < short < 0.64
    assert goodput(run, OPT) > 0.85
    assert goodput(run, OPT, repair_s=4 * HOUR_S, spares=12) > 0.85


def test_bloom_lost_eight_hours_to_checkpoints_in_three_months() -> None:
    """2.3 TB in 40 s every 3 h (100 steps): 720 checkpoints, 8 h, 0.37 % (stas00/ml-engineering). With 1 to 2
    failures a week, 1.5 h of steps lost in each, and spare nodes (Hugging Face's account of the training)."""
    run = job(48, checkpoint_bytes=2.3e12, step_s=108.0)
    said = JobOverheads(checkpoint_every=100, storage_bytes_per_s=2.3e12 / 40, restart_s=0.0)
    never = figures_of(run, dataclasses.replace(said, failures_per_1000_node_days=0.0))
    assert never.checkpoint_stall_s * 720 * 100 == pytest.approx(8 * HOUR_S)
    assert 1 - never.goodput == pytest.approx(0.0037, abs=0.0001)
    weekly = figures_of(run, dataclasses.replace(said, failures_per_1000_node_days=1.5 / 7 / 48 * 1000))
    assert weekly.failure_share * 7 * DAY_S == pytest.approx(1.5 * 1.5 * HOUR_S, rel=0.02)
    assert failure_file().assumed.low < 1.5 / 7 / 48 * 1000 < failure_file().assumed.high


@pytest.mark.parametrize(("devices", "hours"), [(16_384, 1.8), (131_072, 0.23)])
def test_time_between_failures_as_projected_for_rsc_1(devices: int, hours: float) -> None:
    """6.5 failures in 1000 node-days (arXiv 2410.21680)."""
    said = JobOverheads(checkpoint_every=1, failures_per_1000_node_days=6.5)
    assert figures_of(job(devices // 8), said).between_failures_s == pytest.approx(hours * HOUR_S, rel=0.03)


@pytest.mark.parametrize(("mtbf_min", "best_min"), [(1440.0, 117.0), (360.0, 57.0), (15.0, 9.1)])
def test_the_best_interval_is_that_of_daly(mtbf_min: float, best_min: float) -> None:
    """Dumps of 5 min, restarts of 10 min: figures 3 to 5 of Daly 2006. Steps of 1 s."""
    run = job(1, step_s=1.0, checkpoint_bytes=300.0, staging_s=0.0)
    said = JobOverheads(
        checkpoint_every=BEST,
        storage_bytes_per_s=1.0,
        restart_s=600.0,
        failures_per_1000_node_days=1000 * 1440 / mtbf_min,
    )
    every = figures_of(run, said).checkpoint_every
    assert every is not None and every / 60 == pytest.approx(best_min, rel=0.01)


# An independent oracle


def simulated(of: Job, overheads: JobOverheads, periods: int, seed: int) -> float:
    """The share of time kept, by living through it: steps, checkpoints, failures at random, restarts."""
    draw = random.Random(seed)
    figures = figures_of(of, overheads)
    every, wait_s = figures.checkpoint_every, figures.checkpoint_wait_s
    assert every is not None and wait_s is not None and figures.restart_s is not None
    rates = [
        (1 / between if between else 0.0, seconds)
        for between, seconds in (
            (figures.between_failures_s, figures.restart_s),
            (figures.between_preemptions_s, overheads.preemption_restart_s or 0.0),
        )
    ]
    rate = sum(each for each, _ in rates)
    now = kept = 0.0
    stops = draw.expovariate(rate)
    for _ in range(periods):
        left = every * of.step_s + wait_s
        while now + left > stops:
            restart_s = rates[0][1] if draw.random() < rates[0][0] / rate else rates[1][1]
            now, stops = stops, stops + draw.expovariate(rate)
            left = restart_s + every * of.step_s + wait_s  # a restart may be interrupted as well
        now += left
        kept += every * of.step_s
    return kept / now


@pytest.mark.parametrize(
    ("of", "overheads"),
    [
        (job(2000), JobOverheads(checkpoint_every=200, storage_bytes_per_s=1e10, restart_s=900.0)),
        (job(2000), JobOverheads(checkpoint_every=BEST, storage_bytes_per_s=2e9, restart_s=600.0)),
        (job(20_000), JobOverheads(checkpoint_every=60, storage_bytes_per_s=1e10, restart_s=700.0)),
        (
            job(300),
            JobOverheads(
                checkpoint_every=100,
                storage_bytes_per_s=1e10,
                restart_s=600.0,
                preemptions_per_1000_node_days=100.0,
                preemption_restart_s=600.0,
                preemption_notice_s=0.0,
            ),
        ),
    ],
    ids=["often", "best", "all the time", "preempted"],
)
def test_goodput_is_what_a_simulation_of_failures_finds(of: Job, overheads: JobOverheads) -> None:
    found = simulated(of, overheads, periods=40_000, seed=11)
    assert figures_of(of, overheads).goodput == pytest.approx(found, rel=0.015)


def simulated_behind(of: Job, overheads: JobOverheads, periods: int, seed: int) -> float:
    """The same where checkpoints are written behind the steps: one counts once it is whole."""
    draw = random.Random(seed)
    figures = figures_of(of, overheads)
    every, restart_s, between_s = figures.checkpoint_every, figures.restart_s, figures.between_failures_s
    assert every is not None and restart_s is not None and between_s is not None
    assert figures.checkpoint_wait_s == of.staging_s, "no writing takes longer than an interval"
    assert overheads.storage_bytes_per_s is not None
    write_s = of.checkpoint_bytes / overheads.storage_bytes_per_s
    now, whole, done, written_s = 0.0, 0, 0, math.inf
    stops = draw.expovariate(1 / between_s)
    while whole < periods:
        end = now + every * of.step_s + of.staging_s
        if written_s <= min(end, stops):
            whole = done
        if end < stops:
            now, done = end, done + 1
            written_s = now + write_s
            continue
        now = stops
        while (stops := now + draw.expovariate(1 / between_s)) < now + restart_s:
            now = stops
        now, done, written_s = now + restart_s, whole, math.inf
    return whole * every * of.step_s / now


@pytest.mark.parametrize("every", [40, BEST], ids=["stated", "best"])
def test_goodput_behind_the_steps_is_what_a_simulation_finds(every: Any) -> None:
    """100 s of writing: what is lost reaches back to the last checkpoint that was whole."""
    said = JobOverheads(
        checkpoint_every=every, checkpoint_async=True, storage_bytes_per_s=1e10, restart_s=600.0
    )
    of = job(2000, staging_s=5.0)
    found = simulated_behind(of, said, periods=60_000, seed=3)
    assert figures_of(of, said).goodput == pytest.approx(found, rel=0.004)


def test_waiting_for_nodes_is_what_a_simulation_of_repairs_finds() -> None:
    """Repairs take equally long; the formula holds for any distribution."""
    draw, rate, repair_s, spares = random.Random(5), 1 / 1000.0, 1500.0, 1
    now = stopped = 0.0
    back: list[float] = []
    for _ in range(60_000):
        now += draw.expovariate(rate)
        back = [at for at in back if at > now]
        back.append(now + repair_s)
        if len(back) > spares:
            stopped += min(back) - now
            shift, now = min(back), min(back)
            back = [at for at in back if at > shift]
    assert erlang_loss(spares + 1, rate * repair_s) == pytest.approx(stopped / now, rel=0.03)


def test_erlang_loss_by_its_definition() -> None:
    for servers, load in itertools.product((1, 2, 5, 12), (0.01, 0.7, 3.0, 20.0)):
        terms = [load**i / math.factorial(i) for i in range(servers + 1)]
        assert erlang_loss(servers, load) == pytest.approx(terms[-1] / sum(terms))


# Laws


BUSY = JobOverheads(
    checkpoint_every=50,
    storage_bytes_per_s=5e9,
    restart_s=900.0,
    repair_s=7200.0,
    failures_per_1000_node_days=6.0,
    preemptions_per_1000_node_days=10.0,
    eval_every=500,
    eval_s=60.0,
    ramp_up_s=1200.0,
)
ALL_WAYS = [
    dataclasses.replace(BUSY, checkpoint_every=every, checkpoint_async=later)
    for every in (50, BEST)
    for later in (False, True)
]
NEVER_HELP: list[tuple[str, list[float]]] = [
    ("failures_per_1000_node_days", [0.0, 1.0, 6.0, 40.0, 1e4]),
    ("preemptions_per_1000_node_days", [0.0, 1.0, 100.0, 1e4]),
    ("restart_s", [0.0, 60.0, 900.0, 1e5]),
    ("repair_s", [0.0, 60.0, 7200.0, 1e6]),
    ("preemption_restart_s", [0.0, 600.0, 1e5]),
    ("ramp_up_s", [0.0, 600.0, 1e5]),
    ("eval_s", [0.0, 60.0, 1e4]),
    ("device_spread", [0.0, 0.02, 0.5]),
]


@pytest.mark.parametrize("overheads", ALL_WAYS)
@pytest.mark.parametrize(("name", "values"), NEVER_HELP, ids=[name for name, _ in NEVER_HELP])
def test_more_of_what_is_lost_never_raises_goodput(
    overheads: JobOverheads, name: str, values: list[float]
) -> None:
    run = job(tokens=10**12)
    found = [goodput(run, overheads, **{name: value}) for value in values]
    assert all(more <= less + 1e-12 for less, more in itertools.pairwise(found))
    assert found[-1] < found[0]


@pytest.mark.parametrize("overheads", ALL_WAYS)
def test_more_nodes_never_raise_goodput_and_spares_never_lower_it(overheads: JobOverheads) -> None:
    found = [goodput(job(nodes), overheads) for nodes in (1, 2, 8, 64, 512, 4096)]
    assert found == sorted(found, reverse=True) and 0 < found[-1] < found[0] < 1
    spared = [figures_of(job(512, tokens=10**12), dataclasses.replace(overheads, spares=n)) for n in range(9)]
    assert all(a.goodput < b.goodput for a, b in itertools.pairwise(spared))
    assert all((b.days or 0) < (a.days or 0) for a, b in itertools.pairwise(spared))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_no_interval_is_better_than_the_best(seed: int, later: bool) -> None:
    """By brute force over all intervals, with and without a run that ends."""
    draw = random.Random(seed)
    run = job(
        draw.choice([1, 64, 2048, 20_000]),
        step_s=10 ** draw.uniform(0, 2),
        staging_s=draw.choice([0.0, 10 ** draw.uniform(-1, 2)]),
        tokens=draw.choice([None, 4_000_000 * draw.randint(1, 300)]),
    )
    overheads = JobOverheads(
        checkpoint_every=BEST,
        checkpoint_async=later,
        storage_bytes_per_s=10 ** draw.uniform(8.5, 12),
        restart_s=10 ** draw.uniform(0, 4),
        data_tokens_per_s=draw.choice([None, 1e5]),
        failures_per_1000_node_days=10 ** draw.uniform(1, 4),
        preemptions_per_1000_node_days=draw.choice([None, 100.0]),
        preemption_notice_s=draw.choice([0.0, 120.0]),
    )
    best = figures_of(run, overheads)
    assert best.checkpoint_every == best.best_checkpoint_every is not None
    others = [goodput(run, overheads, checkpoint_every=every) for every in range(1, 3000)]
    assert best.goodput >= max(others) * (1 - 1e-12)
    if best.checkpoint_every < 3000:
        assert best.goodput == pytest.approx(max(others), rel=1e-12)
    if later and math.isinf(run.steps):
        assert overheads.storage_bytes_per_s is not None
        assert best.checkpoint_every * run.step_s * 26 >= run.checkpoint_bytes / overheads.storage_bytes_per_s


def test_goodput_is_a_share_whatever_happens() -> None:
    for nodes, rate, seconds in itertools.product((1, 10**5), (0.0, 4.0, 1e6), (0.0, 1e3, 1e9)):
        for later, every in itertools.product((False, True), (1, 10**6, BEST)):
            said = JobOverheads(
                checkpoint_every=every,
                checkpoint_async=later,
                storage_bytes_per_s=1e9,
                failures_per_1000_node_days=rate,
                preemptions_per_1000_node_days=rate,
                restart_s=seconds,
                repair_s=seconds,
            )
            figures = figures_of(job(nodes, tokens=10**12), said)
            assert 0 <= figures.goodput <= 1
            assert (figures.days is None) == (figures.goodput == 0)


def test_where_nothing_fails_the_best_interval_is_none() -> None:
    said = JobOverheads(checkpoint_every=BEST, storage_bytes_per_s=1e9, failures_per_1000_node_days=0.0)
    figures = figures_of(job(), said)
    assert (figures.checkpoint_every, figures.checkpoint_stall_s, figures.goodput) == (None, 0.0, 1.0)


# Parts of it


def figures(overheads: JobOverheads, **more: Any) -> JobFigures:
    return figures_of(job(tokens=4 * 10**12, **more), overheads)


def test_a_restart_is_detection_loading_and_warm_up_unless_it_is_said() -> None:
    said = JobOverheads(checkpoint_every=100, ramp_up_s=300.0)
    fixed_s = failure_file().restart.fixed_s
    assert figures(said).restart_s == fixed_s + 300
    stored = dataclasses.replace(said, storage_bytes_per_s=1e10)
    assert figures(stored).restart_s == fixed_s + 300 + 1e12 / 1e10
    assert figures(dataclasses.replace(stored, restart_s=60.0)).restart_s == 60.0


def test_ramp_up_comes_once_and_evaluation_every_so_many_steps() -> None:
    plain = figures(JobOverheads(ramp_up_s=0.0))
    assert plain.days is not None and plain.goodput == 1.0
    begun = figures(JobOverheads(ramp_up_s=3 * HOUR_S))
    assert begun.days == pytest.approx(plain.days + 0.125)
    assert begun.goodput == pytest.approx(plain.days / begun.days)
    evaluated = figures(JobOverheads(eval_every=100, eval_s=50.0))
    assert evaluated.evaluation_s == 0.5 and evaluated.goodput == pytest.approx(10 / 10.5)


def test_a_notice_that_lasts_for_saving_spares_the_steps() -> None:
    said = JobOverheads(
        checkpoint_every=500,
        storage_bytes_per_s=1e10,
        failures_per_1000_node_days=0.0,
        preemptions_per_1000_node_days=100.0,
        preemption_restart_s=600.0,
        preemption_notice_s=99.0,
    )
    late = figures(said)
    in_time = figures(dataclasses.replace(said, preemption_notice_s=101.0))
    between_s = 1000 * DAY_S / 100 / 100
    assert late.between_preemptions_s == in_time.between_preemptions_s == pytest.approx(between_s)
    assert in_time.preemption_share == pytest.approx(1 - math.exp(-700 / between_s))
    assert late.preemption_share > 3 * in_time.preemption_share
    assert (late.failure_share, in_time.failure_share) == (0.0, 0.0)


def test_spare_nodes_are_paid_and_idle() -> None:
    said = JobOverheads(checkpoint_every=100, repair_s=DAY_S, failures_per_1000_node_days=4.0)
    without, spared = figures(said), figures(dataclasses.replace(said, spares=10))
    assert without.waiting_share > 0.25 and spared.waiting_share < 1e-3
    for found, nodes in ((without, 100), (spared, 110)):
        assert found.days is not None
        assert found.cost_usd == pytest.approx(50 * nodes * 24 * found.days)
        shares = found.failure_share + found.preemption_share + found.waiting_share
        assert found.goodput == pytest.approx(1 - shares)


def test_dollars_are_unknown_without_a_price() -> None:
    assert figures(JobOverheads(ramp_up_s=1.0), usd_per_hour=None).cost_usd is None
