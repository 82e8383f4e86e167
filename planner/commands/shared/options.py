"""The options that estimate, solve, demo and others share, and the problem that they describe."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

if TYPE_CHECKING:
    from planner.foundation.errors import Problem
    from planner.hardware.cluster import ClusterSpec
    from planner.hardware.prices import Market
    from planner.job.problem import JobOverheads
    from planner.model.spec import ModelSpec
    from planner.model.workload import Adapters, Precision, Workload

Command = TypeVar("Command", bound=Callable[..., Any])

CLUSTER_HELP = (
    "NODESxGPUS:DEVICE[@NETWORK], COUNT*INSTANCE, several of these joined with +, "
    "local, local:N, or a TOML file."
)

LORA_ONLY = "With --method lora only; default: "
LORA_MODULES = "qv|qkv|attention|all|NAME,..."
LORA_HELP = (
    "those of query and value (and key), of attention, all linear layers but routers and experts, or modules "
    "by name (q_proj, o_proj, gate_proj; q_a_proj, kv_b_proj of latent attention)"
)
LORA_RANK = 16
"""Rank of adapters where none is asked for, as in the published LoRA and QLoRA fine-tunings of 7B to 70B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemOptions:
    """The common options as typed; `load_problem` reads what they name."""

    model: str
    cluster: str
    seq: int
    batch: int
    tokens: str | None
    precision: str | None
    optimizer: str
    method: str
    profile: Path | None
    memory_limit: str | None
    prices: Path | None = None
    on_premises: bool = False
    arch: str | None = None
    lora_rank: int | None = None
    lora_modules: str | None = None
    data_rate: str | None = None
    checkpoint_every: str | None = None
    storage: str | None = None
    checkpoint_async: bool = False
    device_spread: float | None = None
    failures: float | None = None
    restart: str | None = None
    repair: str | None = None
    spares: int | None = None
    preemptions: str | None = None
    preemption_notice: str | None = None
    preemption_restart: str | None = None
    ramp_up: str | None = None
    eval_every: int | None = None
    eval_time: str | None = None
    engine: str | None = None


class ProblemInputs(NamedTuple):
    """What the common options name, read and checked."""

    model: ModelSpec
    workload: Workload
    cluster: ClusterSpec
    profile: Path | None
    memory_limit_bytes: int | None
    overheads: JobOverheads


def json_option(command: Command) -> Command:
    """Adds `--json`, passed as `as_json`: one JSON document on stdout and nothing else there."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def arch_option(command: Command) -> Command:
    """Adds `--arch`, passed as `arch`."""
    return click.option(
        "--arch",
        metavar="NAME",
        help="Read the model's config as this architecture, whatever it says of itself. Its code is not run.",
    )(command)


def prices_option(command: Command) -> Command:
    """Adds `--prices`, passed as `prices`."""
    return click.option(
        "--prices",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A TOML file with prices of your own, which win over all others. "
        "Default: the file that SHARDWISE_PRICES names, if any.",
    )(command)


def on_premises_option(command: Command) -> Command:
    """Adds `--on-premises`, passed as `on_premises`."""
    return click.option(
        "--on-premises",
        is_flag=True,
        help="Price devices that are named without an instance by what they cost on one's own premises.",
    )(command)


def open_market(prices: Path | None, on_premises: bool, cluster: str | None = None) -> Market:
    """The market for a cluster text, of no instances where it names none; of all where there is no text."""
    from planner.hardware.prices import read_market

    live = cluster is None or "*" in cluster or cluster.endswith(".toml")
    return read_market(prices, on_premises, live)


def warn_of(market: Market, names: str | None = None) -> None:
    """Writes to stderr what was left out of SkyPilot's catalogs, for the providers in `names` or for all."""
    for warning in market.warnings:
        if names is None or f"{warning.provider}/" in names:
            click.echo(f"warning: {warning.text}", err=True)


def _cluster_option(command: Command) -> Command:
    return click.option("--cluster", required=True, metavar="CLUSTER", help=CLUSTER_HELP)(command)


