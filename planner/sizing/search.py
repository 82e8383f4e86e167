"""compare(): every option of a run, on all offers that are asked for.

Offers whose nodes are equal in device, number and network share their plans: providers differ in price. Each
such kind is scouted up its ladder of node counts (planner.sizing.floors):

    all of them     until twice the nodes make steps no shorter: what a comparison shows
    the least       from the first that may keep the deadline at the devices' peak to the first that does,
                    with counts between two rungs, and on while node-hours fall; then counts next to the
                    cheapest: what a sizing asks for

Kinds are independent: they are scouted on all cores.

compare(): the options of a run beside each other, and all that their figures rest on.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import importlib.metadata
import math
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping, Sequence
from functools import partial

from planner.cost.goodput import figures_of
from planner.cost.not_modelled import TAKEN_BACK, not_modelled
from planner.foundation.units import DAY_S
from planner.hardware.catalog import load_device
from planner.hardware.cluster_text import parse_cluster
from planner.hardware.on_premises import OnPremises
from planner.hardware.prices import Market, on_premises_inputs
from planner.job.objective import Goal
from planner.profile.profile import Profile
from planner.search.greedy_plan import Scout, Shared
from planner.sizing.assumptions import assumptions_of
from planner.sizing.comparison import (
    BreakEven,
    Comparison,
    LeftOut,
    Offer,
    Option,
    Pricing,
    Sensitivity,
    SizingRequest,
)
from planner.sizing.energy import energy_facts
from planner.sizing.floors import RULED_OUT, Floors, Kind, Scouting, between, ladder, most_nodes
from planner.sizing.sensitivity import break_evens, owned, sensitivities
from planner.sizing.sized import Costing, Sized, peak_device_s, problem_on, profiles_for, sized, with_pareto
from planner.sizing.usual_overheads import usual_overheads
from planner.strategy.fixed_choices import FixedChoices

Progress = Callable[[int, int], None]
"""Called with the kinds that are done and all of them."""

FASTER = 0.98
"""Twice the nodes are worth trying on where they take less than this of the step time."""
REFINED = 6
"""Counts between two rungs that are scouted at most."""
BESIDE = 2
"""Rungs in a row that take no fewer node-hours than fewer nodes do, after which a sizing asks for no more."""
ENDLESS_S = 1000 * DAY_S
"""Runs of which even the devices' peak takes longer are no options, unless their nodes are named."""
AT_PEAK = "days even if all devices were at their peak"
"""How the reason ends where nodes are too few for the deadline whatever their plan."""
ALONE_KINDS = 8
"""Fewer kinds than this are scouted in this process: starting others takes as long."""


Known = MutableMapping[Hashable, Scouting]
"""What was found before, by what it depends on: neither prices nor limits nor tokens."""


