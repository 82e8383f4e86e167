"""A plan for Hugging Face Accelerate: its YAML, the Trainer's arguments, and how ranks are started."""

from __future__ import annotations

import json
from typing import Any

from planner.export import facts, shell
from planner.export.accelerate import FIXED, KEYS, RELEASE, SHARDED
from planner.export.artifact import Export, ExportFile
from planner.export.deepspeed import nested
from planner.export.deepspeed_files import CONFIG_FILE, ds_config
from planner.export.key import written
from planner.export.settings import Recipe, Settings, settings_of
from planner.export.trainer import OPTIMIZERS, trainer_files
from planner.export.yaml_text import yaml_text
from planner.model.attention import CpExchange
from planner.model.workload import Precision
from planner.strategy.estimate import Rejected
from planner.strategy.plan import Plan
from planner.strategy.strategy import Zero

SCRIPT = "accelerate.sh"
YAML = "accelerate.yaml"
OTHERS = "another engine: --to deepspeed, megatron or torchtitan"


def accelerate_refusals(plan: Plan) -> list[Rejected]:
    """What Accelerate with Hugging Face's Trainer cannot run, each a rule with what it would take."""
    return [
        Rejected(rule=rule, detail=detail, legal=legal, fix=OTHERS)
        for (rule, detail, legal), holds in {**_axes(plan), **_rest(plan)}.items()
        if holds
    ]


Faults = dict[tuple[str, str, str], bool]
"""Rule, what is wrong, what would be legal; and whether it is so."""


def _axes(plan: Plan) -> Faults:
    """Degrees that Accelerate's mesh has no place for."""
    degrees, zero = plan.strategy.degrees, plan.strategy.degrees.zero
    return {
        ("accelerate_pipeline", f"pp={degrees.pp}: Accelerate trains without a pipeline.", "pp=1"): degrees.pp
        > 1,
        ("accelerate_experts", f"ep={degrees.ep}: Accelerate shares out no experts.", "ep=1"): degrees.ep > 1,
        (
            "accelerate_tensor",
            f"tp={degrees.tp} with zero={int(zero)}: Accelerate's mesh wants FSDP2 beside it.",
            "zero=2 or 3 over two or more ranks, or tp=1",
        ): degrees.tp > 1 and zero not in SHARDED,
        (
            "accelerate_sequence_parallel",
            "sequence_parallel=true: Transformers' tensor parallelism keeps the sequence whole.",
            "sequence_parallel=false",
        ): degrees.sequence_parallel,
        (
            "accelerate_context",
            f"cp={degrees.cp} by {degrees.cp_exchange} with zero={int(zero)}: Accelerate's context "
            "parallelism is torch's, beside FSDP2.",
            "cp_exchange=gather or ring with zero=2 or 3, or cp=1",
        ): degrees.cp > 1 and (degrees.cp_exchange is CpExchange.ALL_TO_ALL or zero not in SHARDED),
        (
            "accelerate_replicas",
            f"zero={int(zero)} over {degrees.dp_shard} of dp={degrees.dp} ranks: FSDP2 alone has replicas.",
            f"zero=2 or 3, or dp_shard={degrees.dp}",
        ): zero is Zero.OPTIMIZER and degrees.dp_replicate > 1,
    }


def _rest(plan: Plan) -> Faults:
    """Devices, recipes, what is offloaded, and what is trained."""
    settings, zero = settings_of(plan.strategy, plan.workload), plan.strategy.degrees.zero
    return {
        (
            "accelerate_device",
            f"zero={int(zero)} on a CPU: Accelerate's FSDP2 wants an accelerator.",
            "zero=0 or 1",
        ): zero in SHARDED and plan.cluster.groups[0].device.name == "cpu",
        (
            "accelerate_recompute",
            "blocks recompute by other recipes than none or full.",
            "recompute=none or full",
        ): settings.recompute not in (Recipe.NONE, Recipe.FULL),
        (
            "accelerate_offload",
            f"offload={'+'.join(plan.strategy.offloads)} with zero={int(zero)}: FSDP2 moves parameters, "
            "gradients and optimizer together, or nothing.",
            "offload=none, or offload=optimizer with zero=1",
        ): bool(plan.strategy.offloads) and zero is not Zero.OPTIMIZER,
        (
            "accelerate_precision",
            "precision=fp8: a configuration of its own (fp8_config) that a plan does not say.",
            "--precision bf16, fp16 or fp32",
        ): plan.workload.precision is Precision.FP8,
        (
            "accelerate_optimizer",
            f"{plan.workload.optimizer}: no `optim` of Hugging Face's Trainer.",
            f"--optimizer {', '.join(OPTIMIZERS)}",
        ): plan.workload.optimizer not in OPTIMIZERS,
    }


