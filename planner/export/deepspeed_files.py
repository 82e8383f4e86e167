"""A plan for DeepSpeed: ds_config.json, arguments of Hugging Face's Trainer, and how ranks are started."""

from __future__ import annotations

import json
from typing import Any

from planner.export import facts, shell
from planner.export.artifact import Export, ExportFile
from planner.export.deepspeed import BUCKET, KEYS, nested
from planner.export.key import written
from planner.export.settings import Recipe, Settings, settings_of
from planner.export.trainer import trainer_files
from planner.model.workload import Optimizer, Precision
from planner.strategy.engines.deepspeed import RELEASE
from planner.strategy.plan import Plan
from planner.strategy.strategy import Zero

SCRIPT = "deepspeed.sh"
CONFIG_FILE = "ds_config.json"


def export_deepspeed(plan: Plan) -> Export:
    """The configuration, the Trainer's arguments where it is the road, and what is left to DeepSpeed."""
    settings = settings_of(plan.strategy, plan.workload)
    pipeline = settings.pp > 1
    files = [
        ExportFile(name=CONFIG_FILE, text=json.dumps(ds_config(plan), indent=1) + "\n"),
        ExportFile(name=SCRIPT, text=_script(plan)),
        ExportFile(name="hostfile", text=_hostfile(plan)),
    ]
    if not pipeline:
        files += trainer_files(plan, deepspeed=CONFIG_FILE)
    return Export(
        target="deepspeed",
        release=RELEASE,
        files=tuple(files),
        start=f"TRAIN_SCRIPT=train.py ./{SCRIPT}, or deepspeed --hostfile hostfile train.py --deepspeed "
        f"{CONFIG_FILE}",
        decides=(*_decides(settings), *facts.node_order(plan)),
        yours=(*_yours(plan, settings), *facts.priced_elsewhere(plan, "deepspeed")),
    )


def ds_config(plan: Plan) -> dict[str, Any]:
    """The document of ds_config.json."""
    settings = settings_of(plan.strategy, plan.workload)
    flat = written(KEYS, settings)
    flat |= {"gradient_clipping": 1.0, **_optimizer_params(plan.workload.optimizer)}
    return nested(flat)


def _optimizer_params(optimizer: Optimizer) -> dict[str, Any]:
    """Rates that are not the plan's, as Hugging Face's Trainer and scripts expect them."""
    params: dict[str, Any] = {"optimizer.params.lr": 3e-4, "optimizer.params.weight_decay": 0.1}
    if optimizer is Optimizer.ADAMW:
        params |= {"optimizer.params.betas": [0.9, 0.95], "optimizer.params.eps": 1e-8}
    if optimizer in (Optimizer.SGD, Optimizer.MUON):
        params["optimizer.params.momentum"] = 0.9 if optimizer is Optimizer.SGD else 0.95
    if optimizer in (Optimizer.SGD, Optimizer.ADAFACTOR):
        params["zero_allow_untested_optimizer"] = True
    return params


def _decides(settings: Settings) -> tuple[str, ...]:
    said = [f"buckets of {BUCKET:,} elements for gradients, beside what the plan's memory counts"]
    if settings.zero is Zero.PARAMETERS:
        said.append(
            "which parameters stay gathered (stage3_param_persistence_threshold) and are fetched early"
        )
    if settings.pp > 1:
        said.append("which blocks of a stage: the number is the plan's where stages divide evenly")
    if settings.precision is Precision.BF16 and settings.zero is Zero.NONE:
        said.append("bf16 without ZeRO keeps fp32 masters and sums gradients in fp32 (BF16_Optimizer)")
    return tuple(said)


def _yours(plan: Plan, settings: Settings) -> tuple[str, ...]:
    said = [
        "learning rate, weight decay and betas in optimizer.params; data; checkpoints",
        "names of your nodes in hostfile, which only the launcher `deepspeed` reads",
    ]
    if settings.pp > 1:
        interval = int(settings.recompute is Recipe.FULL)
        said.append(
            f"PipelineModule(layers, num_stages={settings.pp}, partition_method='type:TransformerBlock', "
            f"activation_checkpoint_interval={interval}) in your script, with your block's class name"
            + (
                f", and PipeModelDataParallelTopology(num_pp={settings.pp}, num_mp={settings.tp}, "
                f"num_dp={plan.strategy.degrees.dp}), since its tensor parallelism is your model's own"
                if settings.tp > 1
                else ""
            )
        )
    elif settings.recompute is Recipe.FULL:
        said.append("gradient checkpointing of every block: gradient_checkpointing of training_args.json")
    if settings.cp > 1:
        said.append(
            "Ulysses: attention wrapped by DistributedAttention, or the Trainer's by UlyssesSPAttentionHF"
        )
    if plan.strategy.degrees.ep > 1:
        said.append(
            "expert_parallel replaces the experts of Transformers models that DeepSpeed knows; for others "
            "build deepspeed.moe.layer.MoE(ep_size=...) in your script"
        )
    return tuple(said)


def _hostfile(plan: Plan) -> str:
    nodes = sum(group.nodes for group in plan.cluster.groups)
    slots = plan.cluster.devices_per_node
    return "".join(f"node{index} slots={slots}\n" for index in range(nodes))


def _script(plan: Plan) -> str:
    return "\n".join(
        [
            shell.head(facts.comment([f"For {RELEASE}.", *facts.predictions(plan)])),
            'TRAIN_SCRIPT="${TRAIN_SCRIPT:?the script that trains, which takes --deepspeed FILE}"',
            'HERE="$(cd "$(dirname "$0")" && pwd)"',
            shell.node_variables(plan),
            f'exec {shell.torchrun()} \\\n  "$TRAIN_SCRIPT" --deepspeed "$HERE/{CONFIG_FILE}" '
            '${EXTRA_ARGS:-} "$@"',
            "",
        ]
    )
