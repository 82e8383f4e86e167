"""A layer's cost from samples: measured, along a line of micro-batches, or carried over from other shards.

Samples of one layer class in one precision are in forms: recompute, shard widths, exchange, compiled or not.
Of the form that is asked for,

    at a measured length      the sample of the micro-batch, or what those around it tell
    between lengths           what both neighbours tell, by the place of the logarithm between theirs

Between micro-batches bytes are on a line, and times are as far from the analytic ones as those around them:
log (measured / analytic) is linear in the logarithm. Beyond the samples of a form and length it changes with
tokens as it does at other lengths, or in the nearest form that was measured there; where none was, it stays
above the largest, and below the smallest times are on the line through the first two, which tells what no
token takes. Where speeds drift (a reference was timed beside the samples), times are on lines everywhere, on
one through all where there is one; but a single sample is no line.

What other lengths and forms tell is carried: measured here, times analytic there over analytic here, at as
many tokens ("fitted"). The nearest form is taken: compiled like it if there is one, then recomputing like it,
then of the nearest shards, in doublings of ranks. Analytic figures are those of what was measured: compiled
or not, with experts evenly busy (a sample's are, a plan's are not), and without a host where a device was
timed apart from it. Then the host's own time, which hardly changes with tokens, is a floor under either pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from planner.cost.layer import LayerCost, LayerShape
from planner.foundation.arrays import larger
from planner.model.attention import CpExchange
from planner.model.sublayer import AttentionKernel, Recompute
from planner.model.workload import Precision
from planner.profile.profile import LayerKind, LayerSample

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


class Split(Protocol):
    """What says how a layer is split: a sample, a shape, or a case to be measured."""

    @property
    def kind(self) -> LayerKind: ...
    @property
    def recompute(self) -> Recompute: ...
    @property
    def tp(self) -> int: ...
    @property
    def sequence_parallel(self) -> bool: ...
    @property
    def cp(self) -> int: ...
    @property
    def cp_exchange(self) -> CpExchange | None: ...
    @property
    def ep(self) -> int: ...
    @property
    def etp(self) -> int | None: ...


def form_of(of: Split, *, compiled: bool) -> Form:
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
"""The same of what runs as samples did."""


class SampleTable:
    """The samples of a profile in one precision, by layer class.

    `analytic` is the analytic cost; `curved` says that it is known, else micro-batches are on lines.
    """

    def __init__(
        self, samples: Iterable[LayerSample], precision: Precision, analytic: Analytic, *, curved: bool
    ) -> None:
        self._classes: dict[tuple[LayerKind, str], ClassSamples] = {}
        for sample in sorted(samples, key=lambda sample: sample.micro_batch):
            if sample.precision is precision:
                key = sample.kind, sample.shape_key
                if key not in self._classes:
                    self._classes[key] = ClassSamples(analytic, curved=curved)
                self._classes[key].add(sample)

    def nearest(self, key: str, shape: LayerShape, *, compiled: bool) -> Form | None:
        """The form of the samples that speak for a shape of a layer class; None where it has none."""
        found = self._classes.get((shape.kind, key))
        return found.nearest(form_of(shape, compiled=compiled)) if found else None

    def cost(self, key: str, shape: LayerShape, *, compiled: bool) -> LayerCost | None:
        """What the samples of a layer class tell of a shape; None where it has none."""
        found = self._classes.get((shape.kind, key))
        return found.cost(shape, form_of(shape, compiled=compiled)) if found else None


class ClassSamples:
    """The samples of one layer class by form and sequence length, each list in rising micro-batches."""

    def __init__(self, analytic: Analytic, *, curved: bool) -> None:
        self._analytic, self._curved = analytic, curved
        self._forms: dict[Form, dict[int, list[LayerSample]]] = {}
        self._known_wider: dict[tuple[Form, int, int, bool], Form | None] = {}
        self._known_points: dict[tuple[Form, AttentionKernel], Points] = {}

    def add(self, sample: LayerSample) -> None:
        """One more sample, of no smaller micro-batch than those before."""
        lengths = self._forms.setdefault(form_of(sample, compiled=sample.compiled), {})
        lengths.setdefault(sample.seq, []).append(sample)

    def nearest(self, asked: Form) -> Form:
        """The form that speaks for the one asked for."""
        return min(self._forms, key=lambda form: distance(form, asked))

    def cost(self, shape: LayerShape, asked: Form) -> LayerCost:
        """What the samples tell of a shape."""
        form = self.nearest(asked)
        lengths = self._forms[form]
        costs = {
            seq: self._at_length(lengths[seq], shape, form, asked)
            for seq in _around(sorted(lengths), shape.seq)
        }
        return _between_lengths(costs, shape.seq)

    def _at_length(self, samples: list[LayerSample], shape: LayerShape, form: Form, asked: Form) -> LayerCost:
        """What the samples of one form and length tell, the host's time a floor under it."""
        if form == asked and samples[0].seq == shape.seq and shape.ep == 1:
            cost = self._in_form(samples, shape, form)
        else:
            like, run = _like(shape, form, samples[0].seq), _run_of(samples, form)
            there = self._analytic(shape, run._replace(compiled=asked.compiled, balanced=False))
            cost = _scaled(there, self._in_form(samples, like, form), self._analytic(like, run))
        return _over_host(cost, samples)

    def _in_form(self, samples: list[LayerSample], shape: LayerShape, form: Form) -> LayerCost:
        """What samples of one form and length tell of a micro-batch in the same."""
        here = self._here(samples, form) if self._curved else None
        cost = _along_micro_batches(samples, shape, here)
        above = shape.micro_batch > samples[-1].micro_batch
        end = samples[-1] if above else samples[0]
        if here is None or not (above or shape.micro_batch < end.micro_batch):
            return cost
        wider = None if len(samples) > 1 and _drifts(samples) else self._wider(form, end, above)
        if wider is None:
            return cost
        begin = dataclasses.replace(shape, micro_batch=end.micro_batch)
        off = [self._off(wider, each) for each in (begin, shape)]
        times = {
            name: getattr(end, name) * grown * off[1][name] / off[0][name]
            for name in _TIMES
            if (grown := _over(here(shape), here(begin), name)) and off[0][name]
        }
        return LayerCost(**{name: getattr(cost, name) for name in _FIGURES} | times, origin=cost.origin)

    def _wider(self, form: Form, end: LayerSample, above: bool) -> Form | None:
        """The nearest form whose samples, of any length, go beyond one that is the last of its own length, in
        tokens; better one with samples on both sides of it."""
        known = form, end.seq, end.micro_batch, above
        if known not in self._known_wider:
            tokens, found = _tokens(end), []
            for other, lengths in self._forms.items():
                each = [_tokens(sample) for samples in lengths.values() for sample in samples]
                first, last = min(each), max(each)
                if first < last and (last > tokens if above else first < tokens):
                    found.append((first > tokens or last < tokens, distance(other, form), other))
            self._known_wider[known] = min(found)[-1] if found else None
        return self._known_wider[known]

    def _here(self, samples: list[LayerSample], form: Form) -> Here:
        run = _run_of(samples, form)
        return lambda shape: self._analytic(shape, run)

    def _off(self, form: Form, shape: LayerShape) -> dict[str, float]:
        """How far a form is from its analytic times at as many tokens as a shape has."""
        points = self._points(form, shape)
        return {name: _at(points, shape.tokens, name) for name in _TIMES}

    def _points(self, form: Form, shape: LayerShape) -> Points:
        """The same at the tokens of each sample of the form, of any length; of equal tokens the mean."""
        import statistics

        known = form, shape.kernel
        if known not in self._known_points:
            found: dict[float, list[dict[str, float]]] = {}
            for seq, samples in self._forms[form].items():
                here, like = self._here(samples, form), _like(shape, form, seq)
                for sample in samples:
                    analytic = here(dataclasses.replace(like, micro_batch=sample.micro_batch))
                    off = {name: _over(sample, analytic, name) for name in _TIMES}
                    found.setdefault(_tokens(sample), []).append(off)
            self._known_points[known] = [
                (tokens, {name: statistics.fmean(off[name] for off in found[tokens]) for name in _TIMES})
                for tokens in sorted(found)
            ]
        return self._known_points[known]


