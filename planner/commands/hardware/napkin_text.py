"""The answer of `plan napkin` for a terminal, and as a JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planner.commands.shared.text import table

if TYPE_CHECKING:
    from planner.sizing.napkin import Figure, Question
    from planner.sizing.napkin_methods import Method, OwnEstimate

LINE_WIDTH = 110

LABELS = {
    "bytes_per_param": "bytes a parameter",
    "memory_bytes": "memory",
    "tokens": "tokens",
    "flops": "FLOPs",
    "seconds": "time on one device",
    "days": "",
    "mixed_precision_16_bytes": "mixed precision, 16 B",
    "mixed_precision_18_bytes": "mixed precision, 18 B",
    "activations_bytes": "activations",
    "activations_none_recompute_bytes": "activations, all kept",
    "activations_full_recompute_bytes": "activations, recomputed",
    "logits_bytes": "logits",
    "attention_flops_ratio": "attention FLOPs",
    "days_at_assumed_mfu": "real utilisation",
    "days_at_low_mfu": "  at the lowest published",
    "days_at_high_mfu": "  at the highest published",
}


def napkin_text(
    q: Question,
    rule: Sequence[Figure],
    left: Sequence[Figure],
    methods: Sequence[Method],
    own: OwnEstimate | None,
    why_not: str,
) -> str:
    """The whole answer, in sections."""
    sections = [
        _headline(q),
        "Rule of thumb\n" + _figures(rule, notes=False),
        _fits(q, rule) + _no_time(q),
        "What the rule leaves out\n" + _figures(left, notes=True),
        _own(q, own, why_not),
        "Ways to a model that does the task, cheapest first\n" + _methods(q, methods),
        _assumptions(q, methods),
    ]
    return "\n\n".join(section for section in sections if section)


def _headline(q: Question) -> str:
    from planner.foundation.units import format_bytes, format_count

    rate = q.rate
    peak = f"peak unknown in {rate.precision}"
    if rate.peak_flops is not None:
        peak = f"{rate.peak_flops / 1e12:g} TFLOP/s dense peak in {rate.precision}"
    count = (
        f"{q.size.name} parameters"
        if q.size.bare
        else f"{q.size.name}, {format_count(q.size.params)} parameters"
    )
    if q.size.sparse:
        count += f" ({format_count(q.size.params_active)} active)"
    return f"{count} on {rate.title}: {peak}, {format_bytes(rate.usable_memory_bytes)} usable"


def _figures(figures: Sequence[Figure], notes: bool) -> str:
    rows = [(LABELS[figure.name], figure.formula, shown(figure)) for figure in figures]
    label, formula = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = []
    for (name, derivation, value), figure in zip(rows, figures, strict=True):
        lines.append(f"  {name.ljust(label)}  {derivation.ljust(formula)}  {value}".rstrip())
        if notes and figure.note and figure.value is not None:
            lines.append(wrapped([(" " * label, figure.note)]))
    return "\n".join(lines)


def shown(figure: Figure) -> str:
    """A figure's value with its unit, or that it is unknown."""
    from planner.foundation.units import GIB, format_count
    from planner.sizing.napkin import short

    value = figure.value
    if value is None:
        return "unknown"
    match figure.unit:
        case "B" if value < 1000:
            return f"{value} B"
        case "B":
            return f"{short(value)} B = {value / GIB:.2f} GiB"
        case "s":
            return f"{value:.3g} s".replace("e+0", "e").replace("e+", "e")
        case "days":
            return f"{value:.3g} days" if value < 1000 else f"{value:,.0f} days"
        case "tokens":
            return f"{short(value)} ({format_count(value)})"
        case "ratio":
            return f"{value:.3f} x"
        case _:
            return short(value)