def scout_all(
    request: SizingRequest, market: Market, progress: Progress, known: Known | None = None
) -> list[tuple[Offer, Scouting]]:
    """What was found on each offer, in their order. What is `known` is not searched for again."""
    most = most_nodes(request.offers, request.most_devices)
    if request.counts is not None:
        most = {name: max(nodes, *request.counts) for name, nodes in most.items()}
    kinds: dict[tuple[str, int, str], list[Offer]] = defaultdict(list)
    for offer in request.offers:
        kinds[offer.device.name, offer.devices_per_node, offer.network].append(offer)
    each = [
        Kind(
            *key,
            offers[0],
            max(most[offer.name] for offer in offers),
            tuple(sorted({nodes for offer in offers for nodes in offer.counts})),
        )
        for key, offers in kinds.items()
    ]
    task = partial(scout_device, dataclasses.replace(request, offers=()), market, profiles_for(request))
    known = {} if known is None or request.least else known
    keys = {kind: (_regardless(request), market.prices, *kind[:3], kind.most, kind.counts) for kind in each}
    devices: dict[str, list[Kind]] = defaultdict(list)
    for kind in sorted(each, key=lambda kind: -kind.devices_per_node):
        if keys[kind] not in known:
            devices[kind.device].append(kind)
    found = {
        kind[:3]: known[keys[kind]].for_tokens(request.workload.tokens)
        for kind in each
        if keys[kind] in known
    }
    rounds = [[kind for kinds in devices.values() for kind in kinds]]
    floors = Floors(request, kinds)
    if request.least and not request.thorough:
        rounds = floors.likeliest(rounds[0])
    for number, asked in enumerate(rounds):
        if number:
            asked, ruled_out = floors.open(asked, found)
            found |= ruled_out
        groups: dict[str, list[Kind]] = defaultdict(list)
        for kind in asked:
            groups[kind.device].append(kind)
        for done in _mapped(task, sorted(groups.values(), key=len, reverse=True)):
            found |= {kind[:3]: scouting for kind, scouting in done}
            known.update({keys[kind]: scouting for kind, scouting in done})
            progress(len(found), len(each))
    if request.least and request.counts is None:
        named = [kind._replace(counts=nodes) for kind, nodes in floors.beside(each, found)]
        for done in _mapped(task, [[kind] for kind in named]):
            found |= {kind[:3]: found[kind[:3]].joined(more) for kind, more in done}
    scoutings = (found[o.device.name, o.devices_per_node, o.network] for o in request.offers)
    pairs = zip(request.offers, scoutings, strict=True)
    return [(offer, scouting.of(offer, most[offer.name])) for offer, scouting in pairs]


def _regardless(request: SizingRequest) -> SizingRequest:
    """The request without what a search for all plans does not depend on."""
    workload = dataclasses.replace(request.workload, tokens=None)
    return dataclasses.replace(request, workload=workload, offers=(), goal=Goal(), tokens_note="")


