"""A layer's cost from samples: measured, along a line of micro-batches, or carried over from other shards.

Samples of one layer class in one precision are in forms: recompute, shard widths, exchange, compiled or not.
Of the form that is asked for,

    at a measured length      the sample of the micro-batch, or what those around it tell
    between lengths           what both neighbours tell, by the place of the logarithm between theirs

Between micro-batches bytes are on a line, and times are as far from the analytic ones as those around them:
log (measured / analytic) is linear in the logarithm, and above the largest it stays. Below the smallest,
times are on the line through the first two, which tells what no token takes. Where speeds drift (a reference
was timed beside the samples), times are on lines everywhere, on one through all where there is one.

What other lengths and forms tell is carried: measured here, times analytic there over analytic here, at as
many tokens ("fitted"). The nearest form is taken: compiled like it if there is one, then recomputing like it,
then of the nearest shards, in doublings of ranks. Analytic figures are those of what was measured: compiled
or not, with experts evenly busy (a sample's are, a plan's are not), and without a host where a device was
timed apart from it. Then the host's own time, which hardly changes with tokens, is a floor under either pass.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from planner.cost.layer import LayerCost, LayerShape
from planner.cost.seconds import larger
from planner.profile import LayerKind, LayerSample
from planner.strategy import CpExchange, Recompute
from planner.workload import Precision

STRAIGHT = 0.25
"""Samples whose times lie on a line within this are noise around it."""

UNLIKE_EXCHANGE = 2.0
"""Doublings of ranks that another exchange of context parallelism counts: farther than none at all, whose
cost the exchange is added to."""


class Form(NamedTuple):
    """What of a layer is split and how it runs, whatever its tokens."""

    compiled: bool
    recompute: Recompute
    tp: int
    sequence_parallel: bool
    cp: int
    exchange: CpExchange | None
    ep: int
    expert_tp: int


def form_of(of: LayerSample | LayerShape, *, compiled: bool) -> Form:
    """The form of a sample or of what is asked for."""
    return Form(
        compiled=compiled and of.kind is not LayerKind.EMBEDDING,  # there is nothing in one to compile
        recompute=of.recompute,
        tp=of.tp,
        sequence_parallel=of.sequence_parallel,
        cp=of.cp,
        exchange=of.cp_exchange if of.cp > 1 else None,
        ep=of.ep,
        expert_tp=of.etp or of.tp,
    )


def distance(form: Form, asked: Form) -> tuple[bool, bool, float, Form]:
    """How far the samples of one form are from what is asked of another; ties go to the smaller form."""
    away = abs(math.log2(form.tp / asked.tp)) + (form.sequence_parallel != asked.sequence_parallel)
    away += abs(math.log2(form.cp / asked.cp)) + abs(math.log2(form.ep / asked.ep))
    away += abs(math.log2(form.expert_tp / form.tp * asked.tp / asked.expert_tp))
    if None not in (form.exchange, asked.exchange) and form.exchange is not asked.exchange:
        away += UNLIKE_EXCHANGE
    return form.compiled is not asked.compiled, form.recompute is not asked.recompute, away, form


class Run(NamedTuple):
    """How a layer runs beside its shape: compiled, without a host that holds the device up, with experts that
    are evenly busy."""

    compiled: bool
    apart: bool
    balanced: bool


Analytic = Callable[[LayerShape, Run], LayerCost]
"""The analytic cost of a shape."""

Here = Callable[[LayerShape], LayerCost]
"""The same as samples were taken."""


class SampleTable:
    """The samples of a profile in one precision by layer class, form and sequence length.

    `analytic` is the analytic cost; `curved` says that it is known, else micro-batches are on lines.
    """

    def __init__(
        self, samples: Iterable[LayerSample], precision: Precision, analytic: Analytic, *, curved: bool
    ) -> None:
        self._analytic, self._curved = analytic, curved
        self._forms: dict[tuple[LayerKind, str], dict[Form, dict[int, list[LayerSample]]]] = {}
        for sample in sorted(samples, key=lambda sample: sample.micro_batch):
            if sample.precision is precision:
                forms = self._forms.setdefault((sample.kind, sample.shape_key), {})
                lengths = forms.setdefault(form_of(sample, compiled=sample.compiled), {})
                lengths.setdefault(sample.seq, []).append(sample)

    def nearest(self, key: str, shape: LayerShape, *, compiled: bool) -> Form | None:
        """The form of the samples that speak for a shape of a layer class; None where it has none."""
        asked = form_of(shape, compiled=compiled)
        forms = self._forms.get((shape.kind, key), {})
        return min(forms, key=lambda form: distance(form, asked), default=None)

    def cost(self, key: str, shape: LayerShape, *, compiled: bool) -> LayerCost | None:
        """What the samples of a layer class tell of a shape; None where it has none."""
        form, asked = self.nearest(key, shape, compiled=compiled), form_of(shape, compiled=compiled)
        if form is None:
            return None
        lengths = self._forms[shape.kind, key][form]
        costs = {
            seq: self._at_length(lengths[seq], shape, form, asked)
            for seq in _around(sorted(lengths), shape.seq)
        }
        return _between_lengths(costs, shape.seq)

    def _at_length(self, samples: list[LayerSample], shape: LayerShape, form: Form, asked: Form) -> LayerCost:
        """What the samples of one form and length tell, the host's time a floor under it."""
        apart = all(sample.host_forward_s is not None for sample in samples)
        run = Run(compiled=form.compiled, apart=apart, balanced=True)

        def here(shape: LayerShape) -> LayerCost:
            return self._analytic(shape, run)

        curve = here if self._curved else None
        if form == asked and samples[0].seq == shape.seq and shape.ep == 1:
            cost = _along_micro_batches(samples, shape, curve)
        else:
            like = _like(shape, form, samples[0].seq)
            there = self._analytic(shape, Run(compiled=asked.compiled, apart=apart, balanced=False))
            cost = _scaled(there, _along_micro_batches(samples, like, curve), here(like))
        return _over_host(cost, samples)


