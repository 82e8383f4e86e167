"""Options of a plan on some nodes: the same plan at every rate of its offer, with days, dollars and energy.

With s seconds of a step, t tokens in it, T tokens in all, g the goodput of the job and r dollars a node-hour:

    days = T / t x s / g / 86,400        dollars = (nodes + spares) x r x 24 days

The interval of the days is that of the step time; that of the dollars also spans the rate's own range.

A sizing request as planning problems: on which device in which precision, by which profile.

whole_plan(): the plan of an option as `plan solve` writes it, from a longer search than a sizing's.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from planner.cost.compute.weight_gradients import trained_flops_per_token
from planner.cost.goodput import Job, figures_of
from planner.foundation.units import DAY_S
from planner.hardware.catalog import device_names, load_device
from planner.hardware.cluster import ClusterSpec, Device
from planner.hardware.cluster_text import parse_cluster
from planner.hardware.on_premises import OnPremises
from planner.hardware.prices import Market
from planner.job.engine_settings import native_settings
from planner.job.objective import Goal
from planner.job.problem import JobOverheads, PlanningProblem
from planner.profile.choose import shipped_profile, shipped_profiles
from planner.profile.profile import Profile
from planner.search.greedy_plan import Scouted
from planner.search.solve import SolveOptions, solve
from planner.sizing.comparison import Offer, Option, Rate, SizedPlan, SizingRequest
from planner.sizing.energy import EnergyFacts, run_energy
from planner.sizing.usual_overheads import usual_overheads
from planner.strategy.estimate import JobFigures
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.plan import Plan

BILLION = 1e9


class Sized(NamedTuple):
    """A plan on a number of nodes, its job, and what its estimate does not count."""

    plan: SizedPlan
    job: Job
    not_modelled: tuple[str, ...]


def sized(scouted: Scouted, not_modelled: tuple[str, ...]) -> Sized:
    """A scout's plan, short."""
    estimate, strategy = scouted.evaluation.estimate, scouted.evaluation.strategy
    plan = SizedPlan(
        label=strategy.degrees.label(),
        strategy=strategy,
        step_time_s=estimate.step_time_s,
        step_time_interval_s=estimate.step_time_interval_s,
        lower_bound_s=scouted.bound_s,
        tokens_per_s=estimate.tokens_per_s,
        mfu=estimate.mfu,
        verdict=estimate.verdict,
        peak_memory_bytes=estimate.peak_memory_bytes,
        memory_limit_bytes=estimate.memory_limit_bytes,
        breakdown=estimate.breakdown,
        coverage=estimate.coverage,
    )
    return Sized(plan, scouted.job, not_modelled)


