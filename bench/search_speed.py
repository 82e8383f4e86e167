"""How long `plan solve` takes, and how good its certificate is: whole commands in processes of their own.

    python -m bench.search_speed [--case NAME ...] [--limit SECONDS] [--out FILE.json]
    python -m bench.search_speed --scaling

Wall and CPU time are those of the command with its start-up, reading and writing; peak memory is the largest
of the command and what it started. `--scaling` plans one model on 8 to 131,072 devices, two sequences of a
batch for each, and draws the time over the devices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from planner.commands.shared.text import table
from planner.foundation.decode import write_atomic
from planner.foundation.frozen import frozen

RESULTS = Path(__file__).parent / "results"
AIM_PEAK_MB = 500
SCALING_MODEL = "llama-3-8b"
SCALING_NODES = tuple(2**power for power in range(15))
"""Of eight devices each: 8 to 131,072."""


@frozen
class Case:
    """A problem as arguments of `plan solve`; aims are seconds for the whole command, and a gap."""

    name: str
    asked: str
    aim_s: float | None = None
    aim_gap: float = 0.005


CASES = (
    Case(
        name="7B-8xA100-40",
        asked="--model llama-2-7b --cluster 1x8:a100-sxm-40gb --seq 4096 --batch 64",
        aim_s=0.5,
    ),
    Case(
        name="8B-8xH100",
        asked="--model llama-3-8b --cluster 1x8:h100-sxm-80gb --seq 8192 --batch 128",
        aim_s=0.7,
    ),
    Case(
        name="175B-1024xA100",
        asked="--model gpt3-175b --cluster 128x8:a100-sxm-80gb@hdr200x8 --seq 2048 --batch 1536 --gap 0",
        aim_s=2.0,
        aim_gap=0.0,
    ),
    Case(
        name="405B-16384xH100",
        asked="--model llama-3.1-405b --cluster 2048x8:h100-sxm-80gb --seq 8192 --batch 2048",
        aim_s=5.0,
    ),
    Case(
        name="405B-16384xH100-128k",
        asked="--model llama-3.1-405b --cluster 2048x8:h100-sxm-80gb --seq 131072 --batch 128",
        aim_s=5.0,
    ),
    Case(
        name="deepseek-v3-2048xH800",
        asked="--model deepseek-v3 --cluster 256x8:h800-sxm-80gb --seq 4096 --batch 15360",
        aim_s=5.0,
    ),
    Case(
        name="70B-128xA100+128xH100",
        asked="--model llama-2-70b --cluster 16x8:a100-sxm-80gb+16x8:h100-sxm-80gb --seq 4096 --batch 1024",
        aim_s=10.0,
        aim_gap=0.01,
    ),
    Case(
        name="10T-100000xH100",
        asked="--model bench/models/moe-10t.toml --cluster 12500x8:h100-sxm-80gb --seq 8192 --batch 20000",
        aim_s=20.0,
        aim_gap=0.02,
    ),
)


def scaling_cases() -> tuple[Case, ...]:
    """One model on ever more nodes."""
    asked = "--model {} --cluster {}x8:h100-sxm-80gb --seq 8192 --batch {}"
    return tuple(
        Case(name=f"{8 * nodes} devices", asked=asked.format(SCALING_MODEL, nodes, 16 * nodes))
        for nodes in SCALING_NODES
    )


def measure(case: Case, limit_s: float) -> dict[str, Any]:
    """One case in a process of its own: what it took of the machine, and what the plan says of the search."""
    command = [sys.executable, "-m", "planner.cli", "solve", *case.asked.split(), "--json"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        begun_s = time.perf_counter()
        process = subprocess.Popen([*command, "--time-limit", str(limit_s)], stdout=out, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - begun_s
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        written, complaint = out.read(), errors.read()
    row: dict[str, Any] = {
        "case": case.name,
        "command": f"plan solve {case.asked}",
        "exit": process.returncode,
        "wall_s": wall_s,
        "user_s": used.ru_utime,
        "system_s": used.ru_stime,
        "peak_mb": used.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3),
        "aim_s": case.aim_s,
        "aim_gap": case.aim_gap,
    }
    if process.returncode not in (0, 5):
        return row | {"error": complaint.decode(errors="replace")[-400:]}
    plan = json.loads(written)
    solver = plan["solver"]
    return row | {
        "step_time_s": plan["estimate"]["step_time_s"],
        "shapes_per_s": solver["shapes"] / wall_s,
        "strategy": {key: value for key, value in plan["strategy"].items() if key != "stages"},
        "solver": solver,
    }


HEADER = (
    "case", "wall s", "aim s", "user s", "peak MB", "status", "gap", "shapes", "shapes/s", "ILPs", "step s",
)  # fmt: skip


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the printed table; what misses its aim is marked."""
    late = row["aim_s"] is not None and row["wall_s"] > row["aim_s"]
    used = (
        f"{row['wall_s']:.2f}{'*' if late else ''}",
        f"{row['aim_s']:g}" if row["aim_s"] is not None else "",
        f"{row['user_s']:.2f}",
        f"{row['peak_mb']:.0f}{'*' if row['peak_mb'] > AIM_PEAK_MB else ''}",
    )
    if "solver" not in row:
        return row["case"], *used, f"exit {row['exit']}", *[""] * 5
    solver = row["solver"]
    return (
        row["case"],
        *used,
        solver["status"],
        f"{solver['gap']:.2%}{'*' if solver['gap'] > row['aim_gap'] * (1 + 1e-6) else ''}",
        f"{solver['shapes']:,}",
        f"{row['shapes_per_s']:,.0f}",
        str(solver["milps"]),
        f"{row['step_time_s']:.4g}",
    )