def _like(shape: LayerShape, form: Form, seq: int) -> LayerShape:
    """As many tokens as the shape has, in another form and in sequences of another length.

    As many, so that sequences of nearly the measured length cost nearly the same.
    """
    return dataclasses.replace(
        shape,
        tp=form.tp,
        sequence_parallel=form.sequence_parallel,
        recompute=form.recompute,
        seq=seq,
        micro_batch=shape.tokens * form.cp / seq,
        cp=form.cp,
        cp_exchange=form.exchange or shape.cp_exchange,
        ep=form.ep,
        etp=None if form.expert_tp == form.tp else form.expert_tp,
    )


def _over_host(cost: LayerCost, samples: list[LayerSample]) -> LayerCost:
    ahead = [sample.host_forward_s for sample in samples if sample.host_forward_s is not None]
    back = [sample.host_backward_s for sample in samples if sample.host_backward_s is not None]
    return dataclasses.replace(
        cost,
        forward_s=larger(cost.forward_s, statistics.median(ahead) if ahead else 0.0),
        backward_s=larger(cost.backward_s, statistics.median(back) if back else 0.0),
    )


def usual_reference_s(samples: Sequence[LayerSample]) -> float | None:
    """What the fixed piece of work that was timed beside samples usually took; None where none was."""
    references = [s.reference_s for s in samples if s.reference_s]
    return statistics.median(references) if references else None


def at_usual_speed(samples: Sequence[LayerSample]) -> list[LayerSample]:
    """The samples as if the machine had kept its median speed, by the reference timed beside each."""
    usual_s = usual_reference_s(samples)
    if usual_s is None:
        return list(samples)
    return [
        s
        if not s.reference_s
        else dataclasses.replace(
            s,
            forward_s=s.forward_s * usual_s / s.reference_s,
            backward_s=s.backward_s * usual_s / s.reference_s,
        )
        for s in samples
    ]


def _around(lengths: Sequence[int], seq: int) -> set[int]:
    """The nearest of some lengths to either side."""
    below, above = [n for n in lengths if n <= seq], [n for n in lengths if n >= seq]
    return {*below[-1:], *above[:1]}


_TIMES = ("forward_s", "backward_s")
_FIGURES = (*_TIMES, "saved_bytes", "forward_transient_bytes", "backward_transient_bytes")


def _along_micro_batches(samples: list[LayerSample], shape: LayerShape, here: Here | None) -> LayerCost:
    """A measured micro-batch, or what the two around it tell of one between or outside.

    Where speeds drift, three or more samples whose times lie on one line within STRAIGHT are noise around it:
    then the line is the answer for times, at measured micro-batches too.
    """
    cost = _between(samples, shape)
    if any(sample.reference_s is None for sample in samples):
        below = len(samples) > 1 and shape.micro_batch < samples[0].micro_batch
        straight = here is None or below or cost.origin == "measured"
        return cost if straight or here is None else _curved(cost, samples, shape, here)
    lines = {name: _line(samples, name) for name in _TIMES}
    if any(line is None for line in lines.values()):
        return cost
    times = {name: line[0] + line[1] * shape.micro_batch for name, line in lines.items() if line}
    return dataclasses.replace(cost, forward_s=times["forward_s"], backward_s=times["backward_s"])


