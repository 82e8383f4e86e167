"""`plan scaling`: compute-optimal size and tokens for a budget, by the published laws side by side.

The answer of `plan scaling` for a terminal, and as a JSON document.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.hardware.napkin_text import wrapped
from planner.commands.shared.options import json_option, on_premises_option, prices_option
from planner.commands.shared.quantities import RATE_OPTIONS, Reading, read_count, read_rate
from planner.commands.shared.text import table

if TYPE_CHECKING:
    from planner.sizing.device_rate import DeviceRate
    from planner.sizing.scaling import Budget, Law, Optimum, TrainingPoint


MOST_GPU_HOURS = 1e13
MOST_USD = 1e15
SMALLEST_SIZE, LARGEST_SIZE = 1e6, 1e15
PLOT_KINDS = (".svg", ".html")


@click.command()
@click.option("--budget-flops", metavar="FLOPS", help="Training budget in FLOPs, such as 5.76e23.")
@click.option("--budget-gpu-hours", metavar="HOURS", help="Training budget in device-hours, such as 1M.")
@click.option("--budget-usd", metavar="USD", help="Training budget in dollars, such as 5M.")
@click.option(
    "--device",
    metavar="DEVICE",
    help="The device of a budget in hours or dollars; with it, every row also has hours and dollars.",
)
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp16", "fp32", "fp8"]),
    help="Format of matrix products. Default: bf16; fp16 where the device has no bf16.",
)
@click.option("--mfu", metavar="SHARE", help="Assumed utilisation of the peak, such as 0.4. Default: 0.40.")
@click.option(
    "--usd-per-gpu-hour", metavar="USD", help="Price of a device-hour. Default: cheapest of the catalog."
)
@click.option(
    "--params", metavar="SIZE", help="Price over-training: loss against tokens at this size, such as 8B."
)
@click.option(
    "--law",
    "law_key",
    default="besiroglu-2024",
    show_default=True,
    metavar="LAW",
    help="The law of --params and of the plot: besiroglu-2024 or hoffmann-3, which give a loss of N and D.",
)
@click.option(
    "--seq",
    type=click.IntRange(1, 2**24),
    default=4096,
    show_default=True,
    help="Sequence length, for DeepSeek's FLOPs a token, which count attention.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the IsoFLOP plot to FILE.svg or FILE.html.",
)
@prices_option
@on_premises_option
@json_option
def scaling(as_json: bool, plot: Path | None, **asked: Any) -> None:
    """Compute-optimal parameters and tokens for a budget, by the published laws side by side."""
    from planner.commands.shared.text import print_json
    from planner.foundation.decode import write_atomic
    from planner.sizing.scaling import load_laws, optimum

    laws = load_laws()
    inputs = read_inputs(laws, plot, asked)
    optima = [optimum(law, inputs.budget.flops) for law in laws]
    table = over_training_table(inputs)
    if plot is not None:
        from planner.report.isoflop import isoflop_plot

        write_atomic(plot, isoflop_plot(inputs.law, optima, html=plot.suffix.lower() == ".html"))
        click.echo(f"wrote {plot}", err=True)
    if as_json:
        print_json(scaling_document(inputs, optima, table))
    else:
        click.echo(scaling_text(inputs, optima, table))


class Inputs:
    """What the options name, read and checked."""

    def __init__(self, budget: Budget, law: Law, params: int | None, seq: int) -> None:
        self.budget, self.law, self.params, self.seq = budget, law, params, seq

    @property
    def rate(self) -> DeviceRate | None:
        return self.budget.rate


def read_inputs(laws: tuple[Law, ...], plot: Path | None, asked: dict[str, Any]) -> Inputs:
    """Reads the options. Raises InputError with every fault."""
    reading = Reading()
    law = reading.read(lambda: _law(laws, asked["law_key"]))
    params = (
        None
        if asked["params"] is None
        else reading.read(lambda: read_count(asked["params"], "--params", SMALLEST_SIZE, LARGEST_SIZE))
    )
    if plot is not None and plot.suffix.lower() not in PLOT_KINDS:
        reading.add("--plot", f"'{plot.name[:60]}' is no kind of plot.", "FILE.svg or FILE.html")
    rate = _rate(reading, asked)
    budget = _budget(reading, asked, rate)
    reading.finish()
    assert law is not None and budget is not None
    return Inputs(budget, law, params, asked["seq"])


def _law(laws: tuple[Law, ...], key: str) -> Law:
    from planner.foundation.errors import InputError, Problem

    legal = [law for law in laws if law.loss is not None]
    for law in legal:
        if law.key == key:
            return law
    known = any(law.key == key for law in laws)
    fault = f"'{key[:40]}' gives no loss of N and D." if known else f"no law '{key[:40]}'."
    raise InputError(Problem(where="--law", fault=fault, legal=", ".join(law.key for law in legal)))


def _rate(reading: Reading, asked: dict[str, Any]) -> DeviceRate | None:
    """The device's rate; None without --device, for which other options are then refused."""
    if asked["device"] is not None:
        return read_rate(reading, **{name: asked[name] for name in RATE_OPTIONS})
    for name in RATE_OPTIONS:
        if asked[name] is not None and asked[name] is not False:
            flag = f"--{name.replace('_', '-')}"
            reading.add(flag, "says something of a device, and none is named.", fix="add --device")
    return None


