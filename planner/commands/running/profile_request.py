"""What `plan profile` is asked for, read and checked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from planner.foundation.errors import InputError, Problem

if TYPE_CHECKING:
    from planner.hardware.cluster import ClusterSpec
    from planner.model.spec import ModelSpec
    from planner.model.workload import Precision
    from runtime.profiler.joint_world import JointWorld
    from runtime.profiler.scope import Scope

STANDARD_MODELS = {
    "cuda": ("llama-3.1-8b", "llama-3.1-70b", "qwen3-30b-a3b"),
    "cpu": ("shardwise-demo", "gpt-2-124m"),
}
"""Measured where no model is named: the shapes that most plans need, for what a device can hold. Dense blocks
of two widths (8B, 70B) and fine-grained experts on an accelerator; on a CPU what is trained there."""

STANDARD_SEQS = {"cuda": (2048, 8192), "cpu": (128, 512)}
"""Tokens of a sequence where none is given: two, so that every length between is interpolated."""

HIGH_LOAD = 0.5
"""Load a core above which a CPU is said to be busy."""


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """The options as typed."""

    models: tuple[str, ...]
    cluster: str
    device: str | None
    seqs: tuple[int, ...]
    precision: str | None
    widths: tuple[int, ...]
    micro_batches: tuple[int, ...]
    cps: tuple[int, ...]
    eps: tuple[int, ...]
    compiled: bool | None
    max_message: str | None
    sweeps: str | None
    quick: bool
    target: float
    time_limit_s: float | None
    output: Path
    replace: bool
    anyway: bool
    arch: str | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for, read and checked."""

    models: tuple[ModelSpec, ...]
    cluster: ClusterSpec
    seqs: tuple[int, ...]
    precision: Precision

    @property
    def on_cuda(self) -> bool:
        """Whether accelerators are measured, else processes on a CPU."""
        return self.cluster.groups[0].device.name != "cpu"


def read_scope(request: Request, options: ProfileOptions) -> Scope:
    """What is measured. Raises InputError for shards into which no model can be split."""
    from runtime.profiler.scope import Sweeps, check_shards, default_scope

    usual = default_scope(
        request.cluster.devices,
        request.seqs,
        quick=options.quick,
        widths=options.widths,
        micro_batches=options.micro_batches,
        largest_bytes=_largest_bytes(request, options),
    )
    compiled = request.on_cuda and not options.quick if options.compiled is None else options.compiled
    scope = dataclasses.replace(
        usual,
        cps=tuple(sorted({1, *options.cps})),
        eps=tuple(sorted({1, *options.eps})),
        compiled=(False, True) if compiled else (False,),
        sweeps=usual.sweeps if options.sweeps is None else Sweeps(options.sweeps),
        target=options.target / 100,
        time_limit_s=options.time_limit_s or usual.time_limit_s,
    )
    check_shards(request.models, scope, widths=options.widths)
    return scope


def read_request(options: ProfileOptions, joint: JointWorld | None = None) -> Request:
    """Reads what the options name. Raises InputError with every fault that shows before measuring."""
    from planner.commands.shared.options import chosen_precision
    from planner.hardware.catalog import load_model
    from planner.hardware.cluster_text import parse_cluster
    from planner.strategy.engines.native import check_executed

    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as for every program that is to see none
    cluster = parse_cluster(_cluster_text(options, joint))
    kind = "cpu" if cluster.groups[0].device.name == "cpu" else "cuda"
    models = tuple(load_model(text, arch=options.arch) for text in options.models or STANDARD_MODELS[kind])
    for model in models:
        check_executed(model, "measure")
    seqs = tuple(sorted(set(options.seqs or STANDARD_SEQS[kind])))
    _check(models, cluster, options, seqs)
    precision = chosen_precision(options.precision, cluster)
    if not options.models:
        names = ", ".join(model.name for model in models)
        click.echo(f"no model is named: measuring layers of {names}, for shapes between theirs", err=True)
    return Request(models=models, cluster=cluster, seqs=seqs, precision=precision)


