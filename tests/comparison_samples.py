"""Sample comparisons of hardware for the tests of their page.

`python -m tests.comparison_samples DIR` writes their pages, to look at.
"""

from __future__ import annotations

import dataclasses
import sys
from itertools import product
from pathlib import Path

from planner.foundation.units import DAY_S, GIB
from planner.job.objective import Goal, Minimise
from planner.model.workload import Workload
from planner.sizing.comparison import (
    Assumption,
    BreakEven,
    Comparison,
    LeftOut,
    Option,
    Pricing,
    Rate,
    Sensitivity,
    SizedPlan,
)
from planner.strategy.estimate import Coverage, JobFigures, TimeBreakdown, Verdict
from planner.strategy.strategy import Degrees, Schedule, Strategy, Zero, even_stages

PARAMS = 70_553_706_496
TOKENS = 2_000_000_000_000
HOSTILE = "</style><script>alert('x')</script><img src=x onerror=alert(1)>&\"'{{ 7*7 }}{% raw %}"

OFFERS = (
    ("aws", "p5.48xlarge", "h100-sxm-80gb", 8, "us-east-1", 55.04, 989e12, 79.1),
    ("aws", "p5en.48xlarge", "h200-sxm-141gb", 8, "us-east-1", 63.296, 989e12, 139.8),
    ("aws", "p4d.24xlarge", "a100-sxm-40gb", 8, "us-east-1", 21.957, 312e12, 39.0),
    ("azure", "ND96isr_H100_v5", "h100-sxm-80gb", 8, "eastus", 98.32, 989e12, 79.1),
    ("azure", "ND96isr_MI300X_v5", "mi300x", 8, "westus", None, 1307e12, 191.0),
    ("gcp", "a3-megagpu-8g", "h100-sxm-80gb", 8, "us-central1", 88.0, 989e12, 79.1),
    ("gcp", "a4-highgpu-8g", "b200-sxm", 8, "us-central1", 112.0, 2250e12, 178.3),
    ("lambda", "gpu_8x_h100_sxm5", "h100-sxm-80gb", 8, "us-west-1", 31.92, 989e12, 79.1),
    ("oci", "BM.GPU.H100.8", "h100-sxm-80gb", 8, "", 80.0, 989e12, 79.1),
    ("", "", "h100-sxm-80gb", 8, "", 19.2, 989e12, 79.1),
)
"""Provider, instance, device, devices a node, region, dollars a node-hour, peak, GiB of a device."""

COUNTS = (16, 32, 64, 96, 128, 192, 256)
WORKLOAD = Workload(seq=8192, batch=512, tokens=TOKENS)
GOAL = Goal(minimise=Minimise.COST, deadline_s=30 * DAY_S, budget_usd=4_000_000)


