"""Exported files read by the engines' own parsers, and back into the same strategies.

    python -m bench.export [--python PYTHON ...] [--keep DIR]

Every plan of bench/export_grid.py is exported. Each folder is loaded by the engine where one of the
interpreters has it: DeepSpeedConfig; Megatron Core's configurations; torchtitan's ConfigManager, ParallelDims
and the model on the meta device; Accelerate's launcher; Kubeflow's models; SkyPilot's schemas. Scripts are
read by `bash -n`, and `plan import` must give the strategy that was exported. What is not installed is told.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import click

from bench.export_grid import Case, Unexported, cases, plan_of
from planner.commands.shared.text import table
from planner.export.artifact import readme, write_export
from planner.export.imported import read_config
from planner.export.settings import strategy_from
from planner.export.targets import TARGETS
from planner.foundation.errors import Problem
from planner.model.attention import CpExchange
from planner.strategy.plan import Plan
from planner.strategy.strategy import Strategy

CHECK = Path(__file__).with_name("export_check.py")
READ = {
    "deepspeed": "ds_config.json",
    "megatron": "megatron.sh",
    "torchtitan": "job.toml",
    "accelerate": "accelerate.yaml",
}
PARSED = (*READ, "kubernetes", "skypilot")
TIMEOUT_S = 280


class Exported(NamedTuple):
    """A case that was written to a folder."""

    case: Case
    plan: Plan
    folder: Path


@click.command()
@click.option(
    "--python", "pythons", multiple=True, help="An interpreter that has an engine. Default: this one."
)
@click.option("--keep", type=click.Path(path_type=Path), help="Where the exports are written, and stay.")
def main(pythons: tuple[str, ...], keep: Path | None) -> None:
    """Exports the grid and checks it; exit code 1 where something does not hold."""
    with tempfile.TemporaryDirectory() as temporary:
        root = keep or Path(temporary)
        exported, refused = _export_all(root)
        for one in refused:
            click.echo(f"refused: {one.case.name}: {', '.join(one.rules)}")
        faults = _scripts(exported) + _round_trips(exported)
        rows = []
        for target in PARSED:
            mine = [one for one in exported if one.case.to == target]
            rows.append((target, *_parsed(target, mine, pythons or (sys.executable,), faults)))
        click.echo(table(("target", "exports", "read by the engine", "failed", "by"), rows))
        trips = sum(one.case.to in READ for one in exported)
        click.echo(f"{len(exported)} exports, {trips} read back, {len(refused)} refused")
        for fault in faults:
            click.echo(f"FAULT {fault}")
    sys.exit(1 if faults else 0)


def _export_all(root: Path) -> tuple[list[Exported], list[Unexported]]:
    exported, refused = [], []
    for number, case in enumerate(cases()):
        plan = plan_of(case)
        if isinstance(plan, Unexported):
            refused.append(plan)
            continue
        folder = root / f"{number:03}-{case.to}"
        made = TARGETS[case.to].export(plan)
        write_export(made, (*made.files, readme(plan, made)), folder)
        exported.append(Exported(case, plan, folder))
    return exported, refused


def _scripts(exported: list[Exported]) -> list[str]:
    """Scripts that bash cannot read."""
    faults = []
    for one in exported:
        for path in [*one.folder.glob("*.sh"), *one.folder.glob("*.sbatch")]:
            answer = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
            if answer.returncode:
                faults.append(f"{one.case.name}: {path.name}: {answer.stderr.strip()}")
    return faults


def _round_trips(exported: list[Exported]) -> list[str]:
    """Strategies that come back otherwise than they went, or with settings that are not read."""
    faults = []
    for one in exported:
        if one.case.to not in READ:
            continue
        problems: list[Problem] = []
        plan, path = one.plan, one.folder / READ[one.case.to]
        found = read_config(path, one.case.to, plan.model, plan.cluster.devices, problems)
        settings = found.settings
        if settings.micro_batch is None:  # Accelerate's YAML leaves it to the script
            micro = plan.strategy.degrees.micro_batch
            settings = type(settings)(**{**_fields(settings), "micro_batch": micro})
        faults += [f"{one.case.name}: {problem}" for problem in problems]
        faults += [f"{one.case.name}: not read: {name}" for name in found.not_read]
        back = strategy_from(settings, plan.model, plan.workload.batch, plan.cluster.devices, found.engine)
        if _plain(back) != _plain(plan.strategy) and not _said_elsewhere(one, back, plan):
            faults.append(
                f"{one.case.name}: {plan.strategy.degrees.label()} came back as {back.degrees.label()}"
            )
    return faults


def _plain(strategy: Strategy) -> Strategy:
    """A strategy without the exchange of context-parallel ranks that there are none of."""
    degrees = strategy.degrees
    if degrees.cp > 1:
        return strategy
    return dataclasses.replace(strategy, degrees=dataclasses.replace(degrees, cp_exchange=CpExchange.RING))


def _fields(settings: object) -> dict[str, object]:
    return {name: getattr(settings, name) for name in type(settings).__dataclass_fields__}


def _said_elsewhere(one: Exported, back: Strategy, plan: Plan) -> bool:
    """Recomputation of DeepSpeed without a pipeline is the Trainer's gradient_checkpointing."""
    arguments = one.folder / "training_args.json"
    if not arguments.exists() or _plain(back).degrees != _plain(plan.strategy).degrees:
        return False
    full = all(stage.recompute.full == stage.layers for stage in plan.strategy.stages)
    return bool(json.loads(arguments.read_text())["gradient_checkpointing"]) == full


def _counted(results: list[dict[str, Any]], exported: list[Exported]) -> list[str]:
    """Models that the engine builds with other numbers of parameters."""
    found = {result["folder"]: re.search(r"params=(\d+)", str(result["said"])) for result in results}
    return [
        f"{one.case.name}: built with {match[1]} parameters, the plan has {one.plan.model.params_total}"
        for one in exported
        if (match := found.get(str(one.folder))) is not None and int(match[1]) != one.plan.model.params_total
    ]


def _parsed(
    target: str, exported: list[Exported], pythons: tuple[str, ...], faults: list[str]
) -> tuple[int, int, int, str]:
    """How many exports the engine reads, by the first interpreter that has it."""
    entries = [f"{one.folder}={one.plan.cluster.devices}" for one in exported]
    names = {str(one.folder): one.case.name for one in exported}
    for python in pythons:
        answer = subprocess.run(
            [python, str(CHECK), target, *entries], capture_output=True, text=True, timeout=TIMEOUT_S
        )
        lines = [line[7:] for line in answer.stdout.splitlines() if line.startswith("RESULT ")]
        results = [json.loads(line) for line in lines]
        if not results or any(result.get("missing") for result in results):
            continue
        bad = [result for result in results if not result["ok"]]
        faults += [f"{names[result['folder']]}: {result['said']}" for result in bad]
        faults += _counted(results, exported)
        counts: dict[str, int] = defaultdict(int)
        for result in results:
            counts[str(result["said"]).partition(":")[0]] += result["ok"]
        return len(exported), len(results) - len(bad), len(bad), ", ".join(sorted(counts)[:3])
    return len(exported), 0, 0, "not installed"


if __name__ == "__main__":
    main()
