"""The options that size and compare share, and the request that they describe."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from planner.commands.shared.options import (
    LORA_HELP,
    LORA_MODULES,
    LORA_ONLY,
    ProblemOptions,
    arch_option,
    json_option,
    prices_option,
)
from planner.commands.shared.overhead_options import upkeep_options

if TYPE_CHECKING:
    from planner.commands.shared.quantities import Reading
    from planner.foundation.errors import Problem
    from planner.hardware.prices import Market
    from planner.job.objective import Goal
    from planner.job.problem import JobOverheads, PlanningProblem
    from planner.model.spec import ModelSpec
    from planner.model.workload import Workload
    from planner.profile.profile import Profile
    from planner.sizing.comparison import Offer, SizingRequest

MOST_DEVICES = 16384
"""Devices of one option, where nobody says how many at most."""
CLOSE = 0.05
"""A batch in tokens is rounded to sequences within this share of it, to the number that halves most often."""
MOST_COUNTS = 50
"""Numbers of nodes of one offer that are compared at most."""

PRICINGS = ("on-demand", "spot", "reserved-1y", "reserved-3y", "on-premises", "yours")


class SizingAsked(NamedTuple):
    """A request and the market that it is asked of."""

    request: SizingRequest
    market: Market


class OnCluster(NamedTuple):
    """A run on a given cluster, its limits, and where its tokens are from where nobody stated them."""

    problem: PlanningProblem
    goal: Goal
    tokens_note: str


def sizing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say what is trained, within which limits, and on which hardware.

    The command is called with `asked` (all values as typed, by name) and `as_json`, then its own options.
    """
    own, before = [*_run_options(), *_goal_options(), *_hardware_options()], _names(command)

    @functools.wraps(command)
    def call(as_json: bool, **values: Any) -> Any:
        kept = {name: values.pop(name) for name in list(values) if name in names}
        return command(asked=kept, as_json=as_json, **values)

    wrapped: Callable[..., Any] = arch_option(prices_option(upkeep_options(call)))
    for option in reversed(own):
        wrapped = option(wrapped)
    names = _names(wrapped) - before
    return json_option(wrapped)


def _names(command: Callable[..., Any]) -> set[str]:
    """The options that a command has so far."""
    return {param.name for param in getattr(command, "__click_params__", [])}


def _run_options() -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--model", required=True, metavar="MODEL",
            help="A catalog name, a config.json or its folder, or a TOML file.",
        ),
        click.option(
            "--seq", type=click.IntRange(min=1), default=4096, show_default=True, metavar="N",
            help="Tokens of one sequence.",
        ),
        click.option(
            "--batch", default="4Mtok", show_default=True, metavar="N",
            help="Sequences in a global step, or its tokens as in 4Mtok: then about as many.",
        ),
        click.option(
            "--tokens", metavar="COUNT",
            help="Tokens of the whole run, such as 2T; with --epochs, of the data. Default: as many as are "
            "compute-optimal for the model, where it is trained from scratch.",
        ),
        click.option(
            "--epochs", type=click.FloatRange(min=0, min_open=True), metavar="N",
            help="How often the --tokens of the data are seen. Default: once.",
        ),
        click.option(
            "--precision", type=click.Choice(["bf16", "fp16", "fp32", "fp8"]),
            help="Format of matrix products. Default: bf16; fp16 where a device has no bf16.",
        ),
        click.option(
            "--optimizer", type=click.Choice(["adamw", "sgd", "adafactor", "muon"]), default="adamw",
            show_default=True, help="The optimizer, whose state is kept in fp32.",
        ),
        click.option(
            "--method", type=click.Choice(["pretrain", "finetune", "lora"]), default="pretrain",
            show_default=True,
            help="Train from scratch, all weights of a given model, or adapters beside them.",
        ),
        click.option(
            "--lora-rank", type=click.IntRange(min=1), metavar="R", help=f"Rank of adapters. {LORA_ONLY}16."
        ),
        click.option(
            "--lora-modules", metavar=LORA_MODULES,
            help=f"Weights that get adapters: {LORA_HELP}. {LORA_ONLY}all.",
        ),
        click.option(
            "--profile", type=click.Path(path_type=Path),
            help="A file that `plan profile` wrote, for its own device. Default: the shipped ones.",
        ),
        click.option("--memory-limit", metavar="SIZE", help="Memory of a device to plan for, such as 72GiB."),
    ]  # fmt: skip


