"""The answer of `plan scaling` for a terminal, and as a JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planner.commands.hardware.napkin_text import wrapped
from planner.commands.shared.text import table

if TYPE_CHECKING:
    from planner.commands.hardware.scaling import Inputs
    from planner.sizing.principles.scaling import Optimum, TrainingPoint

BAR = 40
CHART_POINTS = 13
CHART_DECADES = 2.4
ASPECT = 128
"""Width over layers of the model that DeepSeek's FLOPs a token are turned into: as in LLaMA 7B and 13B."""

COMPARE = (
    "losses are nats a token on each study's own data and tokenizer: compare within a law, never between laws"
)


def scaling_text(inputs: Inputs, optima: Sequence[Optimum], points: Sequence[TrainingPoint]) -> str:
    """The whole answer, in sections."""
    sections = [
        _budget(inputs),
        "Compute-optimal by law (C = 6 N D)\n" + _laws(optima),
        _iso_flop(inputs),
        _hyper(optima, inputs.seq),
        _over_training(inputs, points),
        "Notes\n" + _notes(optima, points),
    ]
    return "\n\n".join(section for section in sections if section)


def _budget(inputs: Inputs) -> str:
    from planner.sizing.principles.napkin import short

    budget, rate = inputs.budget, inputs.rate
    lines = [f"Budget: {short(budget.flops)} FLOPs" + (f" = {budget.formula}" if rate is not None else "")]
    hours, usd = budget.device_hours(budget.flops), budget.usd(budget.flops)
    if rate is not None and hours is None:
        lines.append(f"  no hours: {rate.unknown_peak}")
    elif rate is not None:
        cost = f", ${usd:,.0f}" if usd is not None else ", price unknown"
        lines.append(f"  {hours:,.0f} hours of one {rate.title} at MFU {rate.mfu:.0%}{cost}")
        lines.append(f"  published MFU {rate.mfu_low:.0%} to {rate.mfu_high:.0%}: {rate.mfu_source}")
        if rate.price is not None:
            lines.append(f"  ${rate.price.usd_per_device_hour:.4g} a device-hour: {rate.price.source}")
    return "\n".join(lines)


def _laws(optima: Sequence[Optimum]) -> str:
    from planner.foundation.units import format_count

    rows = [
        (
            ("* " if each.law.recommended else "  ") + each.law.title,
            format_count(each.params),
            format_count(each.tokens),
            f"{each.tokens_per_param:.3g}",
            "-" if each.loss is None else f"{each.loss:.3f}",
            f"{each.law.fitted_min_flops:.0e} to {each.law.fitted_max_flops:.0e}".replace("e+", "e"),
            beyond_words(each.beyond_fit),
        )
        for each in optima
    ]
    header = ("  law", "parameters", "tokens", "tokens/param", "loss", "fitted on FLOPs", "")
    return table(header, rows) + "\n* recommended"


def beyond_words(factor: float) -> str:
    """Whether a budget is inside the range of a fit."""
    if factor <= 1:
        return "inside"
    return f"extrapolated {factor:.3g} x" if factor < 1000 else f"extrapolated {factor:,.0f} x"


def _iso_flop(inputs: Inputs) -> str:
    """Loss against size at the budget: one bar a size, as long as its loss is above the least."""
    from planner.foundation.units import format_count
    from planner.sizing.principles.napkin import short
    from planner.sizing.principles.scaling import iso_flop

    form = inputs.law.loss
    assert form is not None, "the law of the plot has a loss"
    points = iso_flop(form, inputs.budget.flops, CHART_POINTS, CHART_DECADES)
    least, most = min(p.loss for p in points), max(p.loss for p in points)
    lines = [f"IsoFLOP: loss against size at {short(inputs.budget.flops)} FLOPs, by {inputs.law.title}"]
    for point in points:
        bar = "#" * round(BAR * (point.loss - least) / (most - least))
        mark = bar if point.loss > least else "<- least"
        lines.append(
            f"  {format_count(point.params):>8} on {format_count(point.tokens):>8}  {point.loss:.4f}  {mark}"
        )
    return "\n".join(lines)


def _hyper(optima: Sequence[Optimum], seq: int) -> str:
    from planner.foundation.units import format_count
    from planner.sizing.principles.napkin import short
    from planner.sizing.principles.scaling import FLOPS_PER_PARAM_TOKEN, nonembedding_params

    lines = []
    for each in optima:
        if each.hyper is None:
            continue
        h = each.hyper
        flops_per_token = FLOPS_PER_PARAM_TOKEN * each.params
        size = format_count(nonembedding_params(flops_per_token, seq, ASPECT))
        lines.append(
            f"{each.law.title}: batch {format_count(h.batch_tokens)} tokens, peak learning rate "
            f"{h.learning_rate:.2e}, {beyond_words(h.beyond_fit)} "
            f"(fitted on {h.fitted_min_flops:.0e} to {h.fitted_max_flops:.0e} FLOPs)".replace("e+", "e")
        )
        lines.append(
            f"  M = {short(flops_per_token)} non-embedding FLOPs a token, attention included: at sequence\n"
            f"  length {seq}, a model of hidden = {ASPECT} x layers has {size} parameters in blocks"
        )
        if h.beyond_fit > 1:
            lines.append("  do not take the batch blindly this far out: check it against the critical batch")
    return "\n".join(lines)


