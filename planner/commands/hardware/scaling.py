"""`plan scaling`: compute-optimal size and tokens for a budget, by the published laws side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.options import json_option, on_premises_option, prices_option
from planner.commands.shared.quantities import RATE_OPTIONS, Reading, read_count, read_rate

if TYPE_CHECKING:
    from planner.sizing.principles.device_rate import DeviceRate
    from planner.sizing.principles.scaling import Law, TrainingPoint
    from planner.sizing.principles.scaling_budget import Budget

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
    from planner.commands.hardware.scaling_text import scaling_document, scaling_text
    from planner.commands.shared.text import print_json
    from planner.foundation.decode import write_atomic
    from planner.sizing.principles.scaling import load_laws, optimum

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
    from planner.sizing.principles.scaling_budget import budget_of_flops, budget_of_hours, budget_of_usd

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
    from planner.sizing.principles.scaling import FLOPS_PER_PARAM_TOKEN, over_training, training_point

    form = inputs.law.loss
    if inputs.params is None or form is None:
        return []
    spent = inputs.budget.flops / FLOPS_PER_PARAM_TOKEN / inputs.params
    points = [*over_training(form, inputs.params, MULTIPLES), training_point(form, inputs.params, spent)]
    return sorted(points, key=lambda point: point.tokens)