def _job_options() -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--model",
            required=True,
            metavar="MODEL",
            help="A catalog name, a config.json or its folder, or a TOML file.",
        ),
        _cluster_option,
        click.option(
            "--seq", required=True, type=click.IntRange(min=1), help="Tokens of one sequence.", metavar="N"
        ),
        click.option(
            "--batch",
            required=True,
            type=click.IntRange(min=1),
            metavar="N",
            help="Sequences in a global step.",
        ),
        click.option("--tokens", metavar="COUNT", help="Tokens of the whole run, such as 300B."),
        click.option(
            "--precision",
            type=click.Choice(["bf16", "fp16", "fp32", "fp8"]),
            help="Format of matrix products. Default: bf16; fp16 where the device has no bf16; "
            "fp32 on a CPU.",
        ),
        click.option(
            "--optimizer",
            type=click.Choice(["adamw", "sgd", "adafactor", "muon"]),
            default="adamw",
            show_default=True,
            help="The optimizer, whose state is kept in fp32.",
        ),
        click.option(
            "--method",
            type=click.Choice(["pretrain", "finetune", "lora"]),
            default="pretrain",
            show_default=True,
            help="Train from scratch, all weights of a given model, or adapters beside them.",
        ),
        click.option(
            "--lora-rank", type=click.IntRange(min=1), metavar="R", help=f"Rank of adapters. {LORA_ONLY}16."
        ),
        click.option(
            "--lora-modules",
            metavar=LORA_MODULES,
            help=f"Weights that get adapters: {LORA_HELP}. {LORA_ONLY}all.",
        ),
    ]


def _device_options() -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--profile",
            type=click.Path(path_type=Path),
            help="A file that `plan profile` wrote. Default: the shipped profile that fits best.",
        ),
        click.option("--memory-limit", metavar="SIZE", help="Memory of a device to plan for, such as 72GiB."),
    ]


def _options() -> list[Callable[[Any], Any]]:
    return [
        *_job_options(),
        *_device_options(),
        click.option(
            "--engine",
            type=click.Choice(["any", "native", "torchtitan", "megatron", "deepspeed"]),
            help="Plan only what this training engine can run, and price its own software. Default: any "
            "strategy, priced as the native runtime; on this machine, solve keeps to what train runs.",
        ),
    ]


def problem_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the common options and `--json` to a command.

    The command is called with `options` (ProblemOptions) and `as_json` (bool), then its own options.
    """
    names = [str(name) for name in ProblemOptions.__dataclass_fields__]

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        options = ProblemOptions(**{name: values.pop(name) for name in names})
        return command(options=options, **values)

    from planner.commands.shared.overhead_options import upkeep_options

    wrapped: Callable[..., Any] = arch_option(prices_option(on_premises_option(call)))
    for option in reversed(_options()):
        wrapped = option(wrapped)
    return json_option(upkeep_options(wrapped))


JOB = {"model", "seq", "batch", "tokens", "precision", "optimizer", "method", "arch", "engine"}
JOB |= {"lora_rank", "lora_modules"}
"""Fields of ProblemOptions that say what is trained; the others say where, and what goes on around it."""


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the common options but those of the job, and `--json`, to a command that has a job already.

    The command is called with `place`, their values by their fields of ProblemOptions, and `as_json`.
    """
    names = [str(name) for name in ProblemOptions.__dataclass_fields__ if name not in JOB]

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        return command(place={name: values.pop(name) for name in names}, **values)

    from planner.commands.shared.overhead_options import upkeep_options

    wrapped: Callable[..., Any] = prices_option(on_premises_option(call))
    for option in reversed([_cluster_option, *_device_options()]):
        wrapped = option(wrapped)
    return json_option(upkeep_options(wrapped))


def load_problem(options: ProblemOptions) -> ProblemInputs:
    """Reads the model, cluster and units that the options name. Raises InputError with every fault."""
    from planner.foundation.errors import InputError
    from planner.foundation.units import parse_count
    from planner.hardware.catalog import load_model
    from planner.model.workload import Method, Optimizer, Workload

    problems: list[Problem] = []
    read = _reader(problems)
    model: ModelSpec | None = read(lambda text: load_model(text, arch=options.arch), options.model)
    tokens: int | None = read(parse_count, options.tokens)
    place = read_place(options, problems)
    problems.extend(_faults(options, model, tokens))
    cluster, limit, overheads = place
    if problems or model is None or cluster is None:
        raise InputError(*problems)
    workload = Workload(
        seq=options.seq,
        batch=options.batch,
        tokens=tokens,
        precision=chosen_precision(options.precision, cluster),
        optimizer=Optimizer(options.optimizer),
        method=Method(options.method),
        adapters=_adapters(options),
    )
    return ProblemInputs(model, workload, cluster, options.profile, limit, overheads)


