"""`plan profile`: measures this machine for some models and writes a profile."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.options import arch_option, json_option
from planner.commands.profile_text import describe

if TYPE_CHECKING:
    from planner.cluster import ClusterSpec
    from planner.commands.profile_session import ProfileSession
    from planner.model import ModelSpec
    from planner.profile import Profile
    from planner.workload import Precision
    from runtime.record import Record
    from runtime.scope import Scope

STANDARD_MODELS = {
    "cuda": ("llama-3.1-8b", "llama-3.1-70b", "qwen3-30b-a3b"),
    "cpu": ("shardwise-demo", "gpt-2-124m"),
}
"""Measured where no model is named: the shapes that most plans need, for what a device can hold. Dense blocks
of two widths (8B, 70B) and fine-grained experts on an accelerator; on a CPU what is trained there."""

STANDARD_SEQS = {"cuda": (2048, 8192), "cpu": (128, 512)}
"""Tokens of a sequence where none is given: two, so that every length between is interpolated."""


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """The options as typed."""

    models: tuple[str, ...]
    cluster: str
    seqs: tuple[int, ...]
    precision: str | None
    widths: tuple[int, ...]
    micro_batches: tuple[int, ...]
    quick: bool
    target: float
    time_limit_s: float | None
    output: Path
    replace: bool
    arch: str | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for, read and checked."""

    models: tuple[ModelSpec, ...]
    cluster: ClusterSpec
    seqs: tuple[int, ...]
    precision: Precision


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="A catalog name, a config.json or its folder, or a TOML file; repeat for several. Default: a "
    "standard set, by what the device can hold.",
)
@click.option(
    "--cluster",
    default="local",
    show_default=True,
    metavar="local[:N]",
    help="This machine: all its accelerators, N of them, or N processes on its CPU.",
)
@click.option(
    "--seq",
    "seqs",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of one sequence; repeat for several. Default: two usual lengths.",
)
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
    help="A shard width to measure, on one device by its shapes; repeat for several. Default: powers of two "
    "up to the cluster's size.",
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
    "--target",
    type=click.FloatRange(min=0, min_open=True, max=100),
    default=5.0,
    show_default=True,
    metavar="PERCENT",
    help="Enough is measured when held-out samples are predicted with no more than this error.",
)
@click.option(
    "--time-limit",
    "time_limit_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="The most that measuring takes. Default: 900, with --quick 120.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write the profile. To one of the same device and software that is there, what is measured "
    "is added.",
)
@click.option(
    "--replace", is_flag=True, help="Overwrite FILE, and what an interrupted profile left, instead."
)
@arch_option
@json_option
def profile(as_json: bool, **typed: Any) -> int | None:
    """Measure layers, collectives, memory and host overhead on this machine.

    Writes FILE whole at the end. When interrupted, what was measured is kept in FILE.partial, from which the
    same command goes on.
    """
    from planner.codec import to_json
    from planner.commands.profile_session import Terminated, terminable
    from planner.commands.with_torch import require_torch

    options = ProfileOptions(**typed)
    request = _read(options)
    require_torch("profile")
    scope, begun_s = _scope(request, options), time.monotonic()
    with _open_session(request, options) as session:
        try:
            with terminable():
                result = session.write(_take(request, scope, session.record))
        except (KeyboardInterrupt, Terminated) as ending:
            return session.interrupted(ending)
    if as_json:
        click.echo(to_json(result), nl=False)
    else:
        click.echo(describe(result, options.output, time.monotonic() - begun_s), nl=False)
    return None


def measure(
    model: ModelSpec, cluster: ClusterSpec, seq: int, precision: Precision, *, quick: bool = False
) -> Profile:
    """Takes the usual profile of one model, with progress on stderr."""
    from runtime.scope import default_scope

    request = Request(models=(model,), cluster=cluster, seqs=(seq,), precision=precision)
    return _take(request, default_scope(cluster.devices, (seq,), quick=quick))


def _take(request: Request, scope: Scope, record: Record | None = None) -> Profile:
    from planner.commands.profile_progress import ProfileProgress
    from runtime.profiler import take_profile

    with ProfileProgress() as progress:
        if record is not None and record.kept:
            progress.say(f"going on from the {record.kept} cases in {record.path}")
        return take_profile(request.models, request.cluster, request.precision, scope, progress, record)


def _open_session(request: Request, options: ProfileOptions) -> ProfileSession:
    """What is measured now is added to. Raises InputError where that is of another device or software."""
    from planner.codec import digest
    from planner.commands.profile_session import begin_session
    from runtime.profiler import stack_here
    from runtime.record import RECORD_SCHEMA, Header

    header = Header(
        record_schema=RECORD_SCHEMA,
        stack=stack_here(request.cluster, request.precision),
        quick=options.quick,
        models={model.name: digest(model) for model in request.models},
    )
    return begin_session(options.output, header, replace=options.replace)


def _scope(request: Request, options: ProfileOptions) -> Scope:
    """What is measured. Raises InputError for widths that no model can be split by."""
    from runtime.scope import check_widths, default_scope

    check_widths(request.models, options.widths)
    usual = default_scope(
        request.cluster.devices,
        request.seqs,
        quick=options.quick,
        widths=options.widths,
        micro_batches=options.micro_batches,
    )
    limit_s = options.time_limit_s or usual.time_limit_s
    return dataclasses.replace(usual, target=options.target / 100, time_limit_s=limit_s)


def _read(options: ProfileOptions) -> Request:
    """Reads what the options name. Raises InputError with every fault that shows before measuring."""
    from planner.catalog import load_model
    from planner.cluster_grammar import parse_cluster
    from planner.commands.options import chosen_precision
    from planner.execution import check_executed

    cluster = parse_cluster(options.cluster)
    kind = "cpu" if cluster.groups[0].device.name == "cpu" else "cuda"
    models = tuple(load_model(text, arch=options.arch) for text in options.models or STANDARD_MODELS[kind])
    for model in models:
        check_executed(model, "measure")
    seqs = tuple(sorted(set(options.seqs or STANDARD_SEQS[kind])))
    _check(models, cluster, options, seqs)
    precision = chosen_precision(options.precision, cluster)
    return Request(models=models, cluster=cluster, seqs=seqs, precision=precision)


def _check(
    models: Sequence[ModelSpec], cluster: ClusterSpec, options: ProfileOptions, seqs: Sequence[int]
) -> None:
    """Raises InputError with everything that would only show after the measurement."""
    from planner.errors import InputError, Problem

    problems = []
    if not cluster.local:
        problems.append(
            Problem(
                where="--cluster",
                fault=f"'{options.cluster}' is not this machine, and only this machine can be measured.",
                legal="local, local:N",
            )
        )
    for model in models:
        longest = model.learned_positions
        if longest and seqs[-1] > longest:
            fault = f"{seqs[-1]} is longer than the {longest} learned positions of {model.name}."
            problems.append(Problem(where="--seq", fault=fault, legal=f"1 to {longest}"))
    if len({model.name for model in models}) < len(models):
        fault = f"two of {', '.join(model.name for model in models)} have one name."
        problems.append(Problem(where="--model", fault=fault, fix="name each once, or rename a folder"))
    if not options.output.resolve().parent.is_dir():
        problems.append(Problem(where="-o", fault=f"the folder {options.output.parent} does not exist."))
    if problems:
        raise InputError(*problems)
