"""The solver against brute force on thousands of small random problems, with a ledger of every seed.

python -m bench.brute_force [--seconds 900] [--out bench/results/NAME.csv]

The families of problems and the comparison are those of tests/planner/brute_force.py, of which the tests run
some two hundred. The ledger has a line a seed: what brute force and the solver found, and what is wrong.
"""

from __future__ import annotations

import csv
import time
from collections import Counter
from pathlib import Path

import click

from planner.commands.shared.text import table
from tests.planner.brute_force import FAMILIES, compare

SHARES = {"plain": 8, "layer classes": 5, "experts": 2, "two kinds": 3, "blocks that ran": 2}
"""Seeds of each family in twenty."""
COLUMNS = ("family", "seed", "brute_force_s", "solver_s", "bound_s", "status", "fault", "cpu_s")


def order(cases: int, first: int) -> list[tuple[str, int]]:
    """Families and seeds by turns, so that any number of them has all families."""
    rounds = range(-(-cases // sum(SHARES.values())))
    return [
        (family, first + share * number + place)
        for number in rounds
        for family, share in SHARES.items()
        for place in range(share)
    ][:cases]


def line(family: str, seed: int) -> dict[str, object]:
    """One seed's line of the ledger."""
    begun_s = time.process_time()
    try:
        found = compare(FAMILIES[family](seed))
        values = (found.best_s, found.found_s, found.bound_s, found.status, found.fault)
    except Exception as error:
        values = (None, None, 0.0, "raised", f"{type(error).__name__}: {error}")
    each = (family, seed, *values, round(time.process_time() - begun_s, 2))
    return dict(zip(COLUMNS, each, strict=True))


@click.command()
@click.option("--cases", default=2000, show_default=True, help="Seeds to run.")
@click.option("--first", default=0, show_default=True, help="The first seed of each family.")
@click.option("--seconds", default=float("inf"), help="CPU time after which no further seed is begun.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the ledger, line by line.")
def main(cases: int, first: int, seconds: float, out: Path | None) -> None:
    """Compares seed by seed; exit code 1 where an answer is wrong."""
    lines: list[dict[str, object]] = []
    sink = None if out is None else out.open("w", newline="")
    writer = None if sink is None else csv.DictWriter(sink, COLUMNS, lineterminator="\n")
    if writer:
        writer.writeheader()
    for family, seed in order(cases, first):
        if time.process_time() > seconds:
            break
        lines.append(line(family, seed))
        if writer and sink:
            writer.writerow(lines[-1])
            sink.flush()
    if sink:
        sink.close()
    run, feasible, wrong = Counter[object](), Counter[object](), Counter[object]()
    for each in lines:
        run[each["family"]] += 1
        feasible[each["family"]] += each["brute_force_s"] is not None
        wrong[each["family"]] += bool(each["fault"])
    rows = [(family, str(run[family]), str(feasible[family]), str(wrong[family])) for family in SHARES]
    click.echo(table(("family", "seeds", "feasible", "wrong"), rows))
    for each in lines:
        if each["fault"]:
            click.echo(f"{each['family']} {each['seed']}: {each['fault']}")
    if any(each["fault"] for each in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
