"""Plans over every axis: what their ranks send in a step against what the cost model charges for.

    python -m bench.comm_count [--first N] [--only TEXT] [-o FILE]

For each plan of `tests.runtime.matrix`: the messages (operation, mesh axis, bytes, how often) of every rank
in one step, and those that differ from the charges. Known and left so, with the reason:

- Tied embeddings whose ends lie on two stages are summed over the two ranks once a step, uncharged: V h / tp
  values, against 6 V h FLOPs a token. Where one stage holds both ends, FSDP gathers and reduces them with
  the root as one unit, while the model charges two that share no weight.
- FSDP pads rows to the number of its ranks: of a gate of shared experts, which has one row.
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from bench.charged_messages import Message
from planner.foundation.decode import write_atomic
from tests.runtime.matrix import MODELS, Case, matrix
from tests.runtime.messages import expected_messages, sent_messages


def differences(sent: Counter[Message], expected: Counter[Message]) -> list[str]:
    """Messages whose counts differ, in words."""
    return [
        f"{message.op} over {message.axis} of {message.bytes} bytes: {sent[message]} sent, "
        f"{expected[message]} charged"
        for message in sorted(sent.keys() | expected.keys())
        if sent[message] != expected[message]
    ]


def measure(case: Case) -> dict[str, Any]:
    """A row of the result."""
    try:
        pairs = zip(sent_messages(case.plan), expected_messages(case.plan), strict=True)
        found = {rank: differences(*pair) for rank, pair in enumerate(pairs)}
    except Exception as error:
        return {"plan": case.name, "error": " ".join(str(error).split())[-200:]}
    return {"plan": case.name, "differences": {rank: lines for rank, lines in found.items() if lines}}


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="Only these.")
@click.option("--first", type=int, default=None, help="Only so many of the plans.")
@click.option("--only", default="", help="Only plans whose name holds this text.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=None, help="Where to write JSON.")
def main(models: tuple[str, ...], first: int | None, only: str, output: Path | None) -> None:
    """Counts the messages of the plans and prints a line for each."""
    rows = []
    for case in [case for case in matrix(models or tuple(MODELS)) if only in case.name][:first]:
        rows.append(measure(case))
        told = rows[-1].get("error") or next(iter(rows[-1]["differences"].values()), ["as charged"])
        click.echo(f"{case.name}: {'; '.join(told) if isinstance(told, list) else told}")
    equal = sum(row.get("differences") == {} for row in rows)
    click.echo(f"{equal} of {len(rows)} plans send what they are charged for.")
    if output is not None:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        write_atomic(output, json.dumps({"bench": "comm_count", "date": date, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