def degrees(devices: int) -> Degrees:
    tp, pp = 8, 4 if devices >= 256 else 2
    dp = max(1, devices // (tp * pp))
    return Degrees(
        tp=tp, pp=pp, chunks=2, schedule=Schedule.INTERLEAVED, dp_shard=dp, zero=Zero.OPTIMIZER,
        num_micro_batches=max(1, 512 // dp), sequence_parallel=True,
    )  # fmt: skip


def sized_plan(devices: int, peak_flops: float, memory_gib: float) -> SizedPlan:
    """A plan whose step takes 6 N D over the devices' peak at an MFU that falls with their number."""
    mfu = 0.46 - 0.03 * (devices / 512) ** 0.5
    step_s = 6 * PARAMS * WORKLOAD.tokens_per_step / (devices * peak_flops * mfu)
    chosen = degrees(devices)
    limit = round(memory_gib * GIB)
    peak = round(min(0.985, 0.55 + 90 / (memory_gib * devices**0.4)) * limit)
    return SizedPlan(
        label=chosen.label(),
        strategy=Strategy(degrees=chosen, stages=even_stages(80, chosen.stages)),
        step_time_s=step_s,
        step_time_interval_s=(0.87 * step_s, 1.16 * step_s),
        lower_bound_s=0.96 * step_s,
        tokens_per_s=WORKLOAD.tokens_per_step / step_s,
        mfu=mfu,
        verdict=Verdict.SAFE if peak < 0.95 * limit else Verdict.RISKY,
        peak_memory_bytes=peak,
        memory_limit_bytes=limit,
        breakdown=TimeBreakdown(
            compute_s=0.68 * step_s, tp_comm_s=0.12 * step_s, dp_comm_s=0.05 * step_s,
            pp_comm_s=0.02 * step_s, bubble_s=0.1 * step_s, optimizer_s=0.02 * step_s, host_s=0.01 * step_s,
        ),
        coverage=Coverage(fitted=0.8, datasheet=0.2),
    )  # fmt: skip


def job(step_s: float, nodes: int, spot: bool) -> JobFigures:
    lost = min(0.5, 0.00035 * nodes * (6 if spot else 1))
    whole_s = step_s * 1.018
    goodput = step_s / whole_s * (1 - lost)
    days = TOKENS / WORKLOAD.tokens_per_step * step_s / goodput / DAY_S
    return JobFigures(
        data_stall_s=0.0, straggler_s=0.006 * step_s, checkpoint_stall_s=0.012 * step_s,
        checkpoint_bytes=14 * PARAMS, checkpoint_wait_s=25.0, failure_share=lost,
        between_failures_s=1000 * DAY_S / 3.8 / nodes, best_checkpoint_every=180, goodput=goodput, days=days,
        cost_usd=None,
    )  # fmt: skip


def option(
    offer: tuple[str, str, str, int, str, float | None, float, float], nodes: int, pricing: Pricing
) -> Option:
    provider, instance, device, per_node, region, price, peak, memory_gib = offer
    factor = {Pricing.SPOT: 0.4, Pricing.RESERVED_1Y: 0.66, Pricing.RESERVED_3Y: 0.48}.get(pricing, 1.0)
    rate = None if price is None else price * factor
    plan = sized_plan(nodes * per_node, peak, memory_gib)
    losses = job(plan.step_time_s, nodes, pricing.interruptible)
    assert losses.days is not None
    days = losses.days
    cost = None if rate is None else rate * nodes * 24 * days
    energy = 1.3 * 1.2 * 0.7 * nodes * per_node * 24 * days
    network = "ndr400x8"
    cluster = f"{nodes}*{provider}/{instance}" if instance else f"{nodes}x{per_node}:{device}@{network}"
    return Option(
        cluster=cluster, provider=provider, instance=instance, device=device, nodes=nodes,
        devices=nodes * per_node, devices_per_node=per_node, network=network, region=region,
        rate=Rate(
            pricing=pricing, usd_per_node_hour=rate, as_of="" if rate is None else "2026-09-06",
            source="" if rate is None else f"catalog of {provider or 'on-premises costs'}",
            includes="node, local disks; no storage, no egress" if rate is not None else "",
            doubtful="twice the median of other providers" if provider == "gcp" and rate else "",
        ),
        plan=plan, step_time_s=plan.step_time_s, days=days, days_interval=(0.87 * days, 1.16 * days),
        cost_usd=cost, cost_interval_usd=None if cost is None else (0.8 * cost, 1.25 * cost),
        usd_per_billion_tokens=None if cost is None else cost / (TOKENS / 1e9),
        goodput=losses.goodput, losses=losses, energy_kwh=energy, carbon_kg=0.39 * energy,
    )  # fmt: skip


def pricings(provider: str, price: float | None) -> tuple[Pricing, ...]:
    if not provider:
        return (Pricing.ON_PREMISES,)
    if price is None:
        return (Pricing.ON_DEMAND,)
    return (Pricing.ON_DEMAND, Pricing.SPOT, Pricing.RESERVED_1Y)


def judged(options: list[Option], goal: Goal) -> tuple[Option, ...]:
    """The options in order, with their Pareto flags and whether they meet the goal."""
    result = []
    for each in options:
        late = goal.deadline_s is not None and each.days * DAY_S > goal.deadline_s
        dear = goal.budget_usd is not None and (each.cost_usd is None or each.cost_usd > goal.budget_usd)
        front = each.cost_usd is not None and not any(
            other.cost_usd is not None
            and each.cost_usd is not None
            and other.cost_usd <= each.cost_usd
            and other.days <= each.days
            and (other.cost_usd, other.days) != (each.cost_usd, each.days)
            for other in options
        )
        result.append(dataclasses.replace(each, meets=not late and not dear, pareto=front))
    return tuple(sorted(result, key=lambda o: (not o.meets, o.cost_usd is None, o.cost_usd or 0.0, o.days)))


def comparison(
    counts: tuple[int, ...] = COUNTS, goal: Goal = GOAL, options: list[Option] | None = None
) -> Comparison:
    if options is None:
        options = [
            option(offer, nodes, pricing)
            for offer, nodes in product(OFFERS, counts)
            for pricing in pricings(offer[0], offer[5])
        ]
    ordered = judged(options, goal)
    return Comparison(
        model="llama-3-70b", params_total=PARAMS, params_active=PARAMS, workload=WORKLOAD,
        tokens_note="as asked for", goal=goal, options=ordered,
        left_out=(
            LeftOut(offer="aws/g4dn.xlarge", reason="T4: no plan fits in 14.6 GiB a device"),
            LeftOut(offer="aws/g4dn.12xlarge", reason="T4: no plan fits in 14.6 GiB a device"),
            LeftOut(offer="vast/8xL40S", reason="its network between nodes is not known: one node alone"),
        ),
        assumptions=(
            Assumption(what="failures", value="3.8 in 1000 node-days", source="Llama 3, arXiv 2407.21783",
                       as_of="2024-07", flag="--failures"),
            Assumption(what="electricity", value="$0.08 a kWh", source="EIA", as_of="2026-05",
                       flag="--prices"),
        ),
        sensitivity=_sensitivity(ordered), break_even=(
            BreakEven(device="h100-sxm-80gb", rented="aws/p5.48xlarge, on-demand",
                      rented_usd_per_device_hour=6.88, owned_usd_per_device_hour=2.4,
                      owned_at_utilisation=0.7, utilisation=0.31, months=11.0),
            BreakEven(device="h100-sxm-80gb", rented="vast/8xH100, spot", rented_usd_per_device_hour=1.2,
                      owned_usd_per_device_hour=2.4, owned_at_utilisation=0.7, utilisation=None, months=None),
        ),
        not_modelled=("storage and egress", "staff", "queueing for capacity"),
        created="2026-11-25", version="0.1.0",
    )  # fmt: skip


def _sensitivity(options: tuple[Option, ...]) -> tuple[Sensitivity, ...]:
    if not options:
        return ()
    best = options[0]
    cost = best.cost_usd
    return (
        Sensitivity(
            what="price", low="-20 %", high="+20 %", low_days=best.days, high_days=best.days,
            low_cost_usd=None if cost is None else 0.8 * cost,
            high_cost_usd=None if cost is None else 1.2 * cost, best_stays=True,
        ),
        Sensitivity(
            what="MFU", low="low end", high="high end", low_days=1.16 * best.days, high_days=0.87 * best.days,
            low_cost_usd=None if cost is None else 1.16 * cost,
            high_cost_usd=None if cost is None else 0.87 * cost, best_stays=False,
            best_at_low=options[-1].name, best_at_high=best.name,
        ),
    )  # fmt: skip


def hostile() -> Comparison:
    """Every text of somebody else's is markup."""
    sample = comparison(counts=(64, 128))
    options = tuple(
        dataclasses.replace(
            each, provider=HOSTILE, instance=HOSTILE, device=HOSTILE, region=HOSTILE, cluster=HOSTILE,
            rate=dataclasses.replace(
                each.rate, source=HOSTILE, as_of=HOSTILE, includes=HOSTILE, doubtful=HOSTILE
            ),
        )
        for each in sample.options
    )  # fmt: skip
    return dataclasses.replace(
        sample, model=HOSTILE, tokens_note=HOSTILE, options=options, created=HOSTILE, version=HOSTILE,
        left_out=(LeftOut(offer=HOSTILE, reason=HOSTILE),),
        assumptions=(
            Assumption(what=HOSTILE, value=HOSTILE, source=HOSTILE, as_of=HOSTILE, flag=HOSTILE),
        ),
        sensitivity=tuple(
            dataclasses.replace(row, what=HOSTILE, low=HOSTILE, high=HOSTILE, best_at_low=HOSTILE)
            for row in sample.sensitivity
        ),
        break_even=tuple(
            dataclasses.replace(row, device=HOSTILE, rented=HOSTILE) for row in sample.break_even
        ),
        not_modelled=(HOSTILE,),
    )  # fmt: skip


def unpriced() -> Comparison:
    """No price is known of anything."""
    options = [option((*o[:5], None, *o[6:]), 64, Pricing.ON_DEMAND) for o in OFFERS[:4]]
    return dataclasses.replace(comparison(options=options), break_even=())


def none_meets() -> Comparison:
    return comparison(goal=dataclasses.replace(GOAL, deadline_s=DAY_S, budget_usd=100_000))


def single() -> Comparison:
    return comparison(options=[option(OFFERS[0], 128, Pricing.ON_DEMAND)])


def empty() -> Comparison:
    return dataclasses.replace(comparison(options=[]), sensitivity=(), break_even=())


def many() -> Comparison:
    """Some 2,000 options."""
    return comparison(counts=tuple(range(8, 8 + 84 * 4, 4)))


def short() -> Comparison:
    """Fewer options than the table shows at first."""
    return comparison(counts=(64, 128))


SAMPLES = {
    "usual": comparison, "short": short, "hostile": hostile, "unpriced": unpriced, "none-meets": none_meets,
    "single": single, "empty": empty, "many": many,
}  # fmt: skip


def main() -> None:
    from planner.report.comparison_page import render_comparison

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, build in SAMPLES.items():
        (folder / f"{name}.html").write_text(render_comparison(build()), encoding="utf-8")


if __name__ == "__main__":
    main()
