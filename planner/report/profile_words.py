"""A profile in words: what it was taken on, what it holds, how good it is, what is to be said of it."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Mapping
from statistics import median

from planner.cost.constants import spec_of
from planner.hardware.local_machine import Clocks
from planner.profile.choose import OLD_MONTHS, months_old, told_age
from planner.profile.coverage import ClassKey, SampledClass, covered_models, noisy, timed
from planner.profile.merge import MORE_CASES
from planner.profile.profile import (
    NOISY_SPREAD,
    CommSample,
    FamilyFit,
    LayerSample,
    Op,
    OperatorSample,
    Profile,
)
from planner.report.words import Fact, Tile, percent

Classes = Mapping[ClassKey, SampledClass]
MOST_NAMES = 6
MOST_SKIPPED = 3
COUNTED_CASES = re.compile(rf"(\d+) {MORE_CASES.removesuffix(': ')}")
"""How a profile counts those that it does not name."""


def counted(number: int, noun: str) -> str:
    """`1 layer`, `80 layers`, `3 classes`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def op_title(op: Op) -> str:
    """`all-gather`; `send` for p2p."""
    return "send" if op is Op.P2P else op.replace("_", "-")


def headline(profile: Profile, classes: Classes, today: datetime.date) -> str:
    """One sentence: measured or fitted, on what, when, what it holds."""
    age = told_age(profile.created, today)
    where = profile.device_title or profile.device
    if not profile.measured:
        runs = fitted_runs(profile)
        of = f"Fitted to {counted(runs, 'run')}" if runs else "Fitted to runs"
        names = " and ".join((", ".join(profile.devices[:-1]), profile.devices[-1])).removeprefix(" and ")
        return f"{of} on {names}, {age}: {holds(profile, classes)} and no samples."
    torch = profile.versions.get("torch", "")
    software = f" with torch {torch}" if torch else ""
    return f"Measured on {where}{software}, {age}: {holds(profile, classes)}."


def fitted_runs(profile: Profile) -> int:
    """The most runs that one of its fits rests on."""
    found = (re.match(r"fitted to (\d+) runs", constant.origin) for constant in profile.constants)
    return max((int(match[1]) for match in found if match), default=0)


def block_shapes(profile: Profile) -> int:
    """Shapes of blocks of which runs tell, by scope."""
    return sum(len(each.told) for each in profile.residuals)


def holds(profile: Profile, classes: Classes) -> str:
    """`80 layers of 3 classes, 56 collectives, 22 constants`."""
    parts = [
        f"{counted(len(profile.layers), 'layer')} of {counted(len(classes), 'class')}" if classes else "",
        counted(len(profile.comms), "collective") if profile.comms else "",
        counted(len(profile.rates), "operator") if profile.rates else "",
        counted(len(profile.constants), "constant") if profile.constants else "",
        counted(block_shapes(profile), "block shape") if block_shapes(profile) else "",
    ]
    return ", ".join(part for part in parts if part) or "nothing"


def facts(profile: Profile, classes: Classes, today: datetime.date) -> tuple[Fact, ...]:
    """What it was taken on and with, what it holds, how good it is."""
    named = ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    formats = precisions(profile)
    found = (
        ("name", profile.name),
        ("device", _device(profile)),
        ("software", named),
        ("taken", f"{profile.created}, {told_age(profile.created, today)}{_span(profile)}"),
        ("holds", holds(profile, classes)),
        ("formats", ", ".join(formats)),
        ("shards", widths(profile)),
        ("tokens", tokens(profile)),
        ("models", models_text(classes)),
        ("contention", contention(profile)),
        ("spread", spread(profile)),
        ("clocks", clocks_text(profile.clocks)),
        *((fit.family, fit_text(fit)) for fit in profile.fits if fit.cases),
    )
    return tuple(Fact(name=name, value=value) for name, value in found if value)


