"""`plan web`: the page of `plan compare` with its inputs, served to this machine alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.hardware.sizing_options import sizing_options

if TYPE_CHECKING:
    from planner.report.web.app import Answers
    from planner.report.web.requests import Asked
    from planner.sizing.comparison import Comparison, Option
    from planner.sizing.search import Known

DEFAULT_PORT = 8421
MOST_KNOWN = 400
"""Kinds of nodes whose plans are remembered, some 30 KB each: all of the catalog are about 100."""


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    metavar="N",
    help="Port on 127.0.0.1; 0 for any that is free.",
)
@click.option("--no-open", is_flag=True, help="Print the address and open no browser.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="A config.json, its folder or a TOML file that the page may name besides the catalog; repeatable.",
)
@click.option(
    "--prices", type=click.Path(path_type=Path), metavar="FILE",
    help="A TOML file with prices of your own, which win over all others.",
)  # fmt: skip
def web(port: int, no_open: bool, models: tuple[str, ...], prices: Path | None) -> None:
    """Serve the page of sizes and hardware choices on 127.0.0.1, until Ctrl-C.

    It only reads: every request is a GET, from this machine, to this address.
    """
    from planner.commands.shared.with_web import require_web

    require_web("web")
    import contextlib

    from planner.foundation.errors import PlannerError
    from planner.hardware.catalog import load_model
    from planner.report.web.app import build_app, listen, server
    from planner.report.web.requests import at_first

    for model in models:
        load_model(model)
    listening = listen(port)
    port = listening.getsockname()[1]
    answered = answers(models, prices)
    with contextlib.suppress(PlannerError):  # what the first page shows; it tells what is wrong with it
        answered.compare(at_first(), lambda: False)
    address = f"http://127.0.0.1:{port}/"
    click.echo(f"plan web  {address}  (Ctrl-C ends it)")
    if not no_open:
        import webbrowser

        webbrowser.open(address)
    server(build_app(answered, port)).run(sockets=[listening])


def answers(models: Sequence[str], prices: Path | None) -> Answers:
    """What the page asks of the planner."""
    import json

    from planner.commands.hardware.sizing_document import comparison_document, options_csv
    from planner.commands.hardware.sizing_options import PRICINGS
    from planner.commands.shared.options import open_market
    from planner.hardware.catalog import device_names, model_index
    from planner.report.web.app import Answers

    def choices() -> dict[str, Sequence[str]]:
        providers = {instance.provider for instance in open_market(prices, False).instances}
        return {
            "Devices": device_names(),
            "Providers": [*sorted(providers), "on-premises"],
            "Pricing": PRICINGS,
        }

    named = choices()
    known: Known = {}
    return Answers(
        compare=lambda asked, stopped: compared(asked, prices, stopped, known),
        plan=lambda asked, option: planned(asked, option, prices),
        csv=options_csv,
        json=lambda found: json.dumps(comparison_document(found), indent=1, allow_nan=False),
        models=(*models, *sorted(model_index())),
        choices=lambda: named,
    )


def typed(words: Sequence[str]) -> dict[str, Any]:
    """The options of `plan compare` as it would be called with. Raises InputError."""
    from planner.foundation.errors import InputError, Problem

    kept: dict[str, Any] = {}

    @click.command("compare", add_help_option=False)
    @sizing_options
    def command(asked: dict[str, Any], as_json: bool) -> None:
        kept.update(asked)

    try:
        command.main(list(words), prog_name="plan compare", standalone_mode=False)
    except click.ClickException as error:
        raise InputError(Problem(where="plan compare", fault=error.format_message())) from None
    return kept


def compared(asked: Asked, prices: Path | None, stopped: Callable[[], bool], known: Known) -> Comparison:
    """The comparison that the page asks for. Raises InputError with every fault.

    `known` remembers plans: limits, prices and tokens change without a new search.
    """
    from planner.commands.hardware.sizing_options import read_sizing
    from planner.report.web.app import SupersededError
    from planner.report.web.requests import arguments
    from planner.sizing.search import compare

    def progress(done: int, of: int) -> None:
        if stopped():
            raise SupersededError

    request, market = read_sizing({**typed(arguments(asked)), "prices": prices}, least=False)
    while len(known) > MOST_KNOWN:
        known.pop(next(iter(known)))
    return compare(request, market, progress, known)


def planned(asked: Asked, option: Option, prices: Path | None) -> str:
    """plan.json of the whole plan of an option, by a longer search. Raises PlannerError."""
    import json

    from planner.commands.hardware.sizing_options import read_sizing
    from planner.report.web.requests import arguments
    from planner.sizing.sized import whole_plan
    from planner.strategy.plan import encode_plan

    request, market = read_sizing({**typed(arguments(asked)), "prices": prices}, least=False)
    return json.dumps(encode_plan(whole_plan(request, market, option)), indent=1, allow_nan=False)
