"""`plan profile`: measures this machine for a model and writes a profile."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.options import arch_option, json_option

if TYPE_CHECKING:
    from planner.cluster import ClusterSpec
    from planner.model import ModelSpec
    from planner.profile import Profile
    from planner.workload import Precision

PLAIN_INTERVAL_S = 2.0
"""Off a terminal, a line of progress at most this often."""


@click.command()
@click.option(
    "--model",
    "model_text",
    required=True,
    metavar="MODEL",
    help="A catalog name, a config.json or its folder, or a TOML file.",
)
@click.option(
    "--cluster",
    "cluster_text",
    default="local",
    show_default=True,
    metavar="local[:N]",
    help="This machine: all its accelerators, N of them, or N processes on its CPU.",
)
@click.option("--seq", required=True, type=click.IntRange(min=1), metavar="N", help="Tokens of one sequence.")
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    help="Format of matrix products. Default: bf16 on an accelerator, fp32 on a CPU.",
)
@click.option(
    "--tp",
    "widths",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="A shard width to measure; repeat for several. Default: powers of two up to the cluster's size.",
)
@click.option(
    "--micro-batch",
    "micro_batches",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="A micro-batch to measure; repeat for several. Default: 1, 2, 4, 8.",
)
@click.option("--quick", is_flag=True, help="Few samples of few cases, in seconds: a rough profile.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write the profile.",
)
@arch_option
@json_option
def profile(
    model_text: str,
    cluster_text: str,
    seq: int,
    precision: str | None,
    widths: tuple[int, ...],
    micro_batches: tuple[int, ...],
    quick: bool,
    output: Path,
    arch: str | None,
    as_json: bool,
) -> None:
    """Measure layers, collectives, memory and host overhead on this machine.

    Writes FILE whole at the end, or not at all.
    """
    from planner.catalog import load_model
    from planner.cluster_grammar import parse_cluster
    from planner.codec import to_json, write_atomic
    from planner.commands.options import chosen_precision
    from planner.commands.with_torch import require_torch
    from planner.execution import check_executed

    model, cluster = load_model(model_text, arch=arch), parse_cluster(cluster_text)
    check_executed(model, "measure")
    _check(model, cluster, cluster_text, seq, output)
    require_torch("profile")
    begun_s = time.monotonic()
    result = measure(
        model,
        cluster,
        seq,
        chosen_precision(precision, cluster),
        quick=quick,
        widths=widths,
        micro_batches=micro_batches,
    )
    write_atomic(output, to_json(result))
    click.echo(to_json(result) if as_json else describe(result, output, time.monotonic() - begun_s), nl=False)


def measure(
    model: ModelSpec,
    cluster: ClusterSpec,
    seq: int,
    precision: Precision,
    *,
    quick: bool = False,
    widths: tuple[int, ...] = (),
    micro_batches: tuple[int, ...] = (),
) -> Profile:
    """Takes a profile with progress on stderr. Empty widths and micro-batches: the default ones."""
    from runtime.profiler import check_widths, default_scope, take_profile

    check_widths(model, widths)
    scope = default_scope(
        cluster.devices,
        quick=quick,
        widths=sorted(set(widths)),
        micro_batches=sorted(set(micro_batches)),
    )
    with _Progress() as progress:
        return take_profile(model, cluster, seq, precision, scope, progress)


def _check(model: ModelSpec, cluster: ClusterSpec, cluster_text: str, seq: int, output: Path) -> None:
    """Raises InputError with everything that would only show after the measurement."""
    from planner.errors import InputError, Problem

    problems = []
    if not cluster.local:
        problems.append(
            Problem(
                where="--cluster",
                fault=f"'{cluster_text}' is not this machine, and only this machine can be measured.",
                legal="local, local:N",
            )
        )
    if model.learned_positions and seq > model.learned_positions:
        problems.append(
            Problem(
                where="--seq",
                fault=f"{seq} is longer than the {model.learned_positions} learned positions of the model.",
                legal=f"1 to {model.learned_positions}",
            )
        )
    if not output.resolve().parent.is_dir():
        problems.append(Problem(where="-o", fault=f"the folder {output.parent} does not exist."))
    if problems:
        raise InputError(*problems)


def describe(profile: Profile, output: Path, wall_s: float) -> str:
    """What was measured, for people."""
    from planner.commands.text import pairs
    from planner.units import format_bytes, format_count, format_seconds

    flops, copy = profile.constant("gemm_flops"), profile.constant("memory_bytes_per_s")
    facts: list[tuple[str, Any]] = [
        ("profile", str(output)),
        ("device", f"{profile.device} ({profile.devices_per_node} ranks, {profile.backend})"),
        ("layers", f"{len(profile.layers)} samples"),
        ("collectives", f"{len(profile.comms)} samples"),
        ("constants", str(len(profile.constants))),
        ("products", f"{format_count(flops)}FLOP/s a rank" if flops else None),
        ("copies", f"{format_bytes(copy)}/s" if copy else None),
        ("contention", ", ".join(f"{c.active}: {c.slowdown:.2f}x" for c in profile.contention)),
        ("taken in", format_seconds(wall_s)),
    ]
    facts += [("skipped", text) for text in profile.skipped]
    return pairs(facts) + "\n"


class _Progress:
    """A bar on a terminal, plain lines elsewhere, on stderr. No thread: measuring forks this process."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._total, self._done, self._said_s = 0, 0, 0.0

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("measuring"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=Console(stderr=True),
                auto_refresh=False,
            )
            self._task = self._bar.add_task("measuring", total=None, text="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, total: int) -> None:
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total, refresh=True)

    def step(self, text: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, text=text, refresh=True)
        elif time.monotonic() - self._said_s >= PLAIN_INTERVAL_S:
            self._said_s = time.monotonic()
            click.echo(f"measuring {self._done}/{self._total}: {text}", err=True)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)
