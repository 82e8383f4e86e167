"""`plan profile`: measures this machine for some models and writes a profile."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.running.profile_ranks import attend_ranks, join_ranks
from planner.commands.running.profile_request import (
    ProfileOptions,
    Request,
    check_device,
    read_request,
    read_scope,
)
from planner.commands.running.profile_text import describe
from planner.commands.shared.options import arch_option, json_option

if TYPE_CHECKING:
    from planner.commands.running.profile_session import ProfileSession
    from planner.hardware.cluster import ClusterSpec
    from planner.model.spec import ModelSpec
    from planner.model.workload import Precision
    from planner.profile.profile import Profile
    from runtime.profiler.joint_world import JointWorld
    from runtime.profiler.scheduler import Record
    from runtime.profiler.scope import Scope


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
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    help="What of this machine to measure. Default: its accelerators, if there are any.",
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
@click.option(
    "--cp",
    "cps",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks of context parallelism whose share of a block to measure, by every exchange; repeatable.",
)
@click.option(
    "--ep",
    "eps",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks of expert parallelism whose share of a block to measure, under balanced routing; repeatable.",
)
@click.option(
    "--compiled/--eager",
    default=None,
    help="Whether to measure compiled layers beside eager ones. Default: on an accelerator, without --quick.",
)
@click.option(
    "--max-message",
    metavar="SIZE",
    help="The largest message of collectives. Default: 1GiB; 16MiB between processes of a CPU.",
)
@click.option(
    "--sweeps",
    type=click.Choice(["none", "few", "all"]),
    help="Operators to time alone, which price layers that are not measured. Default: all, with --quick few.",
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
@click.option("--anyway", is_flag=True, help="Measure an accelerator although others use it.")
@arch_option
@json_option
def profile(as_json: bool, **typed: Any) -> int | None:
    """Measure layers, collectives, memory and host overhead on this machine.

    Under torchrun, collectives are those of all its ranks, over nodes too; the first rank writes FILE.

    Writes FILE whole at the end. When interrupted or out of time, what was measured is kept in FILE.partial,
    from which the same command goes on.
    """
    options = ProfileOptions(**typed)
    joint = join_ranks()
    if joint is None:
        return _profile(options, None, as_json=as_json)
    with joint:
        return attend_ranks(joint) if joint.rank else _profile(options, joint, as_json=as_json)


def _profile(options: ProfileOptions, joint: JointWorld | None, *, as_json: bool) -> int | None:
    """Measures alone or as the first rank; the exit code."""
    from planner.commands.running.profile_session import Terminated, terminable
    from planner.commands.shared.with_torch import require_torch
    from planner.foundation.decode import to_json

    request = read_request(options, joint)
    require_torch("profile")
    scope, begun_s = read_scope(request, options), time.monotonic()
    check_device(request, anyway=options.anyway)
    with _open_session(request, options) as session:
        try:
            with terminable():
                result = session.write(_take(request, scope, session.record, joint))
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
    """Takes the usual profile of one model, with progress on stderr; its layers are measured: no sweeps."""
    from runtime.profiler.scope import Sweeps, default_scope

    request = Request(models=(model,), cluster=cluster, seqs=(seq,), precision=precision)
    scope = default_scope(cluster.devices, (seq,), quick=quick)
    return _take(request, dataclasses.replace(scope, sweeps=Sweeps.NONE))


def _take(
    request: Request, scope: Scope, record: Record | None = None, joint: JointWorld | None = None
) -> Profile:
    from planner.commands.running.profile_progress import ProfileProgress
    from runtime.profiler.profiler import take_profile

    with ProfileProgress() as progress:
        if record is not None and record.kept:
            progress.say(f"going on from the {record.kept} cases in {record.path}")
        return take_profile(
            request.models, request.cluster, request.precision, scope, progress, record, joint
        )


def _open_session(request: Request, options: ProfileOptions) -> ProfileSession:
    """What is measured now is added to. Raises InputError where that is of another device or software."""
    from planner.commands.running.profile_session import begin_session
    from planner.foundation.decode import digest
    from runtime.profiler.profiler import platform_here
    from runtime.profiler.scheduler import RECORD_SCHEMA, Header

    header = Header(
        record_schema=RECORD_SCHEMA,
        stack=platform_here(request.cluster, request.precision),
        quick=options.quick,
        models={model.name: digest(model) for model in request.models},
    )
    return begin_session(options.output, header, replace=options.replace)