def _budget(reading: Reading, asked: dict[str, Any], rate: DeviceRate | None) -> Budget | None:
    """The budget in FLOPs, from exactly one of three options."""
    from planner.sizing.scaling import budget_of_flops, budget_of_hours, budget_of_usd

    given = [key for key in ("budget_flops", "budget_gpu_hours", "budget_usd") if asked[key] is not None]
    flags = "--budget-flops, --budget-gpu-hours, --budget-usd"
    if len(given) != 1:
        fault = "no budget is given." if not given else f"{len(given)} budgets are given."
        reading.add(flags, fault, "exactly one of the three")
        return None
    key = given[0]
    flag, text = f"--{key.replace('_', '-')}", asked[key]
    most = {"budget_flops": 1e30, "budget_gpu_hours": MOST_GPU_HOURS, "budget_usd": MOST_USD}[key]
    amount = reading.read(lambda: read_count(text, flag, 1, most))
    if key != "budget_flops" and rate is None and asked["device"] is None:
        reading.add(flag, "is FLOPs only by a device.", fix="add --device, such as --device h100-sxm-80gb")
    if amount is None:
        return None
    if key == "budget_flops":
        return reading.read(lambda: budget_of_flops(amount, rate))
    if rate is None:
        return None
    convert = budget_of_hours if key == "budget_gpu_hours" else budget_of_usd
    return reading.read(lambda: convert(amount, rate))


MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Tokens of the over-training table, as multiples of the compute-optimal tokens of that size."""


def over_training_table(inputs: Inputs) -> list[TrainingPoint]:
    """Multiples of the compute-optimal tokens for --params, and the budget's own point; by tokens."""
    from planner.sizing.scaling import FLOPS_PER_PARAM_TOKEN, over_training, training_point

    form = inputs.law.loss
    if inputs.params is None or form is None:
        return []
    spent = inputs.budget.flops / FLOPS_PER_PARAM_TOKEN / inputs.params
    points = [*over_training(form, inputs.params, MULTIPLES), training_point(form, inputs.params, spent)]
    return sorted(points, key=lambda point: point.tokens)


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
        _budget_text(inputs),
        "Compute-optimal by law (C = 6 N D)\n" + _laws(optima),
        _iso_flop(inputs),
        _hyper(optima, inputs.seq),
        _over_training(inputs, points),
        "Notes\n" + _notes(optima, points),
    ]
    return "\n\n".join(section for section in sections if section)


def _budget_text(inputs: Inputs) -> str:
    from planner.sizing.napkin import short

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
    from planner.sizing.napkin import short
    from planner.sizing.scaling import iso_flop

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
    from planner.sizing.napkin import short
    from planner.sizing.scaling import FLOPS_PER_PARAM_TOKEN, nonembedding_params

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
    from planner.sizing.scaling import FLOPS_PER_PARAM_TOKEN

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
    from planner.sizing.scaling import iso_flop

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
    from planner.sizing.scaling import FLOPS_PER_PARAM_TOKEN, nonembedding_params

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