def _span(profile: Profile) -> str:
    """The dates of its samples, where they were not all taken at once."""
    days = sorted({sample.taken[:10] for sample in timed(profile) if sample.taken})
    return f"; samples from {days[0]} to {days[-1]}" if len(days) > 1 else ""


def _device(profile: Profile) -> str:
    if not profile.measured:
        return ", ".join(profile.devices)
    ranks = counted(profile.devices_per_node, "rank")
    cores = f" on {counted(profile.cores, 'core')}" if profile.cores else ""
    return f"{profile.device} ({profile.device_title}), {ranks} a node{cores}, {profile.backend}"


def precisions(profile: Profile) -> tuple[str, ...]:
    """The number formats of its layers, or the one that it was taken in."""
    found = sorted({str(sample.precision) for sample in profile.layers})
    return tuple(found) or ((str(profile.precision),) if profile.precision else ())


def widths(profile: Profile) -> str:
    """`tp 1, 2, 4; ep 1, 8`: in how many shards layers were measured."""
    parts = []
    for axis in ("tp", "cp", "ep"):
        sizes = sorted({getattr(sample, axis) for sample in profile.layers})
        if sizes and (axis == "tp" or sizes != [1]):
            parts.append(f"{axis} {', '.join(map(str, sizes))}")
    return "; ".join(parts)


def tokens(profile: Profile) -> str:
    """`1, 2, 4, 8 sequences of 256`."""
    batches = sorted({sample.micro_batch for sample in profile.layers})
    lengths = sorted({sample.seq for sample in profile.layers})
    if not lengths:
        return ""
    noun = "sequence" if batches == [1] else "sequences"
    return f"{', '.join(map(str, batches))} {noun} of {', '.join(f'{n:,}' for n in lengths)}"


def models_text(classes: Classes) -> str:
    """Models all of whose blocks are measured, else the classes that are."""
    whole = covered_models(classes)
    names = whole or tuple(found.title for found in classes.values())
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    part = "" if whole or not names else "parts alone: "
    return f"{part}{', '.join(names[:MOST_NAMES])}{more}"


def contention(profile: Profile) -> str:
    """How much slower each rank is while so many compute."""
    return ", ".join(f"{c.slowdown:.2f}x with {c.active} at once" for c in profile.contention)


def spread(profile: Profile) -> str:
    """The median spread, and how many samples lie beyond NOISY_SPREAD."""
    spreads = [sample.spread for sample in timed(profile)]
    if not spreads:
        return ""
    beyond = f"{len(noisy(profile))} of {len(spreads)} beyond {percent(NOISY_SPREAD, 0)}"
    return f"{percent(median(spreads), 0)} in the median; {beyond}"


def clocks_text(clocks: Clocks | None) -> str:
    """How the accelerator ran meanwhile; nothing where nobody looked."""
    if clocks is None:
        return ""
    return (
        f"{clocks.sm_hz / 1e6:,.0f} MHz in the median, {clocks.sm_lowest_hz / 1e6:,.0f} at least; memory "
        f"{clocks.memory_hz / 1e6:,.0f} MHz; {clocks.power_w:.0f} W; up to {clocks.temperature_c:.0f} C"
    )


def fit_text(fit: FamilyFit) -> str:
    """How many cases of a family were taken, and how well samples are predicted from the others."""
    error = "" if fit.error is None else f"; left out, a sample is predicted {percent(fit.error)} off"
    return f"{fit.taken} of {counted(fit.cases, 'case')} measured{error}"


