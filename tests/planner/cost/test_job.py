"""What a job loses between steps, its goodput, and what an estimate says that it does not count."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from click.testing import CliRunner, Result

from planner.cli import cli
from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.goodput import checkpoint_bytes, figures_of, host_link_bytes_per_s, largest_of
from planner.cost.not_modelled import not_modelled
from planner.foundation.units import GIB
from planner.hardware.catalog import load_model
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import NO_OVERHEADS, JobOverheads, PlanningProblem
from planner.model.workload import AdapterModules, Adapters, Method, Optimizer, Precision, Workload
from planner.strategy.estimate import JobFigures
from planner.strategy.plan import decode_plan
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages

DEGREES = Degrees(pp=2, dp_shard=8, zero=Zero.OPTIMIZER, num_micro_batches=4)


def problem(
    overheads: JobOverheads = NO_OVERHEADS, cluster: str = "2x8:a100-sxm-80gb", **workload: object
) -> PlanningProblem:
    return PlanningProblem(
        model=load_model("llama-3-8b"),
        workload=Workload(seq=4096, batch=32, tokens=10**11, **workload),  # type: ignore[arg-type]
        cluster=parse_cluster(cluster),
        profile=None,
        memory_limit_bytes=1000 * GIB,
        overheads=overheads,
    )


def strategy(degrees: Degrees = DEGREES) -> Strategy:
    return Strategy(degrees=degrees, stages=even_stages(32, degrees.stages))


def evaluated(overheads: JobOverheads, degrees: Degrees = DEGREES) -> Evaluation:
    return CostModel(problem(overheads)).evaluate(strategy(degrees))


def job(overheads: JobOverheads, degrees: Degrees = DEGREES) -> JobFigures:
    figures = evaluated(overheads, degrees).estimate.job
    assert figures is not None
    return figures


STEP_S = evaluated(JobOverheads()).estimate.step_time_s
RATE = 4096 * 32 / STEP_S


def test_where_nothing_is_said_nothing_is_counted() -> None:
    assert evaluated(JobOverheads()).estimate.job is None
    assert evaluated(JobOverheads(storage_bytes_per_s=1e9)).estimate.job is None


def test_upkeep_never_changes_the_step() -> None:
    said = JobOverheads(data_tokens_per_s=1.0, checkpoint_every=1, storage_bytes_per_s=1.0, device_spread=0.5)
    assert evaluated(said).estimate.step_time_s == STEP_S


def test_a_loader_that_keeps_up_costs_nothing_and_a_slow_one_the_rest() -> None:
    assert job(JobOverheads(data_tokens_per_s=RATE * 1.01)).data_stall_s == 0.0
    slow = job(JobOverheads(data_tokens_per_s=RATE / 3))
    assert slow.data_stall_s == pytest.approx(2 * STEP_S)
    assert slow.goodput == pytest.approx(1 / 3)
    plain = evaluated(JobOverheads()).estimate
    assert slow.days is not None and plain.days is not None
    assert slow.days == pytest.approx(3 * plain.days)


def test_the_largest_of_normals() -> None:
    """Exact means of the largest of n standard normals (Harter 1961)."""
    assert largest_of(1) == 0.0
    for n, mean in ((2, 0.5642), (10, 1.5388), (100, 2.5076), (1000, 3.2414)):
        assert largest_of(n) == pytest.approx(mean, rel=0.05)
    grid = [largest_of(n) for n in (1, 2, 8, 64, 512, 4096, 2**17)]
    assert grid == sorted(grid) and len(set(grid)) == len(grid)


def test_stragglers_grow_with_their_spread_and_not_on_one_device() -> None:
    some, more = (job(JobOverheads(device_spread=spread)).straggler_s for spread in (0.01, 0.02))
    assert more == pytest.approx(2 * some) and some > 0
    done = CostModel(problem(JobOverheads(device_spread=0.1), "1x1:a100-sxm-80gb")).evaluate(
        strategy(Degrees(num_micro_batches=32))
    )
    assert done.estimate.job is not None and done.estimate.job.straggler_s == 0.0


def test_a_checkpoint_holds_every_weight_once_whatever_the_degrees() -> None:
    """4 bytes a weight and 8 of AdamW's state; replicas do not write again."""
    params = load_model("llama-3-8b").params_total
    for degrees in (
        DEGREES,
        Degrees(tp=4, dp_shard=4, zero=Zero.PARAMETERS, num_micro_batches=8),
        Degrees(pp=4, dp_replicate=4, num_micro_batches=8),
    ):
        model = CostModel(problem())
        shape = model.layout(degrees)
        written, own = checkpoint_bytes(shape, model.stage_costs(shape, strategy(degrees)))
        assert written == pytest.approx(12 * params, rel=0.01)
        assert len(own) == degrees.pp and sum(own) <= written


