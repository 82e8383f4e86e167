"""The samples, constants and blocks of a profile as tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from planner.cost.constants import spec_of
from planner.cost.stage.layer_cost import Residuals
from planner.foundation.frozen import frozen
from planner.foundation.units import format_bytes, format_seconds, format_si
from planner.model.sublayer import Recompute
from planner.profile.coverage import (
    SampledClass,
    Timed,
    bus_bytes_per_s,
    is_noisy,
    kind_text,
    rate_flops,
    rate_values,
    width_text,
)
from planner.profile.profile import (
    BlockResidual,
    BlockResiduals,
    CommSample,
    Constant,
    LayerSample,
    Op,
    OperatorKind,
    OperatorSample,
    Profile,
)
from planner.report.profile_words import op_title
from planner.report.words import Table, percent

COPIES = (OperatorKind.COPY, OperatorKind.TO_DEVICE, OperatorKind.TO_HOST)
OPTIONS = tuple(Recompute)
NOISY_MARK = "!"


def spread_text(sample: Timed) -> str:
    """`12 %`, or `31 % !` where that is much."""
    return percent(sample.spread, 0) + (f" {NOISY_MARK}" if is_noisy(sample) else "")


def layer_table(found: SampledClass, samples: Sequence[LayerSample]) -> Table:
    """All samples of a class, the narrowest first."""
    ordered = sorted(
        samples, key=lambda s: (s.tp, width_text(s), OPTIONS.index(s.recompute), s.seq, s.micro_batch)
    )
    return Table(
        header=("width", "tokens", "recompute", "forward", "backward", "rate", "kept", "peak", "spread"),
        rows=tuple(_row(found, sample) for sample in ordered),
        numbers=(3, 9),
    )


def _row(found: SampledClass, sample: LayerSample) -> tuple[str, ...]:
    rate = found.flops_per_s(sample) if sample.recompute is Recompute.NONE else None
    peak = sample.saved_bytes + max(sample.forward_transient_bytes, sample.backward_transient_bytes)
    return (
        width_text(sample),
        f"{sample.micro_batch} x {sample.seq:,}",
        str(sample.recompute),
        format_seconds(sample.forward_s),
        format_seconds(sample.backward_s),
        "" if rate is None else format_si(rate, "FLOP/s"),
        format_bytes(sample.saved_bytes),
        format_bytes(peak),
        spread_text(sample),
    )


def rate_table(samples: Sequence[OperatorSample]) -> Table:
    """Operators with their sizes, times and rates."""
    ordered = sorted(samples, key=lambda s: (s.kind, s.variant, s.precision, s.dims))
    rows = (
        (
            kind_text(s),
            " x ".join(f"{dim:,}" for dim in s.dims),
            format_seconds(s.forward_s),
            "" if s.backward_s is None else format_seconds(s.backward_s),
            format_si(_work_per_s(s), "FLOP/s") if rate_flops(s) else "",
            spread_text(s),
        )
        for s in ordered
    )
    header = ("operator", "sizes", "forward", "backward", "forward rate", "spread")
    return Table(header=header, rows=tuple(rows), numbers=(2, 6))


def best_rates(samples: Sequence[OperatorSample]) -> Table:
    """Each kind of operator: how many sizes were taken, its best rate, its usual and worst spread."""
    kinds: dict[str, list[OperatorSample]] = {}
    for sample in samples:
        kinds.setdefault(kind_text(sample), []).append(sample)
    rows = (
        (name, f"{len(own):,}", *_best(own), percent(median(s.spread for s in own), 0))
        for name, own in kinds.items()
    )
    header = ("operators", "sizes", "best rate", "at", "spread")
    return Table(header=header, rows=tuple(rows), numbers=(1, 3))


def _best(samples: Sequence[OperatorSample]) -> tuple[str, str]:
    """The highest rate of a kind and its sizes: FLOP/s, bytes a second of copies, else values a second."""
    best = max(samples, key=_work_per_s)
    unit = "FLOP/s" if rate_flops(best) else "B/s" if best.kind in COPIES else "values/s"
    return format_si(_work_per_s(best), unit), " x ".join(f"{dim:,}" for dim in best.dims)


def _work_per_s(sample: OperatorSample) -> float:
    work = rate_flops(sample) or rate_values(sample)
    return work / sample.forward_s if sample.forward_s > 0 else 0.0


def comm_table(samples: Sequence[CommSample]) -> Table:
    """Time and bandwidth of each operation and size."""
    ordered = sorted(samples, key=lambda s: (list(Op).index(s.op), s.bytes))
    rows = (
        (
            op_title(s.op),
            format_bytes(s.bytes),
            format_seconds(s.seconds),
            format_si(bus_bytes_per_s(s), "B/s"),
            spread_text(s),
        )
        for s in ordered
    )
    return Table(
        header=("operation", "message", "time", "bus bandwidth", "spread"), rows=tuple(rows), numbers=(1, 5)
    )


@frozen
class ConstantRow:
    """All values of one constant of a profile, each with what it holds for and how it came to be."""

    name: str
    meaning: str
    usual: str
    values: tuple[tuple[str, str, str], ...]


def constant_rows(profile: Profile) -> tuple[ConstantRow, ...]:
    """The constants by name, in the profile's order; the widest scope of each first."""
    names = list(dict.fromkeys(constant.name for constant in profile.constants))
    return tuple(_constant_row(name, [c for c in profile.constants if c.name == name]) for name in names)


