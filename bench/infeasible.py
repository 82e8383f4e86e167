"""Answers to random infeasible problems, each checked by the solver: the limit binds, every repair works.

python -m bench.infeasible [--cases 1000] [--out bench/results/NAME.json]

The problems and the check are those of tests/planner/infeasible.py, of which the tests run forty.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import click

from planner.advice.repairs import why_infeasible
from planner.commands.shared.text import pairs
from planner.foundation.decode import write_atomic
from tests.planner.infeasible import EFFORT, case, check_case


@click.command()
@click.option("--cases", default=1000, show_default=True, help="Seeds to check.")
@click.option("--first", default=0, show_default=True, help="The first seed.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the result.")
def main(cases: int, first: int, out: Path | None) -> None:
    """Check the answers and print what they were."""
    rules, kinds, wrong, without = Counter[str](), Counter[str](), dict[int, str](), 0
    seconds = []
    for seed in range(first, first + cases):
        try:
            answer = check_case(seed)
        except AssertionError:
            wrong[seed] = traceback.format_exc(limit=-1).splitlines()[-3].strip()
            continue
        rules[answer.binding.rule] += 1
        kinds.update(repair.kind for repair in answer.repairs)
        without += not answer.repairs
        if seed % 10 == 0:
            asked, begun = case(seed), time.perf_counter()
            why_infeasible(asked.problem, asked.pins, EFFORT)
            seconds.append(time.perf_counter() - begun)
    document = {
        "bench": "infeasible",
        "date": datetime.now(UTC).isoformat(),
        "cases": cases,
        "wrong": wrong,
        "without_repair": without,
        "rules": dict(rules.most_common()),
        "repairs": dict(kinds.most_common()),
        "median_answer_s": statistics.median(seconds) if seconds else None,
    }
    print(pairs((name, str(value)) for name, value in document.items()))
    if out is not None:
        write_atomic(out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