def warnings(profile: Profile, today: datetime.date) -> tuple[str, ...]:
    """What makes it doubtful: its age, samples that scatter, what was skipped."""
    found = []
    months = months_old(profile.created, today)
    if months is None or months > OLD_MONTHS:
        found.append(f"It was taken {told_age(profile.created, today)}: software has changed since.")
    kinds = (op_title(s.op) if isinstance(s, CommSample) else _kind(s) for s in noisy(profile))
    by_kind = Counter(kinds)
    if by_kind:
        listed = ", ".join(f"{counted(count, kind)}" for kind, count in by_kind.most_common())
        found.append(f"Samples whose runs spread beyond {percent(NOISY_SPREAD, 0)}: {listed}.")
    if profile.clocks is not None and profile.clocks.throttled:
        reasons = (
            f"{why} {percent(share, 0)}" for why, share in profile.clocks.throttled.items() if share > 0
        )
        held = ", ".join(reasons)
        found += [f"Clocks were held back meanwhile, in these shares of samples: {held}."] if held else []
    return (*found, *skipped_texts(profile))


def skipped_texts(profile: Profile) -> list[str]:
    """What could not be measured; many cases with one reason are told together."""
    named: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for text in profile.skipped:
        case, _, reason = text.rpartition(": ")
        more = COUNTED_CASES.fullmatch(case)
        counts[reason] += int(more[1]) if more else 1
        named.setdefault(reason, []).extend([] if more else [case])
    told = []
    for reason, cases in named.items():
        if counts[reason] > min(MOST_SKIPPED, len(cases)):
            first = f" ({cases[0]} and so on)" if cases else ""
            told.append(f"Skipped {counts[reason]} cases: {reason}{first}.")
        else:
            told += [f"Skipped: {case}: {reason}" if case else f"Skipped: {reason}" for case in cases]
    return told


def _kind(sample: LayerSample | OperatorSample) -> str:
    return str(sample.kind).replace("_", " ")


def tiles(profile: Profile, classes: Classes) -> tuple[Tile, ...]:
    """The headline figures."""
    if not profile.measured:
        scopes = {(c.device, c.framework, c.kernels, c.engine, c.network) for c in profile.constants}
        return (
            Tile(title="Runs fitted to", value=f"{fitted_runs(profile):,}", detail="the most of one fit"),
            Tile(title="Constants", value=f"{len({c.name for c in profile.constants}):,}",
                 detail=f"{len(profile.constants):,} values for {counted(len(scopes), 'scope')}"),
            *_error_tile(profile),
        )  # fmt: skip
    return (
        Tile(title="Layers", value=f"{len(profile.layers):,}", detail=counted(len(classes), "class")),
        Tile(title="Collectives", value=f"{len(profile.comms):,}", detail=profile.backend),
        *([Tile(title="Operators", value=f"{len(profile.rates):,}")] if profile.rates else []),
        *_constant_tiles(profile),
        *_spread_tile(profile),
    )


def _error_tile(profile: Profile) -> tuple[Tile, ...]:
    errors = [constant for constant in profile.constants if constant.name == "time_error"]
    if not errors:
        return ()
    best = min(errors, key=lambda constant: constant.value)
    worst = max(errors, key=lambda constant: constant.value)
    span = percent(best.value, 0)
    if worst.value > best.value:
        span += f" to {percent(worst.value, 0)}"
    return (
        Tile(title="Error of step times", value=span, detail="90 % of runs left out are within, by scope"),
    )


CONSTANT_TILES = (
    ("gemm_flops", "Products", "one large product, a rank"),
    ("memory_bytes_per_s", "Memory", "a copy, reads and writes"),
    ("host_block_forward_s", "Host floor", "of a small block's forward"),
)


def _constant_tiles(profile: Profile) -> tuple[Tile, ...]:
    return tuple(
        Tile(title=title, value=spec_of(name).text(value), detail=detail)
        for name, title, detail in CONSTANT_TILES
        if (value := profile.constant(name)) is not None
    )


def _spread_tile(profile: Profile) -> tuple[Tile, ...]:
    spreads = [sample.spread for sample in timed(profile)]
    if not spreads:
        return ()
    detail = f"{counted(len(noisy(profile)), 'sample')} beyond {percent(NOISY_SPREAD, 0)}"
    return (Tile(title="Spread", value=percent(median(spreads), 0), detail=detail),)