def scaling_svg(rows: Sequence[dict[str, Any]]) -> str:
    """Wall and user seconds of the command over the number of devices, both axes logarithmic."""
    import altair as alt
    import vl_convert

    marks = [
        {"devices": int(row["case"].split()[0]), "seconds": row[key], "what": what}
        for row in rows
        for key, what in (("wall_s", "wall time"), ("user_s", "user CPU time"))
        if "solver" in row
    ]
    chart = (
        alt.Chart(alt.InlineData(values=marks))
        .mark_line(point=True)
        .encode(
            x=alt.X(
                "devices:Q",
                title=f"devices ({SCALING_MODEL}, two sequences of 8,192 tokens a device)",
                scale=alt.Scale(type="log", base=2),
                axis=alt.Axis(format=",d", labelAngle=-45),
            ),
            y=alt.Y("seconds:Q", title="plan solve, whole command (s)", scale=alt.Scale(type="log")),
            color=alt.Color("what:N", title=None, scale=alt.Scale(range=["#0072b2", "#d55e00"])),
        )
        .properties(width=620, height=380)
    )
    svg: str = vl_convert.vegalite_to_svg(chart.to_dict())
    return svg


def measured(cases: Iterable[Case], limit_s: float) -> list[dict[str, Any]]:
    """Every case in turn, said as it ends."""
    rows = []
    for case in cases:
        rows.append(measure(case, limit_s))
        click.echo(f"{case.name}: {rows[-1]['wall_s']:.2f} s, exit {rows[-1]['exit']}", err=True)
    return rows


@click.command()
@click.option("--limit", "limit_s", default=60.0, show_default=True, help="Time limit of each search.")
@click.option(
    "--case", "names", multiple=True, type=click.Choice([case.name for case in CASES]), help="Cases to run."
)
@click.option("--scaling", is_flag=True, help="Time over the number of devices, as numbers and an SVG.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write. Default: in bench/results.")
def main(limit_s: float, names: tuple[str, ...], scaling: bool, out: Path | None) -> None:
    """Time the fixed cases, print the table, write the result."""
    if scaling and names:
        raise click.UsageError("--scaling has cases of its own: leave out --case.")
    cases = scaling_cases() if scaling else [case for case in CASES if not names or case.name in names]
    rows = measured(cases, limit_s)
    click.echo(table(HEADER, [line(row) for row in rows]))
    click.echo("* misses its aim" if not scaling else f"two sequences a device, {SCALING_MODEL}")
    name = "search-scaling" if scaling else "search-speed"
    file = out or RESULTS / f"{datetime.now(UTC).date().isoformat()}-{name}.json"
    document = {
        "bench": name.replace("-", "_"),
        "date": datetime.now(UTC).isoformat(),
        "cores": os.cpu_count(),
        "limit_s": limit_s,
        "aim_peak_mb": AIM_PEAK_MB,
        "rows": rows,
    }
    write_atomic(file, json.dumps(document, indent=1) + "\n")
    if scaling:
        write_atomic(file.with_suffix(".svg"), scaling_svg(rows))


if __name__ == "__main__":
    main()