def test_checkpoints_wait_for_the_slower_of_storage_and_host_link() -> None:
    def wait_s(**more: object) -> float:
        found = job(JobOverheads(checkpoint_every=100, **more)).checkpoint_wait_s  # type: ignore[arg-type]
        assert found is not None
        return found

    size = job(JobOverheads(checkpoint_every=100)).checkpoint_bytes
    assert wait_s(storage_bytes_per_s=1e9) == pytest.approx(size / 1e9)
    link = host_link_bytes_per_s(problem())
    assert link is not None
    staged_s = wait_s(storage_bytes_per_s=1e18)
    assert 0 < staged_s < size / link
    assert wait_s(storage_bytes_per_s=1e12, checkpoint_async=True) == pytest.approx(staged_s)
    # Behind the steps, only what takes longer than the interval is waited for.
    late_s = wait_s(storage_bytes_per_s=1e9, checkpoint_async=True)
    assert late_s == pytest.approx(staged_s + max(0.0, size / 1e9 - 100 * STEP_S))
    rates = [
        wait_s(storage_bytes_per_s=rate, checkpoint_async=later)
        for later in (False, True)
        for rate in (1e8, 1e9, 1e10)
    ]
    assert rates[:3] == sorted(rates[:3], reverse=True) and rates[3:] == sorted(rates[3:], reverse=True)
    assert all(behind <= before for before, behind in zip(rates[:3], rates[3:], strict=True))


def test_failures_cost_a_restart_and_half_an_interval() -> None:
    said = JobOverheads(checkpoint_every=1000, failures_per_1000_node_days=4.0, restart_s=600.0)
    figures = job(said)
    between_s = 1000 * 86400 / 4.0 / 2  # two nodes
    assert figures.between_failures_s == pytest.approx(between_s)
    assert figures.failure_share == pytest.approx(
        (600 + 500 * STEP_S) / between_s, rel=1e-3
    )  # to first order
    assert figures.goodput == pytest.approx(1 - figures.failure_share)
    never = job(dataclasses.replace(said, failures_per_1000_node_days=0.0))
    assert never.between_failures_s is None and never.goodput == 1.0