def wrapped(rows: Sequence[tuple[str, str | None]]) -> str:
    """Names and texts in two indented columns, long texts wrapped at 110 characters."""
    import textwrap

    kept = [(name, text) for name, text in rows if text]
    width = max(len(name) for name, _ in kept) + 4
    return "\n".join(
        textwrap.fill(
            text,
            width=LINE_WIDTH,
            initial_indent=f"  {name}".ljust(width),
            subsequent_indent=" " * width,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in kept
    )


def span(seconds: float) -> str:
    """Seconds for people, long ones in whole days."""
    from planner.foundation.units import DAY_S, format_seconds

    return f"{seconds / DAY_S:,.0f} days" if seconds >= 1000 * DAY_S else format_seconds(seconds)


def _fits(q: Question, rule: Sequence[Figure]) -> str:
    from planner.foundation.units import format_bytes

    memory = next(figure.value for figure in rule if figure.name == "memory_bytes")
    usable = q.rate.usable_memory_bytes
    if memory is None or memory <= usable:
        return "By this rule it fits on one device."
    least = -(-int(memory) // usable)
    return f"By this rule it needs {least:,} devices of {format_bytes(usable)}."


def _no_time(q: Question) -> str:
    if q.rate.peak_flops is not None:
        return ""
    other = next((text.split()[0] for text in q.rate.known_peaks if not text.startswith("fp8")), None)
    cure = f": try --precision {other}." if other else "."
    return f"\nThere is no time: {q.rate.unknown_peak}. No peak is guessed{cure}"


def _own(q: Question, own: OwnEstimate | None, why_not: str) -> str:
    from planner.foundation.units import DAY_S, format_bytes, format_seconds

    title = "Our own estimate (cost model, datasheet figures) for all weights"
    if own is None:
        return f"{title}\n  none: {why_not}"
    low, high = own.step_time_interval_s
    days = q.tokens / own.tokens_per_s / DAY_S
    spread = low / own.step_time_s, high / own.step_time_s
    m = own.memory
    parts = (
        ("weights", m.weights_bytes), ("gradients", m.grads_bytes), ("optimizer", m.optimizer_bytes),
        ("activations", m.activations_bytes), ("transient", m.transient_bytes), ("runtime", m.runtime_bytes),
    )  # fmt: skip
    known = q.rate.peak_flops is not None
    precision = own.precision
    if precision != q.rate.precision:
        precision += f" (its model knows no {q.rate.precision} here)"
    rows = [
        ("devices", f"{own.devices} ({own.cluster}), {own.label}, recompute {own.recompute}, {precision}"),
        (
            "memory",
            f"{format_bytes(own.peak_memory_bytes)} of {format_bytes(own.memory_limit_bytes)}: {own.verdict}",
        ),
        ("  of which", ", ".join(f"{name} {format_bytes(value)}" for name, value in parts if value)),
        ("step", f"{own.batch} x {own.seq} tokens in {format_seconds(own.step_time_s)}" if known else None),
        ("MFU", f"{own.mfu:.1%}" if known and own.mfu is not None else None),
        (
            "pretraining",
            f"{span(days * DAY_S)} on {own.devices:,} devices ({span(days * spread[0] * DAY_S)} to "
            f"{span(days * spread[1] * DAY_S)}), {days * own.devices:,.4g} device-days"
            if known
            else "time unknown, as the peak is",
        ),
        ("shape", q.size.shape_note),
    ]
    return f"{title}\n" + wrapped(rows)


def _methods(q: Question, methods: Sequence[Method]) -> str:
    from planner.foundation.units import format_bytes, format_count

    rows = []
    for method in methods:
        seconds, usd, own = method.seconds.value, method.usd.value, method.cost_model_days.value
        free = method.name == "prompting"
        used = method.devices_used if method.devices_used is not None else method.devices_min.value
        rows.append(
            (
                method.title,
                "nothing" if free else format_count(method.trained_params.value or 0),
                format_bytes(method.memory_bytes.value or 0),
                f"{used}: {method.verdict}" if method.verdict in ("NO", "RISKY") else used,
                "-" if free else format_count(method.tokens.value or 0),
                "-" if free else shown(method.flops),
                "nothing" if free else ("unknown" if seconds is None else span(seconds)),
                "nothing"
                if free
                else ("unknown" if usd is None else f"${usd:,.0f}" if usd >= 10 else f"${usd:.2f}"),
                "-" if free or own is None else span(own * 86400),
            )
        )
    header = (
        "way", "trains", "memory", "devices", "tokens", "FLOPs", f"time at MFU {q.rate.mfu:.0%}", "cost",
        "time, cost model",
    )  # fmt: skip
    return "\n".join("  " + line for line in table(header, rows).splitlines())


def _assumptions(q: Question, methods: Sequence[Method]) -> str:
    rate = q.rate
    price = "no price of this device is known: give --usd-per-gpu-hour"
    if rate.price is not None:
        price = f"${rate.price.usd_per_device_hour:.4g} a device-hour, {rate.price.source}"
    lora = next(method for method in methods if method.name == "lora")
    rows = [
        (
            "memory",
            "all states of the method, and one device's work; devices share the states, in powers of two",
        ),
        ("devices", "as given" if q.devices else "the least whose memory holds it, safe by our memory model"),
        ("fine-tuning", f"{q.finetune_tokens:,} tokens, {q.finetune_note}"),
        (
            "LoRA",
            "; ".join(
                filter(None, (lora.trained_params.formula, lora.trained_params.note, lora.flops.formula))
            ),
        ),
        ("MFU", f"{rate.mfu:.0%}; published {rate.mfu_low:.1%} to {rate.mfu_high:.1%}: {rate.mfu_source}"),
        ("price", price),
        ("N", _which_n(q)),
    ]
    return "Assumed\n" + wrapped(rows)


def _which_n(q: Question) -> str | None:
    from planner.foundation.units import format_count

    if q.size.bare:
        return None
    sparse = "; 20 tokens a parameter were found for dense models" if q.size.sparse else ""
    return (
        f"{format_count(q.size.params)} in memory; {format_count(q.size.params_flops)} in 6 N D: what a "
        f"token meets, without the input embedding, which is a look-up{sparse}"
    )


def napkin_document(
    q: Question,
    rule: Sequence[Figure],
    left: Sequence[Figure],
    methods: Sequence[Method],
    own: OwnEstimate | None,
    why_not: str,
) -> dict[str, Any]:
    """Every number with its formula."""
    from planner.foundation.decode import encode

    size, shape = q.size, q.size.shape
    return {
        "model": {
            "name": size.name,
            "bare_size": size.bare,
            "params": size.params,
            "params_active": size.params_active,
            "params_flops": size.params_flops,
            "shape": {
                "name": shape.name,
                "layers": shape.layers,
                "hidden": shape.hidden,
                "vocab": shape.vocab,
                "params_total": shape.params_total,
                "note": size.shape_note,
            },
        },
        "device": encode(q.rate),
        "assumptions": {
            "tokens": q.tokens,
            "tokens_formula": q.tokens_formula,
            "finetune_tokens": q.finetune_tokens,
            "finetune_note": q.finetune_note,
            "seq": q.seq,
            "lora": encode(q.adapters),
            "devices": q.devices,
            "mfu": q.rate.mfu,
        },
        "rule_of_thumb": _by_name(rule),
        "left_out": _by_name(left),
        "methods": [_method_document(method) for method in methods],
        "estimate": None if own is None else encode(own),
        "estimate_missing": why_not or None,
    }


def _by_name(figures: Sequence[Figure]) -> dict[str, Any]:
    return {figure.name: _figure(figure) for figure in figures}


def _figure(figure: Figure) -> dict[str, Any]:
    return {
        "value": figure.value,
        "unit": figure.unit,
        "formula": figure.formula,
        "note": figure.note or None,
    }


def _method_document(method: Method) -> dict[str, Any]:
    figures = (
        method.trained_params, method.memory_bytes, method.devices_min, method.tokens, method.flops,
        method.seconds, method.usd, method.cost_model_days,
    )  # fmt: skip
    return {
        "name": method.name,
        "title": method.title,
        "devices_used": method.devices_used,
        "verdict": method.verdict or None,
        **_by_name(figures),
    }
