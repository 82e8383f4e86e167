"""How long `plan size`, `plan compare` and `plan web` take, and how near the plans that they rest on are to a
search's.

    python -m bench.sizing [--limit SECONDS] [--out FILE.json]

The commands run whole, in processes of their own, on a cache of nothing; a server is asked for one page after
another. Then the scout's step time on some
clusters is set against that of `plan solve` with a time limit, and against its lower bound.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import click

from planner.commands.shared.text import table
from planner.foundation.decode import write_atomic
from planner.foundation.errors import InfeasibleError
from planner.hardware.catalog import load_model
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import PlanningProblem
from planner.model.workload import Workload
from planner.search.greedy_plan import Scout, Shared
from planner.search.solve import SolveOptions, solve
from planner.strategy.fixed_choices import FixedChoices

COMMANDS = (
    ("compare, all offers", "compare --model llama-3-70b --tokens 2T --seq 8192", 15.0),
    (
        "compare, one device",
        "compare --model llama-3-70b --tokens 2T --seq 8192 --device h100-sxm-80gb",
        None,
    ),
    ("size, all offers", "size --model llama-3-70b --tokens 2T --seq 8192 --deadline 30d", 5.0),
    (
        "size, two devices",
        "size --model llama-3-70b --tokens 2T --seq 8192 --deadline 30d --device h100-sxm-80gb --device b200",
        5.0,
    ),
    ("size, LoRA", "size --model llama-3-8b --tokens 50M --method lora --batch 128 --deadline 12h", 5.0),
)
"""Name, arguments of `plan`, and the seconds that it may take; None: no aim."""
PAGES: tuple[tuple[str, dict[str, str]], ...] = (
    ("at first", {}),
    ("another deadline", {"deadline": "60d"}),
    ("other tokens", {"tokens": "1T"}),
    ("another model", {"model": "llama-3-70b"}),
    ("a larger one", {"model": "llama-3-405b"}),
    ("experts", {"model": "mixtral-8x7b"}),
    ("more experts", {"model": "deepseek-v3"}),
    ("longer sequences", {"seq": "32768"}),
    ("another batch", {"batch": "8Mtok"}),
    ("another device", {"device": "b200-sxm"}),
    ("two devices", {"device": "h200-sxm-141gb, mi300x"}),
    ("all devices", {"device": ""}),
)
"""What the page of `plan web` is asked for, one after another; each may take a second."""
CLUSTERS = (
    ("llama-3-8b", "1x8:h100-sxm-80gb", 8192, 128),
    ("llama-3-8b", "4x8:a100-sxm-80gb", 8192, 512),
    ("llama-3-8b", "16x8:a100-sxm-40gb", 4096, 1024),
    ("llama-3-8b", "8x8:l40s", 4096, 512),
    ("llama-13b", "8x8:v100-sxm-32gb", 2048, 1024),
    ("llama-3-70b", "8x8:h100-sxm-80gb", 8192, 512),
    ("llama-3-70b", "64x8:h100-sxm-80gb", 8192, 512),
    ("llama-3-70b", "256x8:a100-sxm-80gb", 4096, 1024),
    ("llama-3-70b", "16x8:mi300x", 8192, 512),
    ("llama-3-70b", "32x8:b200-sxm", 8192, 512),
    ("gpt3-175b", "128x8:a100-sxm-80gb", 2048, 1536),
    ("llama-3-405b", "256x8:h100-sxm-80gb", 8192, 2048),
    ("mixtral-8x7b", "8x8:h100-sxm-80gb", 4096, 512),
    ("qwen3-30b-a3b", "8x8:h100-sxm-80gb", 4096, 512),
    ("deepseek-v3", "256x8:h800-sxm-80gb", 4096, 15360),
)
"""Model, cluster, sequence length and batch."""


def timed(arguments: str) -> float:
    """Seconds of a whole command."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "planner.cli", *arguments.split(), "--json"], stdout=subprocess.PIPE
    )
    assert done.returncode == 0, arguments
    return time.perf_counter() - started


def page_seconds() -> list[tuple[str, float]]:
    """Seconds of each of PAGES."""
    command = [sys.executable, "-m", "planner.cli", "web", "--no-open", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[2]
        each = []
        try:
            for name, query in PAGES:
                started = time.perf_counter()
                with urllib.request.urlopen(f"{address}?{urllib.parse.urlencode(query)}") as page:
                    page.read()
                each.append((name, time.perf_counter() - started))
        finally:  # else it would be waited for
            server.terminate()
    return each


def against_search(model: str, cluster: str, seq: int, batch: int, limit_s: float) -> dict[str, object]:
    """The scout's plan and the search's on one cluster."""
    spec, parsed = load_model(model), parse_cluster(cluster)
    problem = PlanningProblem(
        model=spec,
        workload=Workload(
            seq=seq, batch=batch, tokens=10**12, precision=parsed.groups[0].device.usual_precision
        ),
        cluster=parsed,
        profile=None,
        memory_limit_bytes=parsed.groups[0].device.usable_memory_bytes,
    )
    started = time.perf_counter()
    scouted = Scout(problem, Shared(FixedChoices())).plan(parsed)
    wall_s = time.perf_counter() - started
    row: dict[str, object] = {"model": model, "cluster": cluster, "seq": seq, "batch": batch}
    row |= {"scout_wall_s": wall_s, "scout_s": None, "plan": ""}
    if scouted is not None:
        row["scout_s"] = scouted.evaluation.estimate.step_time_s
        row["plan"] = scouted.evaluation.strategy.degrees.label()
    try:
        plan = solve(problem, SolveOptions(pins=FixedChoices(), time_limit_s=limit_s))
    except InfeasibleError:
        return row | {"solve_s": None, "lower_bound_s": None, "solved": ""}
    assert plan.solver is not None
    return row | {
        "solve_s": plan.estimate.step_time_s,
        "lower_bound_s": plan.solver.lower_bound_s,
        "solved": plan.strategy.degrees.label(),
    }


@click.command()
@click.option("--limit", "limit_s", default=30.0, show_default=True, help="Seconds of each search.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the results as JSON.")
def main(limit_s: float, out: Path | None) -> None:
    """Times the commands, and sets scouts against searches."""
    timings = [(name, arguments, timed(arguments), aim) for name, arguments, aim in COMMANDS]
    click.echo(table(("command", "wall s", "aim s"), [(n, f"{s:.1f}", aim) for n, _, s, aim in timings]))
    pages = page_seconds()
    click.echo(table(("page of plan web", "wall s"), [(name, f"{s:.2f}") for name, s in pages]))
    rows = []
    for case in CLUSTERS:
        row = against_search(*case, limit_s)
        rows.append(row)
        click.echo(json.dumps(row))
    over = [
        row["scout_s"] / row["solve_s"] - 1  # type: ignore[operator]
        for row in rows
        if row["scout_s"] is not None and row["solve_s"] is not None
    ]
    click.echo(f"scout over search: median {statistics.median(over):+.1%}, worst {max(over):+.1%}")
    if out is not None:
        document = {
            "commands": [{"name": n, "plan": a, "wall_s": s, "aim_s": aim} for n, a, s, aim in timings],
            "pages": [{"name": name, "wall_s": s} for name, s in pages],
            "clusters": rows,
        }
        write_atomic(out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