def _goal_options() -> list[Callable[[Any], Any]]:
    return [
        click.option("--deadline", metavar="DAYS", help="The whole run ends within: 30 (days), 30d, 12h."),
        click.option(
            "--budget", metavar="USD", help="The whole run costs at most: 500000, $500,000 or 1.5M."
        ),
        click.option(
            "--objective", type=click.Choice(["cost", "time"]), default="cost", show_default=True,
            help="What the best option has least of.",
        ),
    ]  # fmt: skip


def _hardware_options() -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--device", "devices", multiple=True, metavar="DEVICE",
            help="A device to look at; several with commas, or repeated. Default: all of the catalog.",
        ),
        click.option(
            "--provider", "providers", multiple=True, metavar="PROVIDER",
            help="A provider to look at, or on-premises; several with commas, or repeated. Default: all.",
        ),
        click.option(
            "--instance", "instances", multiple=True, metavar="INSTANCE",
            help="An instance to look at, such as p5.48xlarge; several with commas, or repeated. "
            "Default: all.",
        ),
        click.option(
            "--pricing", "pricings", multiple=True, type=click.Choice(PRICINGS),
            help="A way to pay to look at; repeat for several. Default: all that have a price.",
        ),
        click.option(
            "--nodes", "counts", multiple=True, type=click.IntRange(1, 1_000_000), metavar="N",
            help=f"A number of nodes to try; repeat for several, up to {MOST_COUNTS}. Default: 1, 2, 4 and "
            "so on, and what lies between where a limit asks for it.",
        ),
        click.option(
            "--max-devices", type=click.IntRange(1, 2**20), default=MOST_DEVICES, show_default=True,
            metavar="N",
            help="The most devices of one option.",
        ),
    ]  # fmt: skip


def read_sizing(asked: dict[str, Any], *, least: bool, clusters: tuple[str, ...] = ()) -> SizingAsked:
    """The request that the options describe; `clusters` stand in place of offers by device or provider.

    Raises InputError with every fault.
    """
    from planner.commands.shared.options import open_market
    from planner.commands.shared.quantities import Reading
    from planner.foundation.units import parse_bytes
    from planner.hardware.catalog import load_model
    from planner.hardware.prices import shipped_market
    from planner.model.workload import Precision
    from planner.sizing.comparison import Pricing, SizingRequest
    from planner.sizing.offers import Wanted, find_offers, offers_of_clusters

    reading = Reading()
    model = reading.read(lambda: load_model(asked["model"], arch=asked["arch"]))
    market = reading.read(lambda: open_market(asked["prices"], False))
    goal = reading.read(lambda: _goal(asked))
    wanted = Wanted(
        devices=_each_of(asked["devices"]),
        providers=_each_of(asked["providers"]),
        instances=_each_of(asked["instances"]),
        pricings=tuple(Pricing(name) for name in asked["pricings"]),
    )
    known = market or shipped_market()
    if clusters:
        _no_other_hardware(asked, reading, but=("pricings",))
        offers = reading.read(lambda: offers_of_clusters(known, clusters, wanted.pricings))
    else:
        offers = reading.read(lambda: find_offers(known, wanted))
    limit = asked["memory_limit"]
    limit_bytes = None if limit is None else reading.read(lambda: parse_bytes(limit))
    profile = None if asked["profile"] is None else reading.read(lambda: _profile(asked["profile"], offers))
    workload = reading.read(lambda: _workload(asked, model))
    overheads = reading.read(lambda: _overheads(asked))
    if len(asked["counts"]) > MOST_COUNTS:
        fault = f"{len(asked['counts'])} numbers of nodes are given."
        reading.add("--nodes", fault, legal=f"1 to {MOST_COUNTS}")
    reading.finish()
    assert model is not None and market is not None and workload is not None
    assert offers is not None and goal is not None and overheads is not None
    request = SizingRequest(
        model=model,
        workload=workload.workload,
        offers=offers,
        goal=goal,
        tokens_note=workload.note,
        precision=None if asked["precision"] is None else Precision(asked["precision"]),
        overheads=overheads,
        counts=tuple(sorted(set(asked["counts"]))) or None,
        most_devices=asked["max_devices"],
        least=least,
        thorough=bool(asked["devices"] or asked["providers"] or asked["instances"]),
        memory_limit_bytes=limit_bytes,
        profile=profile,
    )
    return SizingAsked(request, market)