def _mapped(
    task: Callable[[list[Kind]], list[tuple[Kind, Scouting]]], devices: list[list[Kind]]
) -> Iterator[list[tuple[Kind, Scouting]]]:
    """The results of a task, as they come."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, len(devices))
    if workers < 2 or sum(map(len, devices)) < ALONE_KINDS:
        yield from map(task, devices)
        return
    import multiprocessing
    import threading
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    alone = threading.active_count() == 1 and "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if alone else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        left = {pool.submit(task, kinds): kinds for kinds in devices}
        try:
            for future in as_completed(tuple(left)):
                found = future.result()
                del left[future]
                yield found
        except BrokenProcessPool:
            pass  # no worker can start, as under a script without a main guard: what is left is done here
        finally:  # whoever asked may have stopped asking
            pool.shutdown(wait=False, cancel_futures=True)
    yield from map(task, left.values())


def scout_device(
    request: SizingRequest, market: Market, profiles: dict[str, Profile], kinds: list[Kind]
) -> list[tuple[Kind, Scouting]]:
    """The plans on each kind of node of one device, which share the costs of layers."""
    shared, profile, collected = Shared(FixedChoices()), profiles.get(kinds[0].device), gc.isenabled()
    gc.disable()  # plans make many small objects and hardly a cycle
    try:
        return [(kind, _Climb(request, market, profile, kind, shared).scouting()) for kind in kinds]
    finally:
        if collected:
            gc.enable()


def _days(seconds: float) -> str:
    days = seconds / DAY_S
    return f"{days:,.0f}" if days >= 100 else f"{days:.3g}"


class _Climb:
    """The scouting of one kind, from few nodes to many."""

    def __init__(
        self,
        request: SizingRequest,
        market: Market,
        profile: Profile | None,
        kind: Kind,
        shared: Shared,
    ) -> None:
        self.request, self.market, self.profile, self.shared = request, market, profile, shared
        self.offer, self.most, self.named = kind.offer, kind.most, kind.counts
        self.found = Scouting({}, {})
        self.scout: Scout | None = None
        self.precision = request.precision or kind.offer.device.usual_precision

    def scouting(self) -> Scouting:
        lacking = self._lacking()
        if lacking:
            self.found.why_not[1] = lacking
            return self.found
        named = self.named or self.request.counts
        counts = named or ladder(self.most)
        if not self.offer.network:
            counts = tuple(nodes for nodes in counts if nodes == 1)
            self.found.why_not[2] = "what connects several of its nodes is not known"
        if named:
            for nodes in counts:
                self._plan(nodes)
        elif self.request.least:
            self._least(counts)
        else:
            self._all(counts)
        return self.found

    def _lacking(self) -> str:
        """What is not known of the device and must be."""
        device = self.offer.device
        if device.peak_flops(self.precision) is None:
            return f"no {self.precision} peak of {device.title} is known"
        if device.memory_bandwidth_bytes_per_s is None:
            return f"no memory bandwidth of {device.title} is known"
        return ""

    def _all(self, counts: Iterable[int]) -> None:
        before_s = math.inf
        for nodes in counts:
            peak_s = self._peak_s(nodes)
            if peak_s > ENDLESS_S:
                self.found.why_not[nodes] = f"{_days(peak_s)} {AT_PEAK}"
                continue
            found = self._plan(nodes)
            if found is None:
                continue
            if found.plan.step_time_s > FASTER * before_s:
                break
            before_s = found.plan.step_time_s

    def _least(self, counts: Iterable[int]) -> None:
        """The rungs from the fewest nodes that may keep the deadline, the counts just below the first that
        does, and rungs beyond it until several in a row are no cheaper than the cheapest."""
        deadline_s = self.request.goal.deadline_s
        below, before_s, least_s, dearer = 0, math.inf, math.inf, 0
        for nodes in counts:
            peak_s = self._peak_s(nodes)
            if deadline_s is not None and peak_s > deadline_s:
                self.found.why_not[nodes] = f"{_days(peak_s)} {AT_PEAK}"
                below = nodes
                continue
            found = self._plan(nodes)
            if found is None:
                below = nodes
                continue
            if self._keeps(found):
                if least_s == math.inf:
                    self._refine(below, nodes)
                used_s = nodes * self._run_s(found)
                dearer = 0 if used_s < least_s else dearer + 1
                least_s = min(used_s, least_s)
                if dearer == BESIDE:
                    break
            if found.plan.step_time_s > FASTER * before_s:
                break
            below, before_s = nodes, found.plan.step_time_s

    def _run_s(self, sized: Sized) -> float:
        """Seconds of the whole run at the usual overheads; infinite where no step is kept."""
        figures = figures_of(sized.job, usual_overheads(sized.job.devices, self.request.overheads))
        return math.inf if figures.days is None else figures.days * DAY_S

    def _peak_s(self, nodes: int) -> float:
        """Seconds of the whole run on so many nodes at their peak."""
        return peak_device_s(self.request, self.offer.device) / (nodes * self.offer.devices_per_node)

    def _keeps(self, sized: Sized) -> bool:
        """Whether the deadline, if there is one, is kept at the usual overheads."""
        deadline_s = self.request.goal.deadline_s
        return deadline_s is None or self._run_s(sized) <= deadline_s

    def _refine(self, below: int, enough: int) -> None:
        """Halves the counts between one that is too few and one that is enough."""
        counts = between(below, enough, self.request.workload.batch, self.offer.devices_per_node)
        for _ in range(REFINED):
            if not counts:
                return
            middle = len(counts) // 2
            found = self._plan(counts[middle])
            counts = counts[:middle] if found is not None and self._keeps(found) else counts[middle + 1 :]

    def _plan(self, nodes: int) -> Sized | None:
        if nodes in self.found.plans:
            return self.found.plans[nodes]
        cluster = parse_cluster(self.offer.cluster_text(nodes), market=self.market)
        problem = problem_on(self.request, cluster, self.offer.device, self.profile)
        if self.scout is None:
            self.scout = Scout(problem, self.shared)
        scouted = self.scout.plan(cluster)
        if scouted is None:
            self.found.why_not[nodes] = self.scout.why_not[cluster.name]
            return None
        left_out = not_modelled(problem, scouted.evaluation.strategy)
        kept = tuple(phrase for phrase in left_out if phrase != TAKEN_BACK)  # at spot rates they are counted
        self.found.plans[nodes] = found = sized(scouted, kept)
        return found


NOT_COUNTED = (
    "storage, egress, support and taxes beside the price of nodes",
    "whether a provider has so many nodes to give, and what it gives for many or for long",
)
"""What no option counts, whatever its plan."""


def compare(
    request: SizingRequest,
    market: Market,
    progress: Progress = lambda done, of: None,
    known: Known | None = None,
) -> Comparison:
    """Every option of a run. Offers without one are left out with their reason.

    `known` remembers plans between comparisons of the same run: with other limits, prices, tokens or offers.
    """
    inputs = market.on_premises or on_premises_inputs()
    costing = Costing(said=request.overheads, goal=request.goal, energy=energy_facts(), inputs=inputs)
    found = scout_all(request, market, progress, known)
    options = with_pareto(
        [
            option
            for offer, scouting in found
            for nodes, sized in scouting.plans.items()
            for option in costing.options(offer, nodes, sized)
        ]
    )
    return Comparison(
        model=request.model.name,
        params_total=request.model.params_total,
        params_active=request.model.params_active,
        workload=request.workload,
        tokens_note=request.tokens_note,
        goal=request.goal,
        options=options,
        left_out=tuple(_left_out(offer, each) for offer, each in found if not each.plans),
        assumptions=assumptions_of(request, options, inputs),
        sensitivity=_sensitivities(request, options, inputs),
        break_even=_break_evens(request.offers, options, inputs),
        not_modelled=_not_modelled(each for _, each in found),
        created=datetime.date.today().isoformat(),
        version=importlib.metadata.version("shardwise"),
    )


def _left_out(offer: Offer, scouting: Scouting) -> LeftOut:
    """Why an offer has no option: on the fewest nodes that were tried, and on the most."""
    if RULED_OUT in scouting.why_not.values():
        return LeftOut(offer=offer.name, reason=RULED_OUT)
    first, last = min(scouting.why_not), max(scouting.why_not)
    told = [f"{_nodes(nodes)}: {scouting.why_not[nodes]}" for nodes in dict.fromkeys((first, last))]
    if len(told) > 1 and all(scouting.why_not[nodes].endswith(AT_PEAK) for nodes in (first, last)):
        told = told[1:]
    return LeftOut(offer=offer.name, reason="; ".join(told))


def _nodes(count: int) -> str:
    return "one node" if count == 1 else f"{count} nodes"


def _not_modelled(found: Iterable[Scouting]) -> tuple[str, ...]:
    """What the estimate of some plan does not count, and what none does."""
    plans = (sized for each in found for sized in each.plans.values())
    phrases = dict.fromkeys(phrase for sized in plans for phrase in sized.not_modelled)
    return (*phrases, *NOT_COUNTED)


def _sensitivities(
    request: SizingRequest, options: Sequence[Option], inputs: OnPremises
) -> tuple[Sensitivity, ...]:
    if not options:
        return ()
    names = {option.device for option in options if option.rate.pricing is Pricing.ON_PREMISES}
    bought = [device for name in names if (device := owned(load_device(name), inputs)) is not None]
    return sensitivities(options, request.goal, bought, inputs.utilisation.value)


def _break_evens(
    offers: Sequence[Offer], options: Sequence[Option], inputs: OnPremises
) -> tuple[BreakEven, ...]:
    """Of the devices among the options that nothing beats: owning them against each rent."""
    names = dict.fromkeys(option.device for option in options if option.pareto)
    return tuple(
        row
        for name in names
        for row in break_evens(
            load_device(name), inputs, [o for o in offers if o.device.name == name and o.instance]
        )
    )