def export_accelerate(plan: Plan) -> Export:
    """The YAML, the Trainer's arguments, and ds_config.json where ZeRO 1 needs it."""
    settings = settings_of(plan.strategy, plan.workload)
    deepspeed = settings.zero is Zero.OPTIMIZER
    files = [
        ExportFile(name=YAML, text=_yaml(plan, settings)),
        ExportFile(name=SCRIPT, text=_script(plan)),
        *trainer_files(
            plan,
            deepspeed=CONFIG_FILE if deepspeed else None,
            full_by_fsdp=settings.zero in SHARDED,
        ),
    ]
    if deepspeed:
        files.append(ExportFile(name=CONFIG_FILE, text=json.dumps(ds_config(plan), indent=1) + "\n"))
    return Export(
        target="accelerate",
        release=RELEASE,
        files=tuple(files),
        start=f"TRAIN_SCRIPT=train.py ./{SCRIPT}",
        decides=(*_decides(settings), *facts.node_order(plan)),
        yours=(
            "micro-batch and accumulation: training_args.json, by HfArgumentParser or in your loop",
            f"sequences of {plan.workload.seq} tokens, data, learning rate, checkpoints",
            *facts.priced_elsewhere(plan, "deepspeed" if deepspeed else "native"),
        ),
    )


def _decides(settings: Settings) -> tuple[str, ...]:
    said = []
    if settings.zero in SHARDED:
        said.append("FSDP2 wraps the classes that the model names (_no_split_modules), as blocks are")
        said.append(
            "gradients are reduced after every micro-batch (sync_each_batch), so that they stay shards"
        )
    if settings.zero is Zero.NONE:
        said.append("DDP: buckets of 25 MB, reduced behind the backward pass")
    if settings.tp > 1:
        said.append("which weights are split: the model's own plan (tp_plan='auto')")
    said.append("Transformers' modules: norms, rotary and loss are operators of their own, not fused ones")
    return tuple(said)


def _yaml(plan: Plan, settings: Settings) -> str:
    sharded = settings.zero in SHARDED
    nodes = sum(group.nodes for group in plan.cluster.groups)
    flat: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        **written(KEYS, settings),
        **(FIXED if sharded else {}),
        "num_machines": nodes,
        "num_processes": plan.cluster.devices,
        "machine_rank": 0,
        "rdzv_backend": "static",
        "main_training_function": "main",
        "use_cpu": False,
    }
    if settings.zero is Zero.OPTIMIZER:
        flat |= {
            "deepspeed_config.deepspeed_config_file": CONFIG_FILE,
            "deepspeed_config.deepspeed_multinode_launcher": "standard",
            "deepspeed_config.zero3_init_flag": False,
        }
        flat.pop("mixed_precision", None)  # accelerate refuses it beside a DeepSpeed file
    return facts.comment([f"For {RELEASE}.", *facts.predictions(plan)]) + yaml_text(nested(flat))


def _script(plan: Plan) -> str:
    """`accelerate launch` with this node's place, which the YAML cannot know."""
    cpu = plan.cluster.groups[0].device.name == "cpu"
    # On a CPU `use_cpu` starts one process; ranks of torchrun that may use no GPU are what is meant.
    variable = "export ACCELERATE_USE_CPU=true\n" if cpu else ""
    return "\n".join(
        [
            shell.head(facts.comment([f"For {RELEASE}.", *facts.predictions(plan)])),
            'TRAIN_SCRIPT="${TRAIN_SCRIPT:?the script that trains, with accelerate or the Trainer}"',
            'cd "$(dirname "$0")"\n' + variable,
            shell.node_variables(plan),
            f'exec accelerate launch --config_file {YAML} --machine_rank "$NODE_RANK" \\\n'
            '  --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \\\n'
            '  "$TRAIN_SCRIPT" ${EXTRA_ARGS:-} "$@"',
            "",
        ]
    )