def _curved(cost: LayerCost, samples: list[LayerSample], shape: LayerShape, here: Here) -> LayerCost:
    """The cost with times as far from the analytic ones as those of the samples around the micro-batch."""
    below = [s for s in samples if s.micro_batch <= shape.micro_batch][-1:]
    above = [s for s in samples if s.micro_batch > shape.micro_batch][:1]
    first, last = (below or above)[0], (above or below)[0]
    share = 0.0
    if first is not last:
        share = math.log(shape.micro_batch / first.micro_batch) / math.log(
            last.micro_batch / first.micro_batch
        )
    ends = [here(dataclasses.replace(shape, micro_batch=s.micro_batch)) for s in (first, last)]
    asked, times = here(shape), {}
    for name in _TIMES:
        analytic = [getattr(end, name) for end in ends]
        if min(analytic) > 0:
            off = [getattr(s, name) / a for s, a in zip((first, last), analytic, strict=True)]
            times[name] = getattr(asked, name) * off[0] ** (1 - share) * off[1] ** share
    return LayerCost(**{name: getattr(cost, name) for name in _FIGURES} | times, origin=cost.origin)


def _line(samples: list[LayerSample], name: str) -> tuple[float, float] | None:
    """Offset and slope of a figure over the micro-batch, by least squared relative error."""
    if len(samples) < 3:
        return None
    u = [1 / getattr(s, name) for s in samples]
    v = [s.micro_batch / getattr(s, name) for s in samples]
    uu, uv, vv = (sum(a * b for a, b in zip(x, y, strict=True)) for x, y in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv * uv
    offset, slope = (sum(u) * vv - sum(v) * uv) / determinant, (sum(v) * uu - sum(u) * uv) / determinant
    worst = max(abs(offset * a + slope * b - 1) for a, b in zip(u, v, strict=True))
    smallest = offset + slope * min(s.micro_batch for s in samples)
    return (offset, slope) if worst <= STRAIGHT and slope > 0 and smallest > 0 else None


def _between(samples: list[LayerSample], shape: LayerShape) -> LayerCost:
    """A measured micro-batch, or the line through the two around it or nearest to it."""
    exact = [s for s in samples if s.micro_batch == shape.micro_batch]
    if exact:
        return LayerCost(**{name: getattr(exact[0], name) for name in _FIGURES}, origin="measured")
    if len(samples) == 1:
        factor = shape.micro_batch / samples[0].micro_batch
        figures = {name: getattr(samples[0], name) * factor for name in _FIGURES}
        return LayerCost(**figures, origin="interpolated")
    above = next((i for i, s in enumerate(samples) if s.micro_batch > shape.micro_batch), len(samples))
    high = min(max(above, 1), len(samples) - 1)
    a, b = samples[high - 1], samples[high]
    share = (shape.micro_batch - a.micro_batch) / (b.micro_batch - a.micro_batch)
    floor = shape.micro_batch / b.micro_batch * 0.5
    figures = {
        name: max(getattr(a, name) + share * (getattr(b, name) - getattr(a, name)), getattr(b, name) * floor)
        for name in _FIGURES
    }
    return LayerCost(**figures, origin="interpolated")


def _scaled(analytic: LayerCost, measured: LayerCost, reference: LayerCost) -> LayerCost:
    """The analytic figures times measured over reference; the measured where the reference is nothing."""
    figures = {
        name: getattr(measured, name) * getattr(analytic, name) / getattr(reference, name)
        if getattr(reference, name) > 0
        else getattr(measured, name)
        for name in _FIGURES
    }
    return LayerCost(**figures, origin="fitted")


def _between_lengths(costs: dict[int, LayerCost], seq: int) -> LayerCost:
    """The mean of what two sequence lengths tell, by the place of the logarithm between theirs."""
    first, last = min(costs), max(costs)
    if first == last:
        return costs[first]
    share = math.log(seq / first) / math.log(last / first)
    figures = {
        name: (1 - share) * getattr(costs[first], name) + share * getattr(costs[last], name)
        for name in _FIGURES
    }
    return LayerCost(**figures, origin="fitted")