Points = list[tuple[float, dict[str, float]]]
"""Tokens, rising, and how far measured times are from analytic ones there."""


def _at(points: Points, tokens: float, name: str) -> float:
    """Between points by logarithms, outside as at the last."""
    below, above = [p for p in points if p[0] <= tokens][-1:], [p for p in points if p[0] > tokens][:1]
    (first, a), (last, b) = (below or above)[0], (above or below)[0]
    share = math.log(tokens / first) / math.log(last / first) if first != last else 0.0
    between: float = a[name] ** (1 - share) * b[name] ** share
    return between


def _run_of(samples: list[LayerSample], form: Form) -> Run:
    """How the samples of a form ran."""
    apart = all(sample.host_forward_s is not None for sample in samples)
    return Run(compiled=form.compiled, apart=apart, balanced=True)


def _tokens(sample: LayerSample) -> float:
    """Those that a device held."""
    return sample.micro_batch * sample.seq / sample.cp


def _drifts(samples: list[LayerSample]) -> bool:
    """Whether all were taken where speeds drift."""
    return all(sample.reference_s is not None for sample in samples)


def _over(cost: LayerCost | LayerSample, reference: LayerCost, name: str) -> float:
    """A figure over that of the reference; 0 where that is nothing."""
    of: float = getattr(reference, name)
    return getattr(cost, name) / of if of > 0 else 0.0


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
    import statistics

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
    if not references:
        return None
    import statistics

    return statistics.median(references)


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
    if not _drifts(samples):
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
