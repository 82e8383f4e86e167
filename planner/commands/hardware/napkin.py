"""`plan napkin`: first principles, every number with its formula."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.options import (
    LORA_HELP,
    LORA_MODULES,
    arch_option,
    json_option,
    on_premises_option,
    prices_option,
)
from planner.commands.shared.quantities import RATE_OPTIONS, Reading, optional_number, read_count, read_rate

if TYPE_CHECKING:
    from planner.sizing.napkin import Question, Size
    from planner.sizing.napkin_methods import OwnEstimate

SIZE = re.compile(r"^[+-]?[0-9.]+(e[+-]?[0-9]+)?\s*[a-z]{0,2}$|^[+-]?(nan|inf|infinity)$", re.IGNORECASE)
"""Texts that are meant as a size: a number with at most a short unit. Everything else is a model's name."""

SMALLEST_SIZE, LARGEST_SIZE = 1e6, 1e15
MOST_TOKENS = 1e18
MOST_DEVICES = 2**20
DEFAULT_SEQ = 4096
FINETUNE_NOTE = "assumed: 100,000 examples of 1,000 tokens; say yours with --finetune-tokens"


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="SIZE|MODEL",
    help="A size such as 7B or 1.5T, a catalog name, a config.json or its folder, or a TOML file.",
)
@click.option(
    "--device",
    default="a100-sxm-40gb",
    show_default=True,
    metavar="DEVICE",
    help="A device of the catalog, or a TOML file.",
)
@click.option("--tokens", metavar="COUNT", help="Tokens of pretraining, such as 2T. Default: 20 a parameter.")
@click.option(
    "--tokens-per-param", metavar="X", help="Tokens of pretraining for each parameter. Default: 20."
)
@click.option(
    "--finetune-tokens",
    default="100M",
    show_default=True,
    metavar="COUNT",
    help="Tokens of fine-tuning and LoRA, all epochs together.",
)
@click.option(
    "--lora-rank", type=click.IntRange(1, 65536), default=16, show_default=True, help="Rank of LoRA."
)
@click.option(
    "--lora-modules",
    metavar=LORA_MODULES,
    default="all",
    show_default=True,
    help=f"Weights that get adapters: {LORA_HELP}.",
)
@click.option(
    "--devices",
    type=click.IntRange(1, MOST_DEVICES),
    metavar="N",
    help="Devices to train on. Default: the least that hold each method.",
)
@click.option("--mfu", metavar="SHARE", help="Assumed utilisation of the peak, such as 0.4. Default: 0.40.")
@click.option(
    "--seq",
    type=click.IntRange(1, 2**24),
    metavar="N",
    help="Tokens of a sequence. Default: 4096, or the model's.",
)
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp16", "fp32", "fp8"]),
    help="Format of matrix products. Default: bf16; fp16 where the device has no bf16.",
)
@click.option(
    "--usd-per-gpu-hour", metavar="USD", help="Price of a device-hour. Default: cheapest of the catalog."
)
@arch_option
@prices_option
@on_premises_option
@json_option
def napkin(as_json: bool, **asked: Any) -> None:
    """First principles: bytes a parameter, 6 N D, days and dollars, with the formulas."""
    from planner.commands.hardware.napkin_text import napkin_document, napkin_text
    from planner.commands.shared.text import print_json
    from planner.sizing.napkin import left_out, rule_of_thumb
    from planner.sizing.napkin_methods import methods

    question, device = read_question(asked)
    own, activations, why_not = _estimate(question, device)
    left = left_out(question, activations, why_not)
    answers = rule_of_thumb(question), left, methods(question, own, why_not)
    if as_json:
        print_json(napkin_document(question, *answers, own, why_not))
    else:
        click.echo(napkin_text(question, *answers, own, why_not))