def _profile(path: Path, offers: tuple[Offer, ...] | None) -> Profile:
    """The profile in a file. Raises InputError where it was measured on a device that no offer has."""
    from planner.profile.choose import check_device
    from planner.profile.profile import load_profile

    profile = load_profile(path)
    if offers:
        names = [offer.device.name for offer in offers]
        check_device(profile, names, f"--profile {path}", "what is looked at is made")
    return profile


def _each_of(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The names of an option that is given several times, or once with commas."""
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


def _no_other_hardware(asked: dict[str, Any], reading: Reading, but: tuple[str, ...] = ()) -> None:
    """Keeps a problem for each option that asks for hardware beside --cluster."""
    for name, flag in OFFERED.items():
        if asked[name] and name not in but:
            reading.add(flag, "asks for other hardware than --cluster names.", fix="leave one out")
    if asked["max_devices"] != MOST_DEVICES:
        reading.add("--max-devices", "limits other hardware than --cluster names.", fix="leave one out")


OFFERED = MappingProxyType(
    {
        "devices": "--device",
        "providers": "--provider",
        "instances": "--instance",
        "pricings": "--pricing",
        "counts": "--nodes",
    }
)
"""Options that name hardware, by their name as a value."""


def read_on_cluster(text: str, asked: dict[str, Any]) -> OnCluster:
    """The run as a problem on a given cluster, with the usual overheads. Raises InputError with every
    fault."""
    import dataclasses

    from planner.commands.shared.options import ProblemOptions
    from planner.commands.shared.problem import read_problem
    from planner.commands.shared.quantities import Reading
    from planner.hardware.catalog import load_model
    from planner.sizing.usual_overheads import usual_overheads

    reading = Reading()
    _no_other_hardware(asked, reading)
    goal = reading.read(lambda: _goal(asked))
    model = reading.read(lambda: load_model(asked["model"], arch=asked["arch"]))
    run = reading.read(lambda: _workload(asked, model))
    reading.finish()
    assert goal is not None and run is not None
    known = ProblemOptions.__dataclass_fields__
    values = {name: value for name, value in asked.items() if name in known}
    values |= {"batch": run.workload.batch, "tokens": None}
    problem = read_problem(ProblemOptions(cluster=text, **values)).problem
    overheads = usual_overheads(problem.cluster.devices, _overheads(asked))
    workload = dataclasses.replace(problem.workload, tokens=run.workload.tokens)
    return OnCluster(dataclasses.replace(problem, workload=workload, overheads=overheads), goal, run.note)


def _goal(asked: dict[str, Any]) -> Goal:
    from planner.commands.shared.goal import read_deadline_s, read_usd
    from planner.commands.shared.quantities import Reading
    from planner.job.objective import Goal, Minimise

    reading, deadline, budget = Reading(), asked["deadline"], asked["budget"]
    deadline_s = None if deadline is None else reading.read(lambda: read_deadline_s(deadline))
    budget_usd = None if budget is None else reading.read(lambda: read_usd(budget))
    reading.finish()
    return Goal(minimise=Minimise(asked["objective"]), deadline_s=deadline_s, budget_usd=budget_usd)


class Run(NamedTuple):
    """A workload, and where its tokens are from where nobody stated them."""

    workload: Workload
    note: str


def _workload(asked: dict[str, Any], model: ModelSpec | None) -> Run:
    """The workload. Raises InputError with every fault; without a model, with those that show without it."""
    from planner.commands.shared.options import LORA_RANK
    from planner.commands.shared.quantities import Reading
    from planner.model.lora import module_problems, written
    from planner.model.workload import AdapterModules, Adapters, Method, Optimizer, Precision, Workload

    reading, method = Reading(), Method(asked["method"])
    batch = reading.read(lambda: read_batch(asked["batch"], asked["seq"]))
    tokens = reading.read(lambda: _tokens(asked, model))
    longest = 0 if model is None else min(model.learned_positions, model.max_positions)
    if model is not None and longest and asked["seq"] > longest:
        fault = f"{asked['seq']} is longer than the {longest} learned positions of {model.name}."
        reading.add("--seq", fault, legal=f"1 to {longest}")
    for flag, value in (("--lora-rank", asked["lora_rank"]), ("--lora-modules", asked["lora_modules"])):
        if value is not None and method is not Method.LORA:
            reading.add(flag, f"is given, but --method is {method}.", fix="add --method lora")
    if model is not None and asked["lora_modules"] is not None:
        reading.problems += module_problems(asked["lora_modules"], model)
    reading.finish()
    assert batch is not None and tokens is not None
    adapters = None
    if method is Method.LORA:
        modules = written(asked["lora_modules"] or AdapterModules.ALL)
        adapters = Adapters(rank=asked["lora_rank"] or LORA_RANK, modules=modules)
    return Run(
        Workload(
            seq=asked["seq"],
            batch=batch,
            tokens=tokens[0],
            precision=Precision(asked["precision"] or "bf16"),
            optimizer=Optimizer(asked["optimizer"]),
            method=method,
            adapters=adapters,
        ),
        tokens[1],
    )


def read_batch(text: str, seq: int, flag: str = "--batch") -> int:
    """Sequences of `512`, or of about so many tokens as in `4Mtok`. Raises InputError.

    Tokens are rounded to sequences within CLOSE, to the number that can be halved most often: layouts need
    batches that many ranks share out.
    """
    from planner.commands.shared.quantities import read_count
    from planner.foundation.errors import InputError, Problem

    plain = text.strip().lower().replace(" ", "")
    for ending in ("tokens", "token", "toks", "tok"):
        if plain.endswith(ending):
            asked = read_count(plain.removesuffix(ending), flag, seq, 10**12) / seq
            near = range(max(1, round(asked * (1 - CLOSE))), max(2, int(asked * (1 + CLOSE)) + 1))
            return min(near, key=lambda count: (-(count & -count), abs(count - asked)))
    if plain.replace(".", "", 1).isdigit() and not float(plain).is_integer():
        raise InputError(Problem(where=flag, fault=f"'{text[:40]}' is no whole number of sequences."))
    return read_count(plain, flag, 1, 10**9)


def _tokens(asked: dict[str, Any], model: ModelSpec | None) -> tuple[int, str]:
    """Tokens of the whole run, and where they are from; 0 where that takes a model and there is none."""
    from planner.commands.shared.quantities import read_count
    from planner.foundation.errors import InputError, Problem
    from planner.foundation.units import format_count
    from planner.sizing.scaling import load_laws, optimal_tokens, recommended

    epochs = asked["epochs"]
    if asked["tokens"] is not None:
        tokens = read_count(asked["tokens"], "--tokens", 1, 10**18)
        if epochs is None:
            return tokens, ""
        return max(1, round(tokens * epochs)), f"{format_count(tokens)} of data, {epochs:g} times"
    if epochs is not None or asked["method"] != "pretrain":
        fault = "needs the tokens of the data, which are not known."
        flag = "--epochs" if epochs is not None else f"--method {asked['method']}"
        raise InputError(Problem(where=flag, fault=fault, fix="add --tokens, such as 50M"))
    if model is None:
        return 0, ""
    law = recommended(load_laws())
    tokens = round(optimal_tokens(law, model.params_total))
    return tokens, f"compute-optimal for {format_count(model.params_total)} parameters by {law.title}"


def _overheads(asked: dict[str, Any]) -> JobOverheads:
    from planner.commands.shared.overhead_options import read_overheads
    from planner.foundation.errors import InputError

    problems: list[Problem] = []
    known = ProblemOptions.__dataclass_fields__
    values = {name: value for name, value in asked.items() if name in known and name != "batch"}
    overheads = read_overheads(ProblemOptions(cluster="", batch=1, **values), problems, completed=True)
    if problems:
        raise InputError(*problems)
    return overheads
