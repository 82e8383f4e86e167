"""How long `plan solve` takes, whole command with start-up, and how good its certificate is.

python -m bench.search_speed [--out bench/results/NAME.json]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import click

from planner.codec import write_atomic
from planner.commands.text import table

CASES: tuple[tuple[str, str], ...] = (
    ("small-cpu", "--model shardwise-demo --cluster 1x4:h100-sxm-80gb --seq 256 --batch 16"),
    ("8B-8xH100", "--model llama-3-8b --cluster 1x8:h100-sxm-80gb --seq 4096 --batch 64"),
    ("7B-8xA100-40", "--model llama-2-7b --cluster 1x8:a100-sxm-40gb --seq 4096 --batch 64"),
    ("70B-4x8H100", "--model llama-3.3-70b --cluster 4x8:h100-sxm-80gb --seq 4096 --batch 256"),
    ("70B-16x8H100", "--model llama-3.3-70b --cluster 16x8:h100-sxm-80gb --seq 4096 --batch 512"),
    ("175B-128x8A100", "--model gpt3-175b --cluster 128x8:a100-sxm-80gb@hdr200x8 --seq 2048 --batch 1536"),
)


def run(name: str, arguments: str, limit_s: float) -> dict[str, object]:
    """One case in a process of its own."""
    command = [sys.executable, "-m", "planner.cli", "solve", *arguments.split(), "--json"]
    begun = time.perf_counter()
    done = subprocess.run([*command, "--time-limit", str(limit_s)], capture_output=True, text=True)
    wall_s = time.perf_counter() - begun
    if done.returncode not in (0, 5):
        return {"case": name, "wall_s": wall_s, "exit": done.returncode, "error": done.stderr[:400]}
    plan = json.loads(done.stdout)
    return {
        "case": name,
        "wall_s": wall_s,
        "exit": done.returncode,
        "step_time_s": plan["estimate"]["step_time_s"],
        "strategy": plan["strategy"],
        "solver": plan["solver"],
    }


@click.command()
@click.option("--limit", "limit_s", default=60.0, show_default=True, help="Time limit of each search.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the result.")
@click.option("--only", multiple=True, help="Names of cases to run.")
def main(limit_s: float, out: Path | None, only: tuple[str, ...]) -> None:
    """Time the fixed cases and print the table."""
    results = [run(name, arguments, limit_s) for name, arguments in CASES if not only or name in only]
    rows = []
    for result in results:
        solver = result.get("solver")
        if not isinstance(solver, dict):
            rows.append((result["case"], f"{result['wall_s']:.2f}", f"exit {result['exit']}", "", "", ""))
            continue
        rows.append(
            (
                result["case"],
                f"{result['wall_s']:.2f}",
                solver["status"],
                f"{solver['gap']:.3%}",
                solver["shapes"],
                solver["milps"],
            )
        )
    print(table(("case", "wall s", "status", "gap", "shapes", "ILPs"), rows))
    if out is not None:
        document = {"bench": "search_speed", "date": datetime.now(UTC).isoformat(), "rows": results}
        write_atomic(out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