def test_the_best_interval_loses_less_than_its_neighbours() -> None:
    said = JobOverheads(checkpoint_every=1, storage_bytes_per_s=1e9, failures_per_1000_node_days=1000.0)
    best = job(dataclasses.replace(said, checkpoint_every=500)).best_checkpoint_every
    assert best is not None

    def goodput(every: int) -> float:
        return job(dataclasses.replace(said, checkpoint_every=every)).goodput

    assert goodput(best) > max(goodput(best // 3), goodput(best * 3))


@pytest.mark.parametrize("every", [1, 10, 1000, 10**9])
@pytest.mark.parametrize("storage", [1.0, 1e9, 1e15])
def test_goodput_is_a_share(every: int, storage: float) -> None:
    for later in (False, True):
        figures = job(
            JobOverheads(checkpoint_every=every, storage_bytes_per_s=storage, checkpoint_async=later)
        )
        assert 0 <= figures.goodput <= 1 and math.isfinite(figures.checkpoint_stall_s)


# What is not counted


def listed(given: PlanningProblem, degrees: Degrees = DEGREES) -> str:
    return "; ".join(not_modelled(given, strategy(degrees)))


def test_what_is_counted_is_not_listed() -> None:
    all_said = JobOverheads(
        data_tokens_per_s=1e9, checkpoint_every=1, storage_bytes_per_s=1e9, device_spread=0.0
    )
    all_said = dataclasses.replace(all_said, ramp_up_s=0.0, eval_every=1, eval_s=0.0)
    for flag in ("--data-rate", "--checkpoint-every", "--device-spread", "--ramp-up", "--eval-every"):
        assert flag in listed(problem()) and flag not in listed(problem(all_said))
    for flag in ("--repair", "--preemptions"):
        assert flag in listed(problem(all_said)) and flag not in listed(problem())
    stopped = dataclasses.replace(all_said, repair_s=0.0, preemptions_per_1000_node_days=0.0)
    behind = dataclasses.replace(stopped, checkpoint_async=True)
    assert "run meanwhile" in listed(problem(behind)) and "run meanwhile" not in listed(problem(stopped))
    assert "--repair" not in listed(problem(stopped)) and "--preemptions" not in listed(problem(stopped))
    assert "--storage" in listed(problem(JobOverheads(checkpoint_every=5))) and "--storage" not in listed(
        problem()
    )


@pytest.mark.parametrize(
    ("changed", "phrase"),
    [
        ({"precision": Precision.FP16}, "loss scaling"),
        ({"optimizer": Optimizer.MUON}, "timed as AdamW's"),
        ({"cluster": "2x8:a100-sxm-80gb+2x8:h100-sxm-80gb"}, "devices of several kinds"),
        ({"cluster": "2x8:a100-sxm-80gb@none"}, "said to take no time"),
        ({"cluster": "local:2"}, "other programs on this machine"),
    ],
)
def test_what_depends_on_the_problem_is_listed_where_it_holds(
    changed: dict[str, object], phrase: str
) -> None:
    assert phrase not in listed(problem())
    assert phrase in listed(problem(**changed))  # type: ignore[arg-type]


def test_adapters_and_experts_have_phrases_of_their_own() -> None:
    adapters = Adapters(rank=8, modules=AdapterModules.QV)
    lora = problem(method=Method.LORA, adapters=adapters)
    assert "for adapters" in listed(lora, Degrees(tp=2, dp_shard=8, num_micro_batches=4))
    assert "for adapters" not in listed(lora)
    experts = dataclasses.replace(problem(), model=load_model("mixtral-8x7b"))
    assert "experts" in listed(experts) and "experts" not in listed(problem())
    assert "traffic of other jobs" in listed(problem())
    assert "traffic of other jobs" not in listed(problem(cluster="1x8:a100-sxm-80gb"), Degrees(dp_shard=8))


# The command


def estimate(*more: str) -> Result:
    words = "estimate --model llama-3-8b --cluster 4x8:h100-sxm-80gb --seq 4096 --batch 64 --tokens 1T "
    return CliRunner().invoke(cli, [*words.split(), "--fix", "zero=3", *more])


SAID = (
    "--data-rate",
    "200K/s",
    "--checkpoint-every",
    "200",
    "--storage",
    "10GB/s",
    "--device-spread",
    "0.01",
)


def test_the_answer_says_what_is_lost_in_text_and_json() -> None:
    text = estimate(*SAID).stdout
    for words in ("waiting for data", "for the slowest device", "for checkpoints", "loses least", "goodput"):
        assert words in text
    document = json.loads(estimate(*SAID, "--json").stdout)
    figures = document["estimate"]["job"]
    assert 0 < figures["goodput"] < 1
    assert figures["days"] > document["estimate"]["days"]
    assert decode_plan(document, source="answer").estimate.job is not None
    assert not any("--data-rate" in phrase for phrase in document["not_modelled"])
    assert "not modelled" in text


ALL_OF_IT = (
    *(
        "--checkpoint-every",
        "best",
        "--storage",
        "10GB/s",
        "--checkpoint-async",
        "--repair",
        "4h",
        "--spares",
        "1",
    ),
    *("--preemptions", "spot", "--preemption-notice", "2min", "--ramp-up", "20min"),
    *("--eval-every", "500", "--eval-time", "2min"),
)


def test_all_that_stops_a_job_is_counted_in_text_and_json() -> None:
    text = estimate(*ALL_OF_IT).stdout
    for words in (
        "for evaluation, a step",
        "of all time (one in",
        "preemptions",
        "without a node",
        "h100-sxm-80gb: 3.8 (2.3 to 8.4; Llama 3",
        "steps, which loses least",
        "spare nodes",
        "ramp-up",
    ):
        assert words in text
    assert "--repair" not in text and "--preemptions" not in text
    found = json.loads(estimate(*ALL_OF_IT, "--json").stdout)["estimate"]["job"]
    assert found["checkpoint_every"] == found["best_checkpoint_every"] > 1
    assert found["between_preemptions_s"] == pytest.approx(1000 * 86400 / 100 / 4)
    assert found["spares"] == 1 and found["ramp_up_s"] == 1200 and found["evaluation_s"] == 0.24
    assert 0 < found["waiting_share"] < found["failure_share"] + found["preemption_share"] < 0.1


def test_a_run_without_a_price_costs_an_unknown_sum() -> None:
    for more in ((), SAID):
        text = estimate(*more).stdout
        assert "unknown: 4x8:h100-sxm-80gb@ndr400x8 has no price (--prices, --on-premises)" in text
        figures = json.loads(estimate(*more, "--json").stdout)["estimate"]
        assert figures["cost_usd"] is None and (figures["job"] or {}).get("cost_usd") is None


def test_another_upkeep_needs_no_other_evaluation() -> None:
    said = JobOverheads(checkpoint_every=200, storage_bytes_per_s=1e9, device_spread=0.02, repair_s=600.0)
    model = CostModel(problem())
    again = model.job(model.evaluate(strategy()))
    assert figures_of(again, said) == job(said)


def test_every_figure_carries_an_interval_and_an_origin() -> None:
    document = json.loads(estimate("--json").stdout)
    found = document["estimate"]
    low, high = found["peak_memory_interval_bytes"]
    assert low < found["peak_memory_bytes"] < high
    assert found["step_time_interval_s"][0] < found["step_time_s"] < found["step_time_interval_s"][1]
    assert sum(found["coverage"].values()) == pytest.approx(1.0)
    assert document["not_modelled"]


@pytest.mark.parametrize(
    ("options", "faults"),
    [
        (("--storage", "10GB/s"), ["--storage: says nothing without --checkpoint-every"]),
        (("--checkpoint-every", "best"), ["--checkpoint-every best: says nothing without --storage"]),
        (("--checkpoint-every", "0"), ["'0' is no interval", "a whole number of steps from 1, or best"]),
        (("--checkpoint-every", "-3", "--eval-time", "1h"), ["'-3' is no interval", "without --eval-every"]),
        (("--eval-every", "3"), ["--eval-every: says nothing without --eval-time"]),
        (
            ("--spares", "2", "--preemptions", "often"),
            ["--spares: says nothing without --repair", "--preemptions: 'often'", "without --checkpoint"],
        ),
        (("--preemption-notice", "2min"), ["--preemption-notice: says nothing without --preemptions"]),
        (("--ramp-up", "soon", "--repair", "1y"), ["--ramp-up: 'soon'", "--repair: '1y'"]),
        (("--failures", "3", "--restart", "1h"), ["--failures: says nothing", "--restart: says nothing"]),
        (("--data-rate", "fast"), ["--data-rate: 'fast' is not a quantity"]),
        (("--data-rate", "0"), ["--data-rate: '0' is no rate at all"]),
        (("--storage", "0GB/s", "--checkpoint-every", "1"), ["is no rate at all"]),
        (
            ("--checkpoint-async", "--checkpoint-every", "1"),
            ["--checkpoint-async: says nothing without --storage"],
        ),
        (
            ("--data-rate", "x", "--storage", "y"),
            ["--data-rate", "--storage: 'y'", "without --checkpoint-every"],
        ),
    ],
)
def test_options_that_say_nothing_or_the_wrong_thing_are_refused(
    options: tuple[str, ...], faults: list[str]
) -> None:
    result = estimate(*options)
    assert result.exit_code == 2
    for fault in faults:
        assert fault in result.output
