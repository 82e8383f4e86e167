"""Settings as a configuration of Hugging Face Accelerate, and back: one table of keys of its YAML.

Read in Accelerate 1.15 (commands/config/config_args.py, commands/launch.py, parallelism_config.py).
ZeRO 2 and 3 are its FSDP2, ZeRO 0 its DDP, and ZeRO 1 a ds_config.json of DeepSpeed beside it. What a script
or Hugging Face's Trainer says (micro-batch, sequence) has no key there.

A plan for Hugging Face Accelerate: its YAML, the Trainer's arguments, and how ranks are started.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from planner.export import artifact as facts
from planner.export import text_files as shell
from planner.export.artifact import Export, ExportFile
from planner.export.deepspeed import CONFIG_FILE, ds_config, nested
from planner.export.settings import Key, Recipe, Settings, read_back, settings_of, unread, written
from planner.export.text_files import yaml_text
from planner.export.trainer import OPTIMIZERS, trainer_files
from planner.foundation.errors import Problem
from planner.model.attention import CpExchange
from planner.model.workload import Precision
from planner.strategy.estimate import Rejected
from planner.strategy.plan import Plan
from planner.strategy.strategy import Zero

RELEASE = "Accelerate 1.15"
CONFIG = "accelerate/commands/config/config_args.py"
LAUNCH = "accelerate/commands/launch.py"
SIZES = "accelerate/parallelism_config.py"
SHARDED = (Zero.GRADIENTS, Zero.PARAMETERS)
PREFIX = "parallelism_config.parallelism_config_"
"""Keys of the section repeat its name: each becomes the flag of `accelerate launch`."""


def _kind(settings: Settings) -> str:
    if settings.zero in SHARDED:
        return "FSDP"
    if settings.zero is Zero.OPTIMIZER:
        return "DEEPSPEED"
    several = (settings.dp_replicate or 1) > 1
    return "MULTI_GPU" if several else "NO"


def _size(field: str) -> Any:
    """Sizes of the mesh are written for FSDP2 alone: DDP and DeepSpeed take all ranks."""
    return lambda s: (getattr(s, field) or 1) if s.zero in SHARDED else None


def _sharded(value: Any) -> Any:
    return lambda s: value if s.zero in SHARDED else None


KEYS = (
    Key(name="distributed_type", field="zero", source=CONFIG, write=_kind, reads=False),
    Key(
        name="mixed_precision",
        field="precision",
        source=LAUNCH,
        words={Precision.BF16: "bf16", Precision.FP16: "fp16", Precision.FP32: "no"},
    ),
    Key(name="fsdp_config.fsdp_version", field="zero", source=LAUNCH, write=_sharded(2), reads=False),
    Key(
        name="fsdp_config.fsdp_reshard_after_forward",
        field="zero",
        source=LAUNCH,
        words={Zero.GRADIENTS: False, Zero.PARAMETERS: True},
        reads=False,
    ),
    Key(
        name="fsdp_config.fsdp_activation_checkpointing",
        field="recompute",
        source=LAUNCH,
        write=lambda s: (s.recompute is Recipe.FULL) if s.zero in SHARDED else None,
        read=lambda value: Recipe.FULL if value is True else Recipe.NONE,
    ),
    Key(
        name="fsdp_config.fsdp_offload_params",
        field="zero",
        source=LAUNCH,
        write=_sharded(False),
        reads=False,
    ),
    Key(name=f"{PREFIX}dp_replicate_size", field="dp_replicate", source=SIZES, write=_size("dp_replicate")),
    Key(name=f"{PREFIX}dp_shard_size", field="dp_shard", source=SIZES, write=_size("dp_shard")),
    Key(name=f"{PREFIX}tp_size", field="tp", source=SIZES, write=_size("tp")),
    Key(name=f"{PREFIX}cp_size", field="cp", source=SIZES, write=_size("cp")),
    Key(
        name=f"{PREFIX}cp_comm_strategy",
        field="cp_exchange",
        source=LAUNCH,
        words={CpExchange.GATHER: "allgather", CpExchange.RING: "alltoall"},
    ),
)
"""What a plan says, by dotted path."""

FIXED: Mapping[str, Any] = {
    "fsdp_config.fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_config.fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_config.fsdp_cpu_ram_efficient_loading": True,
    "fsdp_config.fsdp_sync_module_states": True,
}
"""Written for FSDP2 beside the table: no choice of the plan."""

INERT = (
    *FIXED,
    "compute_environment",
    "debug",
    "downcast_bf16",
    "enable_cpu_affinity",
    "gpu_ids",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "main_training_function",
    "num_machines",
    "num_processes",
    "rdzv_backend",
    "same_network",
    "tpu_env",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "use_cpu",
    "deepspeed_config.deepspeed_config_file",
    "deepspeed_config.deepspeed_multinode_launcher",
    "deepspeed_config.zero3_init_flag",
    "deepspeed_config.zero3_save_16bit_model",
    "deepspeed_config.gradient_clipping",
    "fsdp_config.fsdp_transformer_layer_cls_to_wrap",
    "fsdp_config.fsdp_use_orig_params",
    "fsdp_config.fsdp_sharding_strategy",
)

INLINE = {
    "deepspeed_config.zero_stage": "zero_optimization.stage",
    "deepspeed_config.gradient_accumulation_steps": "gradient_accumulation_steps",
    "deepspeed_config.offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "deepspeed_config.offload_param_device": "zero_optimization.offload_param.device",
}
"""DeepSpeed's settings that may stand in the YAML itself, and where ds_config.json has them."""