def read_question(asked: dict[str, Any]) -> tuple[Question, str]:
    """The question that the options ask, and the device as named. Raises InputError with every fault."""
    from planner.model.lora import module_problems, written
    from planner.model.workload import Adapters
    from planner.sizing.napkin import Question

    reading = Reading()
    size = reading.read(lambda: read_size(asked["model"], asked["seq"], asked["arch"]))
    rate = read_rate(reading, **{name: asked[name] for name in RATE_OPTIONS})
    finetune = reading.read(lambda: read_count(asked["finetune_tokens"], "--finetune-tokens", 1, MOST_TOKENS))
    tokens = _tokens(reading, asked, size)
    if size is not None and asked["lora_rank"] > size.shape.hidden:
        fault = (
            f"{asked['lora_rank']} is no low rank beside the width {size.shape.hidden} of {size.shape.name}."
        )
        reading.add("--lora-rank", fault, f"1 to {size.shape.hidden}")
    if size is not None:
        reading.problems += module_problems(asked["lora_modules"], size.shape)
    reading.finish()
    assert size is not None and rate is not None and tokens is not None and finetune is not None
    default = asked["finetune_tokens"] == "100M"
    question = Question(
        size=size,
        rate=rate,
        tokens=tokens[0],
        tokens_formula=tokens[1],
        finetune_tokens=finetune,
        finetune_note=FINETUNE_NOTE if default else "as given",
        seq=asked["seq"] or min(DEFAULT_SEQ, size.shape.max_positions),
        adapters=Adapters(rank=asked["lora_rank"], modules=written(asked["lora_modules"])),
        devices=asked["devices"],
    )
    return question, asked["device"]


def read_size(text: str, seq: int | None, arch: str | None) -> Size:
    """The size or model that `text` names. Raises InputError."""
    from planner.foundation.errors import InputError, Problem
    from planner.hardware.catalog import load_model
    from planner.sizing.napkin import bare_size, model_size

    if SIZE.match(text.strip()) or not text.strip():
        return bare_size(read_count(text.strip(), "--model", SMALLEST_SIZE, LARGEST_SIZE), seq or DEFAULT_SEQ)
    model = load_model(text, arch=arch)
    if model.learned_positions and seq is not None and seq > model.learned_positions:
        raise InputError(
            Problem(
                where="--seq",
                fault=f"{seq} is longer than {model.name}'s {model.learned_positions} learned positions.",
                legal=f"1 to {model.learned_positions}",
            )
        )
    return model_size(model)


def _tokens(reading: Reading, asked: dict[str, Any], size: Size | None) -> tuple[int, str] | None:
    """Tokens of pretraining and their formula."""
    from planner.sizing.napkin import TOKENS_PER_PARAM, short

    text, ratio_text = asked["tokens"], asked["tokens_per_param"]
    if text is not None and ratio_text is not None:
        reading.add("--tokens-per-param", "contradicts --tokens.", fix="give one of the two")
        return None
    if text is not None:
        count = reading.read(lambda: read_count(text, "--tokens", 1, MOST_TOKENS))
        return None if count is None else (count, "as given")
    given = optional_number(reading, ratio_text, "--tokens-per-param", 1e6, "20")
    if size is None or (given is None and ratio_text is not None):
        return None
    ratio = TOKENS_PER_PARAM if given is None else given
    name = "active N" if size.sparse else "N"
    formula = f"D = {ratio:g} {name} = {ratio:g} x {short(size.params_active)}"
    return max(1, round(ratio * size.params_active)), formula


def _estimate(question: Question, device: str) -> tuple[OwnEstimate | None, dict[str, int], str]:
    """The cost model's own answer and one sequence's activations; without them, the reason.

    Memory does not depend on the peak, so a 16-bit format whose peak is unknown is costed in the other one;
    its time is not shown.
    """
    from planner.foundation.errors import InputError
    from planner.model.workload import Precision
    from planner.sizing.napkin_methods import MOST_DEVICES, activations_bytes, own_estimate

    shape, seq, rate = question.size.shape, question.seq, question.rate
    precision = Precision(rate.costed_precision)
    try:
        own = own_estimate(shape, device, precision, seq, question.devices)
        activations = activations_bytes(shape, device, precision, seq)
    except InputError as error:
        return None, {}, f"the cost model has no estimate: {error.problems[0].fault.rstrip('.')}"
    why_not = (
        f"no split over at most {question.devices or MOST_DEVICES:,} devices by data and tensor parallelism "
        "holds it; `plan solve` also tries pipelines"
    )
    return own, activations, "" if own is not None else why_not