def _constant_row(name: str, constants: Sequence[Constant]) -> ConstantRow:
    usual = spec_of(name).prior
    return ConstantRow(
        name=name,
        meaning=spec_of(name).description,
        usual="" if usual is None else spec_of(name).text(usual),
        values=tuple((spec_of(name).text(c.value), scope_text(c), c.origin) for c in constants),
    )


@frozen
class BlockTable:
    """What runs of one scope tell of blocks."""

    scope: str
    table: Table


def block_tables(profile: Profile) -> tuple[BlockTable, ...]:
    """Shapes of blocks with the time that runs tell of them over their price, scope by scope."""
    return tuple(
        BlockTable(scope=scope_text(each), table=_told(each)) for each in profile.residuals if each.told
    )


def _told(residuals: BlockResiduals) -> Table:
    def order(each: BlockResidual) -> tuple[object, ...]:
        of = each.shape
        return of.device, of.width, of.seq, of.tp, of.tokens, OPTIONS.index(of.recompute)

    ratio = Residuals(residuals).ratio
    rows = (
        (
            of.device,
            f"{of.width:,.0f}",
            f"{of.seq:,}",
            f"tp{of.tp}" + (f" cp{of.cp}" if of.cp > 1 else ""),
            f"{of.tokens:,.0f}",
            str(of.recompute),
            f"{of.precision}, {of.kernel}" + ", compiled" * of.compiled + ", experts" * of.routed,
            f"{ratio(of):.3f}",
            f"{each.weight:.1f}",
        )
        for each in sorted(residuals.told, key=order)
        for of in (each.shape,)
    )
    header = (
        "device",
        "width",
        "sequence",
        "shards",
        "tokens",
        "recompute",
        "kind",
        "time over price",
        "runs",
    )
    return Table(header=header, rows=tuple(rows), numbers=(7, 9))


def scope_text(told: Constant | BlockResiduals) -> str:
    """What a constant holds for: `Megatron-LM on a100-sxm-80gb, ndr400x8`, or `everything`."""
    software = told.framework or told.engine
    software += f" ({told.kernels})" if isinstance(told, Constant) and told.kernels else ""
    place = ", ".join(part for part in (told.device, told.network) if part)
    return " on ".join(part for part in (software, place) if part) or "everything"