def losses_at(job: Job, nodes: int, rate: Rate, said: JobOverheads) -> JobFigures:
    """What a job loses on so many nodes at a rate, and its days and dollars: spot nodes are taken back."""
    price = rate.usd_per_node_hour
    overheads = usual_overheads(job.devices, said, spot=rate.pricing.interruptible)
    return figures_of(
        dataclasses.replace(job, usd_per_hour=None if price is None else nodes * price), overheads
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Costing:
    """What options of all offers have in common: the stated overheads, the goal, and facts of energy."""

    said: JobOverheads
    goal: Goal
    energy: EnergyFacts
    inputs: OnPremises

    def options(self, offer: Offer, nodes: int, sized: Sized) -> list[Option]:
        """The option at each rate of an offer that makes progress."""
        found = (self._option(offer, nodes, sized.plan, sized.job, rate) for rate in offer.rates)
        return [option for option in found if option is not None]

    def _option(self, offer: Offer, nodes: int, plan: SizedPlan, job: Job, rate: Rate) -> Option | None:
        devices, losses = job.devices, losses_at(job, nodes, rate, self.said)
        if losses.days is None:
            return None
        low, high = (losses.days * end / plan.step_time_s for end in plan.step_time_interval_s)
        usd, tokens = losses.cost_usd, job.tokens
        hours = losses.days * DAY_S / 3600
        energy = run_energy(
            load_device(offer.device.name),
            devices,
            hours,
            provider=offer.provider if offer.instance else "",
            region=offer.region,
            pricing=rate.pricing,
            facts=self.energy,
            inputs=self.inputs,
        )
        return Option(
            cluster=offer.cluster_text(nodes),
            provider=offer.provider,
            instance=offer.instance,
            device=offer.device.name,
            nodes=nodes,
            devices=devices,
            devices_per_node=offer.devices_per_node,
            network=offer.network,
            region=offer.region,
            rate=rate,
            plan=plan,
            step_time_s=plan.step_time_s,
            days=losses.days,
            days_interval=(low, high),
            cost_usd=usd,
            cost_interval_usd=None if usd is None else _interval(usd, rate, plan),
            usd_per_billion_tokens=None if usd is None or not tokens else usd / tokens * BILLION,
            goodput=losses.goodput,
            losses=losses,
            energy_kwh=None if energy is None else energy.kwh,
            carbon_kg=None if energy is None else energy.carbon_kg,
            meets=self.goal.meets(losses.days * DAY_S, float("inf") if usd is None else usd),
        )


def _interval(usd: float, rate: Rate, plan: SizedPlan) -> tuple[float, float]:
    """Dollars where step time and rate are at their low ends, and where both are at their high ends."""
    low, high = (end / plan.step_time_s for end in plan.step_time_interval_s)
    price = rate.usd_per_node_hour
    least, most = rate.low_usd_per_node_hour, rate.high_usd_per_node_hour
    down = least / price if least is not None and price else 1.0
    up = most / price if most is not None and price else 1.0
    return usd * low * down, usd * high * up


def with_pareto(options: list[Option]) -> tuple[Option, ...]:
    """Those that keep the goal first, of them the cheapest, and those without a price last; marked are those
    that no other beats in both dollars and days.

    Where some have a price, only such are marked: of others nothing is known.
    """
    ordered = sorted(options, key=_by_dollars)
    priced = any(option.cost_usd is not None for option in ordered)
    soonest = float("inf")
    marked = []
    for option in ordered:
        best = option.days < soonest and (option.cost_usd is not None or not priced)
        soonest = min(soonest, option.days) if best else soonest
        marked.append(dataclasses.replace(option, pareto=best) if best else option)
    return tuple(sorted(marked, key=lambda option: not option.meets))


def _by_dollars(option: Option) -> tuple[bool, float, float, int, str]:
    usd = option.cost_usd
    return usd is None, usd or 0.0, option.days, option.devices, option.name


def profiles_for(request: SizingRequest) -> dict[str, Profile]:
    """The shipped profile of each device that has one; the one that was given, for the device it was measured
    on, or if it was fitted for all."""
    names = {name for profile in shipped_profiles() for name in profile.devices}
    known = {name: found for name in names if (found := shipped_profile(name)) is not None}
    given = request.profile
    if given is None:
        return known
    return known | dict.fromkeys(given.devices if given.measured else device_names(), given)


def peak_device_s(request: SizingRequest, device: Device) -> float:
    """Device-seconds of the whole run at a device's dense peak, which no plan beats; 0: no peak is known."""
    precision = request.precision or device.usual_precision
    workload = dataclasses.replace(request.workload, precision=precision)
    peak = device.peak_flops(precision)
    flops = trained_flops_per_token(request.model, workload) * (workload.tokens or 0)
    return flops / peak if peak else 0.0


def problem_on(
    request: SizingRequest, cluster: ClusterSpec, device: Device, profile: Profile | None
) -> PlanningProblem:
    """The request as a problem on one cluster of a device."""
    usable = device.usable_memory_bytes
    precision = request.precision or device.usual_precision
    return PlanningProblem(
        model=request.model,
        workload=dataclasses.replace(request.workload, precision=precision),
        cluster=cluster,
        profile=profile,
        memory_limit_bytes=min(usable, request.memory_limit_bytes or usable),
        engine_settings=native_settings(cluster),
        overheads=usual_overheads(cluster.devices, request.overheads),
    )


TIME_LIMIT_S = 60.0
"""Seconds of the search, as of `plan solve`."""


def whole_plan(request: SizingRequest, market: Market, option: Option) -> Plan:
    """The best plan on the option's cluster, no slower than the option's own. Raises InfeasibleError."""
    cluster = parse_cluster(option.cluster, market=market)
    device = cluster.groups[0].device
    problem = problem_on(request, cluster, device, profiles_for(request).get(device.name))
    return solve(problem, SolveOptions(pins=FixedChoices(), time_limit_s=TIME_LIMIT_S))
