"""Settings as a configuration of Hugging Face Accelerate, and back: one table of keys of its YAML.

Read in Accelerate 1.15 (commands/config/config_args.py, commands/launch.py, parallelism_config.py).
ZeRO 2 and 3 are its FSDP2, ZeRO 0 its DDP, and ZeRO 1 a ds_config.json of DeepSpeed beside it. What a script
or Hugging Face's Trainer says (micro-batch, sequence) has no key there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from planner.export.key import Key, read_back, unread
from planner.export.settings import Recipe, Settings
from planner.foundation.errors import Problem
from planner.model.attention import CpExchange
from planner.model.workload import Precision
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
