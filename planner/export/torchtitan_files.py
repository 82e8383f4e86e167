"""A plan for torchtitan: the job's TOML, its model where that is no flavour of its own, and a script."""

from __future__ import annotations

from typing import Any

from planner.export import facts, shell
from planner.export.artifact import Export, ExportFile
from planner.export.key import written
from planner.export.megatron_files import steps_of
from planner.export.settings import Recipe, Settings, settings_of
from planner.export.torchtitan import FIXED, FLOAT8, KEYS, toml_text
from planner.model.workload import Precision
from planner.strategy.engines.torchtitan import RELEASE
from planner.strategy.engines.torchtitan_model import MODULE, Flavor, flavor_of
from planner.strategy.plan import Plan
from planner.strategy.strategy import Schedule

SCRIPT = "torchtitan.sh"
JOB = "job.toml"


def export_torchtitan(plan: Plan) -> Export:
    """The job, the module of its model where needed, and what is left to torchtitan."""
    settings = settings_of(plan.strategy, plan.workload, (Recipe.EVERY,))
    flavor = flavor_of(plan.model)
    assert isinstance(flavor, Flavor)
    files = [
        ExportFile(name=JOB, text=_job(plan, settings, flavor)),
        ExportFile(name=SCRIPT, text=_script(plan)),
    ]
    if flavor.module is not None:
        files.append(ExportFile(name=f"{MODULE}.py", text=flavor.module))
    return Export(
        target="torchtitan",
        release=RELEASE,
        files=tuple(files),
        start=f"./{SCRIPT}",
        decides=(*_turned(flavor), *_decides(plan, settings), *facts.node_order(plan)),
        yours=(
            "data and tokenizer (training.dataset, model.hf_assets_path), learning rate, checkpoints",
            *facts.priced_elsewhere(plan, "torchtitan"),
        ),
    )


def _job(plan: Plan, settings: Settings, flavor: Flavor) -> str:
    fp8 = settings.precision is Precision.FP8
    flat: dict[str, Any] = {
        "job.dump_folder": "./outputs",
        "job.description": plan.model.name,
        "model.name": flavor.name,
        "model.flavor": flavor.flavor,
        **written(KEYS, settings),
        "training.steps": steps_of(plan),
        "training.max_norm": 1.0,
        "training.dataset": "c4",
        "optimizer.lr": 3e-4,
        **{name: value for name, value in FIXED.items() if fp8 or not name.startswith(FLOAT8)},
    }
    if flavor.module is not None:
        flat["experimental.custom_import"] = MODULE
    return facts.comment([f"For {RELEASE}.", *facts.predictions(plan)]) + "\n" + toml_text(flat)


def _turned(flavor: Flavor) -> tuple[str, ...]:
    if not flavor.turns:
        return ()
    return (f"flavour {flavor.flavor} of {flavor.name} has its own rotary frequencies: {flavor.turns}",)


def _decides(plan: Plan, settings: Settings) -> tuple[str, ...]:
    said = [
        "blocks, embedding and head are gathered and reduced each on its own; the last pair stays gathered",
        "compile is off, as the figures have it; compile.enable = true is faster",
    ]
    if plan.model.experts:
        said.append("experts' products are one grouped product, and their balance is a bias without a loss")
    if settings.schedule is Schedule.DUALPIPEV:
        said.append("expert messages do not overlap with another micro-batch's products, as not priced")
    if settings.precision is Precision.FP8:
        said.append("fp8 scales whole tensors; the head stays in bf16")
    return tuple(said)


def _script(plan: Plan) -> str:
    return "\n".join(
        [
            shell.head(facts.comment([f"For {RELEASE}.", *facts.predictions(plan)])),
            'HERE="$(cd "$(dirname "$0")" && pwd)"',
            'export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"',
            shell.node_variables(plan),
            f'exec {shell.torchrun()} \\\n  -m torchtitan.train --job.config_file "$HERE/{JOB}" '
            '${EXTRA_ARGS:-} "$@"',
            "",
        ]
    )
