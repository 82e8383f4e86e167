"""compare(): the options of a run beside each other, and all that their figures rest on."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Iterable, Sequence

from planner.hardware.catalog import load_device
from planner.hardware.on_premises import OnPremises
from planner.hardware.prices import Market, on_premises_inputs
from planner.sizing.assumptions import assumptions_of
from planner.sizing.break_even import break_evens, owned
from planner.sizing.comparison import BreakEven, Comparison, LeftOut, Sensitivity
from planner.sizing.energy import energy_facts
from planner.sizing.floors import RULED_OUT
from planner.sizing.kinds import Scouting
from planner.sizing.offer import Offer, Pricing
from planner.sizing.option import Option
from planner.sizing.request import SizingRequest
from planner.sizing.search import AT_PEAK, Known, Progress, scout_all
from planner.sizing.sensitivity import sensitivities
from planner.sizing.sized import Costing, with_pareto

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
    costing = Costing(said=request.upkeep, goal=request.goal, energy=energy_facts(), inputs=inputs)
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