STRATEGIES = {
    "FULL_SHARD": Zero.PARAMETERS,
    "SHARD_GRAD_OP": Zero.GRADIENTS,
    "NO_SHARD": Zero.NONE,
}
"""fsdp_sharding_strategy of FSDP1, and what it shares out."""

OFFLOADS = "fsdp_config.fsdp_offload_params"


def settings_from(
    found: Mapping[str, Any], source: str, problems: list[Problem]
) -> tuple[Settings, tuple[str, ...]]:
    """Settings that the flattened keys of a YAML say, and the keys among them that are not read."""
    kind = str(found.get("distributed_type", "NO"))
    fields = read_back(KEYS, found, source, problems)
    settings = Settings(**fields)
    if kind == "FSDP":
        settings = dataclasses.replace(settings, zero=_fsdp_zero(found, source, problems))
        if found.get(OFFLOADS) is True:
            problems.append(
                Problem(
                    where=f"{source}: {OFFLOADS}",
                    fault="is true: parameters, gradients and optimizer lie in host memory, and a plan "
                    "has a word for the optimizer's state alone.",
                    legal="false",
                )
            )
    elif kind not in ("MULTI_GPU", "NO"):
        problems.append(
            Problem(
                where=f"{source}: distributed_type",
                fault=f"is {kind}, which no plan has a word for.",
                legal="FSDP, DEEPSPEED, MULTI_GPU, NO",
            )
        )
    if settings.cp > 1 and settings.cp_exchange is None:
        settings = dataclasses.replace(settings, cp_exchange=CpExchange.GATHER)
    return settings, unread(_said(found), KEYS, INERT, settings)


def _said(found: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that say something: none that are off."""
    return {name: value for name, value in found.items() if value not in (None, False, "no", "NO", "false")}


def _fsdp_zero(found: Mapping[str, Any], source: str, problems: list[Problem]) -> Zero:
    reshard = found.get("fsdp_config.fsdp_reshard_after_forward", True)
    strategy = found.get("fsdp_config.fsdp_sharding_strategy")
    if str(found.get("fsdp_config.fsdp_version", 1)) == "1" and isinstance(strategy, str):
        reshard = strategy
    if isinstance(reshard, bool):
        return Zero.PARAMETERS if reshard else Zero.GRADIENTS
    if str(reshard) not in STRATEGIES:
        problems.append(
            Problem(
                where=f"{source}: fsdp_config.fsdp_sharding_strategy",
                fault=f"is {reshard}, which no plan has a word for.",
                legal=", ".join(STRATEGIES),
            )
        )
        return Zero.PARAMETERS
    return STRATEGIES[str(reshard)]


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
