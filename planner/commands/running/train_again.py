"""The command line by which a run goes on: `plan train` as its latest launch was told, under another plan."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from planner.hardware.cluster import ClusterSpec
    from planner.strategy.plan import Plan

SET_HERE = {"plan_file", "steps", "run_dir", "resume", "as_json", "backend"}
"""Parameters of `plan train` that are said anew."""
ONCE = {"init_from", "adapters_from", "profile_steps", "memory_snapshot"}
"""Parameters of one launch: a run that goes on has its own weights, but for those beside its adapters."""


def resume_words(
    plan: Plan, plan_file: str, run_dir: Path, steps: str, told: Mapping[str, Any], *, resume: bool
) -> list[str]:
    """The words of the command; `told` are the values of flags by the names of their parameters."""
    import click

    from planner.commands.running.train import train

    words = [*_launcher(plan.cluster), "plan", "train", plan_file]
    words += [*(["--resume"] if resume else []), "--run-dir", str(run_dir), "--steps", steps]
    if told.get("hf_config") is not None:
        words += ["--backend", "transformers"]
    once = ONCE - ({"init_from"} if plan.workload.adapters is not None else set())
    for option in train.params:
        name, value = str(option.name), told.get(str(option.name))
        if not isinstance(option, click.Option) or name in SET_HERE or (resume and name in once):
            continue
        if value is None or value == option.default or value in ([], ()):
            continue
        if isinstance(value, bool):
            words += option.opts[:1] if value else option.secondary_opts[:1]
            continue
        for each in value if isinstance(value, list) else [value]:
            words += [option.opts[0], str(each)]
    return words


def as_typed(words: list[str]) -> str:
    """The words as a shell takes them."""
    return shlex.join(words)


def _launcher(cluster: ClusterSpec) -> list[str]:
    """torchrun where one machine is not enough, to be started on every node."""
    nodes = sum(group.nodes for group in cluster.groups)
    if nodes == 1:
        return []
    return [
        "torchrun",
        "--nnodes",
        str(nodes),
        "--nproc-per-node",
        str(cluster.devices_per_node),
        "--no-python",
    ]


def told_at_launch(options: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """What options.json says, by the names of the parameters of `plan train`. Raises InputError."""
    from planner.foundation.errors import InputError, Problem

    data = options.get("data")
    data = data if isinstance(data, dict) else {}
    columns = data.get("columns")
    columns = columns if isinstance(columns, dict) else {}
    told = {
        **{name: value for name, value in options.items() if name != "data"},
        **{name: value for name, value in data.items() if name != "columns"},
        **{name if name == "train_on" else f"{name}_key": value for name, value in columns.items()},
    }
    problems = [
        Problem(
            where=f"{where}: {name}",
            fault=f"is a {type(value).__name__}.",
            legal="a number, a text, true, false, null or a list of texts",
            fix="remove the file, and name the options of the run by hand",
        )
        for name, value in told.items()
        if not _plain(value)
    ]
    if problems:
        raise InputError(*problems)
    return told


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))
