"""`plan trace`: a module of one's own as a model, traced without memory and without data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.options import json_option

if TYPE_CHECKING:
    from planner.model.spec import ModelSpec


@click.command()
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="SHAPE[:DTYPE]",
    help="An argument of forward, such as 1x3x224x224 or 1x2048:int64; repeat for several, in order. The "
    "first dimension of the first is the batch.",
)
@click.option("--name", metavar="NAME", help="Name of the model. Default: that of FACTORY.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens that a sample stands for, which --seq must then equal. Default: the length of a row of "
    "token indices, 1 for other inputs.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write the model; pass it on as --model FILE.",
)
@json_option
def trace(
    factory: str, inputs: tuple[str, ...], name: str | None, tokens: int | None, output: Path, as_json: bool
) -> None:
    """Trace a torch module into a model that can be planned.

    MODULE:FACTORY is a class or function that is called without arguments and makes an nn.Module. MODULE is
    imported from the current folder or the installed packages: its code runs. Its forward pass runs once on
    tensors without memory. A loss is counted where forward returns it.
    """
    from planner.commands.shared.with_torch import require_torch
    from planner.foundation.decode import to_json
    from planner.foundation.errors import InputError, Problem
    from planner.model.traced_model import write_traced_model

    if output.suffix != ".json":
        raise InputError(
            Problem(where="-o", fault=f"{output} is no name of a JSON file.", fix=f"-o {output.stem}.json")
        )
    require_torch("trace")
    from runtime.model.trace_input import load_factory, parse_inputs, trace_factory

    examples = parse_inputs(inputs)
    model = trace_factory(
        load_factory(factory), examples, name=name or factory.rpartition(":")[2], tokens=tokens
    )
    write_traced_model(model, output)
    click.echo(to_json(model) if as_json else describe(model, output), nl=False)


def describe(model: ModelSpec, output: Path) -> str:
    """What was traced, for people."""
    from planner.commands.shared.text import pairs, table
    from planner.foundation.units import format_count

    tokens = model.max_positions
    facts: list[tuple[str, Any]] = [
        ("model", str(output)),
        ("parameters", f"{model.params_total:,}"),
        ("forward", f"{format_count(model.flops_per_token_forward(tokens) * tokens)}FLOP a sample"),
        ("a sample", f"{tokens} token(s): plan it with --seq {tokens}"),
        ("layers", f"{model.layers} in {len(model.classes())} classes"),
    ]
    rows = [
        (
            str(segment.count),
            f"{segment.block.params:,}",
            f"{format_count(segment.block.matmul_flops_forward(tokens))}FLOP",
            f"{segment.block.stream_width:,}",
        )
        for segment in model.segments
    ]
    return (
        pairs(facts) + "\n\n" + table(("layers", "parameters", "products", "values a token on"), rows) + "\n"
    )