def _largest_bytes(request: Request, options: ProfileOptions) -> int:
    from planner.foundation.units import format_bytes, parse_bytes
    from runtime.profiler.collectives import CPU_LARGEST_BYTES, SIZES_BYTES

    if options.max_message is None:
        return SIZES_BYTES[-1] if request.on_cuda else CPU_LARGEST_BYTES
    largest_bytes = parse_bytes(options.max_message, "--max-message")
    if not SIZES_BYTES[0] <= largest_bytes <= SIZES_BYTES[-1]:
        legal = f"{format_bytes(SIZES_BYTES[0])} to {format_bytes(SIZES_BYTES[-1])}"
        fault = f"{options.max_message} is no size that is measured."
        raise InputError(Problem(where="--max-message", fault=fault, legal=legal))
    return largest_bytes


def _check(
    models: Sequence[ModelSpec], cluster: ClusterSpec, options: ProfileOptions, seqs: Sequence[int]
) -> None:
    """Raises InputError with everything that would only show after the measurement."""
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
    if options.device == "cuda" and cluster.local and cluster.groups[0].device.name == "cpu":
        problems.append(_no_accelerator())
    if not options.output.resolve().parent.is_dir():
        fault = f"the folder {options.output.parent} does not exist."
        problems.append(Problem(where="-o", fault=fault, fix="make it, or name another file"))
    if problems:
        raise InputError(*problems)


def _cluster_text(options: ProfileOptions, joint: JointWorld | None) -> str:
    """What is asked for; under a launcher, as many devices of this node as it started ranks here."""
    if joint is None:
        return options.cluster
    own = f"local:{joint.world.per_node}"
    if options.cluster not in ("local", own):
        fault = f"is {options.cluster}, and {joint.world.per_node} ranks were started on this node."
        raise InputError(Problem(where="--cluster", fault=fault, legal=f"local, {own}"))
    return own


def _no_accelerator() -> Problem:
    """Why none is seen."""
    from planner.hardware.local_machine import why_none

    fault = f"cuda is asked for, and no accelerator is there: {why_none()}."
    return Problem(where="--device", fault=fault, legal="cpu", fix="see plan doctor")


def check_device(request: Request, *, anyway: bool) -> None:
    """Raises InputError where the devices cannot be measured now: torch is without CUDA, others use them.

    A CPU is never free of others: a high load is remarked on.
    """
    if not request.on_cuda:
        _remark_on_load()
        return
    problems = [*_build_problems(request), *_use_problems(request, anyway=anyway)]
    if problems:
        raise InputError(*problems)


def _build_problems(request: Request) -> list[Problem]:
    import torch

    if torch.version.cuda is not None:
        return []
    title = request.cluster.groups[0].device.title
    fault = f"{title} cannot be measured by torch {torch.__version__}, which is built without CUDA."
    fix = "install a build of torch with CUDA, or measure the CPU by --device cpu"
    return [Problem(where="--device", fault=fault, fix=fix)]


def _use_problems(request: Request, *, anyway: bool) -> list[Problem]:
    from planner.hardware.local_machine import others_at_work

    found = others_at_work(request.cluster.devices)
    if found is None:
        click.echo("nvidia-smi does not say whether others use the device", err=True)
    elif found and anyway:
        click.echo(f"measuring all the same: {'; '.join(found)}", err=True)
    elif found:
        fault = f"is in use, and times would be of two programs at once: {'; '.join(found)}."
        fix = "wait, choose other devices by CUDA_VISIBLE_DEVICES, or measure all the same by --anyway"
        return [Problem(where="--cluster local", fault=fault, fix=fix)]
    return []


def _remark_on_load() -> None:
    from planner.hardware.local_machine import usable_cores

    load, cores = os.getloadavg()[0], usable_cores()
    if load > HIGH_LOAD * cores:
        text = f"the load is {load:.1f} on {cores} cores: others are at work, and times will scatter"
        click.echo(text, err=True)