def _over_training(inputs: Inputs, points: Sequence[TrainingPoint]) -> str:
    from planner.foundation.units import format_count

    if not points or inputs.params is None:
        return ""
    rows = []
    for point in points:
        usd, hours = inputs.budget.usd(point.flops), inputs.budget.device_hours(point.flops)
        rows.append(
            (
                "  " + _point_name(inputs, point),
                format_count(point.tokens),
                f"{point.tokens / point.params:,.3g}",
                f"{point.flops:.3g}".replace("e+", "e"),
                None if hours is None else f"{hours:,.0f}",
                None if usd is None else f"${usd:,.0f}",
                f"{point.loss:.4f}",
                f"{format_count(point.equal_params)} on {format_count(point.equal_tokens)}",
                f"{max(0.0, point.overhead - 1):+.1%}",
                f"{point.size_ratio:.2f} x",
            )
        )
    header = ("", "tokens", "tokens/param", "FLOPs", "hours", "cost", "loss", "optimal at this loss",
              "extra FLOPs", "its size")  # fmt: skip
    keep = [i for i in range(len(header)) if i not in (4, 5) or any(row[i] is not None for row in rows)]
    body = table([header[i] for i in keep], [[row[i] for i in keep] for row in rows])
    return f"Over-training {format_count(inputs.params)} parameters, by {inputs.law.title}\n{body}"


def _point_name(inputs: Inputs, point: TrainingPoint) -> str:
    from planner.sizing.principles.scaling import FLOPS_PER_PARAM_TOKEN

    assert inputs.params is not None and inputs.law.loss is not None
    if abs(point.flops / inputs.budget.flops - 1) < 1e-9:
        return "the budget"
    optimal = inputs.law.loss.flops_of_params(inputs.params) / FLOPS_PER_PARAM_TOKEN / inputs.params
    multiple = point.tokens / optimal
    return "optimal" if abs(multiple - 1) < 1e-9 else f"{multiple:g} x"


def _notes(optima: Sequence[Optimum], points: Sequence[TrainingPoint]) -> str:
    rows: list[tuple[str, str | None]] = [("loss", COMPARE)]
    if points:
        rows.append(
            (
                "over-training",
                "extra FLOPs: over those of the compute-optimal model of equal loss; its size: how much "
                "larger that model is, which the smaller one saves in every use",
            )
        )
    for each in optima:
        law = each.law
        text = f"{law.note}. N: {law.counts}. Fitted on {law.fitted_on}. Read in {'; '.join(law.sources)}"
        rows.append((law.title, text))
    return wrapped(rows)


def scaling_document(
    inputs: Inputs, optima: Sequence[Optimum], points: Sequence[TrainingPoint]
) -> dict[str, Any]:
    """Every law's answer, with its range, sources and losses."""
    from planner.foundation.decode import encode
    from planner.sizing.principles.scaling import iso_flop

    budget, form = inputs.budget, inputs.law.loss
    assert form is not None, "the law of the plot has a loss"
    return {
        "budget": {
            "flops": budget.flops,
            "formula": budget.formula,
            "device_hours": budget.device_hours(budget.flops),
            "usd": budget.usd(budget.flops),
            "device": None if inputs.rate is None else encode(inputs.rate),
        },
        "formulas": {
            "flops": "C = 6 N D",
            "parametric_loss": "L = E + A / N^alpha + B / D^beta; N* = G (C / 6)^(beta / (alpha + beta)), "
            "G = (alpha A / (beta B))^(1 / (alpha + beta))",
            "fit": "value x (C / at_flops)^exponent",
        },
        "laws": [_law_document(each, inputs.seq) for each in optima],
        "iso_flop": {
            "law": inputs.law.key,
            "points": [_point(inputs, p) for p in iso_flop(form, budget.flops, CHART_POINTS, CHART_DECADES)],
        },
        "over_training": None
        if inputs.params is None
        else {"law": inputs.law.key, "params": inputs.params, "points": [_point(inputs, p) for p in points]},
        "notes": [COMPARE],
    }


def _law_document(each: Optimum, seq: int) -> dict[str, Any]:
    from planner.foundation.decode import encode
    from planner.sizing.principles.scaling import FLOPS_PER_PARAM_TOKEN, nonembedding_params

    law = encode(each.law)
    document = {
        "law": each.law.key,
        "title": each.law.title,
        "recommended": each.law.recommended,
        "params": each.params,
        "tokens": each.tokens,
        "tokens_per_param": each.tokens_per_param,
        "loss": each.loss,
        "extrapolated": each.beyond_fit > 1,
        "beyond_fit": each.beyond_fit,
        "fitted_flops": [each.law.fitted_min_flops, each.law.fitted_max_flops],
        "fitted_on": each.law.fitted_on,
        "counts": each.law.counts,
        "constants": {name: law[name] for name in ("fit", "loss", "joint_loss") if law[name] is not None},
        "note": each.law.note,
        "sources": list(each.law.sources),
    }
    if each.hyper is not None:
        flops_per_token = FLOPS_PER_PARAM_TOKEN * each.params
        document["flops_per_token"] = flops_per_token
        document["params_nonembedding"] = nonembedding_params(flops_per_token, seq, ASPECT)
        document["hyperparameters"] = {**encode(each.hyper), "extrapolated": each.hyper.beyond_fit > 1}
    return document


def _point(inputs: Inputs, point: TrainingPoint) -> dict[str, Any]:
    from planner.foundation.decode import encode

    return {
        **encode(point),
        "tokens_per_param": point.tokens / point.params,
        "device_hours": inputs.budget.device_hours(point.flops),
        "usd": inputs.budget.usd(point.flops),
        "overhead": point.overhead,
        "size_ratio": point.size_ratio,
    }
