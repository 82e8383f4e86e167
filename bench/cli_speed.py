"""Wall time of the commands that only read the catalog: `python -m bench.cli_speed --out FILE.json`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

from planner.foundation.decode import write_atomic

AIM_S = 0.3
COMMANDS = (
    "--help",
    *(f"list {what}" for what in ("models", "devices", "instances", "networks", "links", "schedules")),
    "list profiles",
    "show model deepseek-v3",
    "show device h100",
    "show instance p5.48xlarge",
    "show cluster 16*p5.48xlarge",
    "show network hdr200x8",
)


def seconds(command: str, repeats: int) -> float:
    """The median wall time of a command in a process of its own."""
    taken = []
    for _ in range(repeats):
        begun_s = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "planner.cli", *command.split()], capture_output=True, check=True
        )
        taken.append(time.perf_counter() - begun_s)
    return statistics.median(taken)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, help="Runs of each command.")
def main(out: Path, repeats: int) -> None:
    """Time the catalog's commands."""
    found = {command: round(seconds(command, repeats), 3) for command in COMMANDS}
    write_atomic(out, json.dumps({"aim_s": AIM_S, "median_s": found}, indent=1) + "\n")
    for command, median_s in found.items():
        click.echo(f"plan {command:32s} {median_s:.3f} s")


if __name__ == "__main__":
    main()