class Place(NamedTuple):
    """Where it runs: the cluster, None where it cannot be read, a stated memory limit, and the overheads."""

    cluster: ClusterSpec | None
    memory_limit_bytes: int | None
    overheads: JobOverheads


def read_place(options: ProblemOptions, problems: list[Problem]) -> Place:
    """What the options say besides the model and the workload; faults are added to `problems`."""
    from planner.commands.shared.overhead_options import read_overheads
    from planner.foundation.decode import read_text
    from planner.foundation.errors import Problem
    from planner.foundation.units import parse_bytes
    from planner.hardware.cluster_text import parse_cluster

    read = _reader(problems)
    market: Market | None = read(
        lambda text: open_market(options.prices, options.on_premises, text), options.cluster
    )
    cluster: ClusterSpec | None = read(lambda text: parse_cluster(text, market=market), options.cluster)
    if market is not None and cluster is not None:
        warn_of(market, cluster.name)
    limit: int | None = read(parse_bytes, options.memory_limit)
    if limit is not None and limit < 1:
        problems.append(
            Problem(where="--memory-limit", fault=f"'{options.memory_limit}' is no memory at all.")
        )
    read(lambda path: read_text(Path(path)), None if options.profile is None else str(options.profile))
    overheads = read_overheads(options, problems)
    problems.extend(_unsupported(options.precision, cluster))
    return Place(cluster, limit, overheads)


def _reader(problems: list[Problem]) -> Callable[[Callable[[str], Any], str | None], Any]:
    """Reads a text where there is one; faults are added to `problems`, and None comes back."""
    from planner.foundation.errors import InputError

    def read(function: Callable[[str], Any], text: str | None) -> Any:
        try:
            return None if text is None else function(text)
        except InputError as error:
            problems.extend(error.problems)
            return None

    return read


def _adapters(options: ProblemOptions) -> Adapters | None:
    from planner.model.lora import written
    from planner.model.workload import AdapterModules, Adapters

    if options.method != "lora":
        return None
    return Adapters(
        rank=options.lora_rank or LORA_RANK, modules=written(options.lora_modules or AdapterModules.ALL)
    )


def _faults(options: ProblemOptions, model: ModelSpec | None, tokens: int | None) -> list[Problem]:
    """Problems of the options that only show once they are read."""
    from planner.foundation.errors import Problem
    from planner.model.lora import module_problems

    found: list[Problem] = []
    for flag, value in (("--lora-rank", options.lora_rank), ("--lora-modules", options.lora_modules)):
        if value is not None and options.method != "lora":
            fault = f"is given, but --method is {options.method}, which trains no adapters."
            found.append(Problem(where=flag, fault=fault, fix="add --method lora"))
    if model is not None and options.lora_modules is not None:
        found += module_problems(options.lora_modules, model)
    longest = min(model.learned_positions, model.max_positions) if model is not None else 0
    if model is not None and longest and options.seq > longest:
        fault = f"{options.seq} is longer than the {longest} learned positions of {model.name}."
        found.append(Problem(where="--seq", fault=fault, legal=f"1 to {longest}"))
    if tokens is not None and tokens < 1:
        found.append(Problem(where="--tokens", fault=f"'{options.tokens}' is no token at all."))
    return found


def _unsupported(precision: str | None, cluster: ClusterSpec | None) -> list[Problem]:
    """fp8 needs a device that multiplies it: no other format has its rate."""
    from planner.foundation.errors import Problem

    if precision != "fp8" or cluster is None:
        return []
    return [
        Problem(
            where="--precision",
            fault=f"is fp8, and no fp8 peak of {title} is known.",
            legal="bf16, fp16, fp32",
        )
        for title in dict.fromkeys(g.device.title for g in cluster.groups if g.device.peak_fp8_flops is None)
    ]


def chosen_precision(text: str | None, cluster: ClusterSpec) -> Precision:
    """The precision asked for; by default the narrowest that every device of the cluster is made for."""
    from planner.model.workload import Precision

    if text is not None:
        return Precision(text)
    usual = {group.device.usual_precision for group in cluster.groups}
    return next(each for each in (Precision.FP32, Precision.FP16, Precision.BF16) if each in usual)
