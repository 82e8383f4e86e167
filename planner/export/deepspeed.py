"""Settings as a configuration of DeepSpeed, and back: one table of keys of ds_config.json.

Read in DeepSpeed 0.19.8: deepspeed/runtime/config.py and what it calls. What is priced is a reduction behind
the backward pass (planner.calibration.software), so overlap_comm is written as that of the stage's
default.

A plan for DeepSpeed: ds_config.json, arguments of Hugging Face's Trainer, and how ranks are started.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from planner.export import artifact as facts
from planner.export import text_files as shell
from planner.export.artifact import Export, ExportFile
from planner.export.settings import Key, Recipe, Settings, read_back, settings_of, unread, whole, written
from planner.export.trainer import trainer_files
from planner.foundation.errors import Problem
from planner.model.attention import CpExchange
from planner.model.workload import Optimizer, Precision
from planner.strategy.engines.deepspeed import RELEASE
from planner.strategy.plan import Plan
from planner.strategy.strategy import Schedule, Zero

CONFIG = "deepspeed/runtime/config.py"
ZERO = "deepspeed/runtime/zero/config.py"
TP = "deepspeed/runtime/tensor_parallel/config.py"
EP = "deepspeed/module_inject/auto_ep_config.py"
BUCKET = 500_000_000
"""Elements of a bucket of gradients, and of gathered parameters: DeepSpeed's default."""

OPTIMIZERS = {
    Optimizer.ADAMW: "AdamW",
    Optimizer.SGD: "SGD",
    Optimizer.ADAFACTOR: "Adafactor",
    Optimizer.MUON: "Muon",
}
"""Names of its optimizers, else of torch.optim's (_configure_basic_optimizer of runtime/engine.py)."""


def _hybrid(settings: Settings) -> int | None:
    return (
        settings.dp_shard if settings.zero is Zero.PARAMETERS and (settings.dp_replicate or 1) > 1 else None
    )


def _accumulation(settings: Settings) -> int | None:
    return settings.num_micro_batches


def _interval(value: Any) -> Recipe:
    return {0: Recipe.NONE, 1: Recipe.FULL}[int(value)]


def _stage(value: Any) -> Zero:
    return Zero(int(value))


def _several(value: int) -> int | None:
    return value if value > 1 else None


KEYS = (
    Key(name="train_batch_size", field="batch", source=CONFIG),
    Key(name="train_micro_batch_size_per_gpu", field="micro_batch", source=CONFIG),
    Key(
        name="gradient_accumulation_steps",
        field="num_micro_batches",
        source=CONFIG,
        write=_accumulation,
        read=whole,
    ),
    Key(
        name="bf16.enabled",
        field="precision",
        source="deepspeed/runtime/precision_config.py",
        words={Precision.BF16: True},
    ),
    Key(
        name="fp16.enabled",
        field="precision",
        source="deepspeed/runtime/precision_config.py",
        words={Precision.FP16: True},
    ),
    Key(name="zero_optimization.stage", field="zero", source=ZERO, write=lambda s: int(s.zero), read=_stage),
    Key(
        name="zero_optimization.overlap_comm",
        field="zero",
        source=ZERO,
        words={Zero.OPTIMIZER: False, Zero.GRADIENTS: False, Zero.PARAMETERS: True},
        reads=False,
        strict=True,
    ),
    Key(
        name="zero_optimization.contiguous_gradients",
        field="zero",
        source=ZERO,
        words=dict.fromkeys((Zero.OPTIMIZER, Zero.GRADIENTS, Zero.PARAMETERS), True),
        reads=False,
        strict=True,
    ),
    Key(
        name="zero_optimization.reduce_scatter",
        field="zero",
        source=ZERO,
        words=dict.fromkeys((Zero.OPTIMIZER, Zero.GRADIENTS), True),
        reads=False,
        strict=True,
    ),
    Key(
        name="zero_optimization.reduce_bucket_size",
        field="zero",
        source=ZERO,
        words=dict.fromkeys((Zero.OPTIMIZER, Zero.GRADIENTS, Zero.PARAMETERS), BUCKET),
        reads=False,
        strict=True,
    ),
    Key(
        name="zero_optimization.allgather_bucket_size",
        field="zero",
        source=ZERO,
        words=dict.fromkeys((Zero.OPTIMIZER, Zero.GRADIENTS), BUCKET),
        reads=False,
        strict=True,
    ),
    Key(
        name="zero_optimization.mics_shard_size",
        field="dp_shard",
        source="deepspeed/runtime/zero/mics.py",
        write=lambda _: None,  # refused since it was removed; 0.16 to 0.18 have it
        read=whole,
    ),
    Key(
        name="zero_optimization.offload_optimizer.device",
        field="offload_optimizer",
        source="deepspeed/runtime/zero/offload_config.py",
        words={True: "cpu"},
    ),
    Key(
        name="zero_optimization.offload_optimizer.pin_memory",
        field="offload_optimizer",
        source="deepspeed/runtime/zero/offload_config.py",
        words={True: True},
        reads=False,
    ),
    Key(
        name="optimizer.type",
        field="optimizer",
        source="deepspeed/runtime/engine.py",
        words=OPTIMIZERS,
    ),
    Key(
        name="tensor_parallel.autotp_size",
        field="tp",
        source=TP,
        write=lambda s: _several(s.tp),
        read=whole,
    ),
    Key(
        name="sequence_parallel_size",
        field="cp",
        source="deepspeed/__init__.py",
        write=lambda s: _several(s.cp),
        read=whole,
    ),
    Key(
        name="data_parallel_size",
        field="cp",
        source="deepspeed/__init__.py",
        write=lambda s: (s.dp_replicate or 1) * (s.dp_shard or 1) if s.cp > 1 else None,
        reads=False,
    ),
    Key(
        name="expert_parallel.enabled",
        field="ep",
        source=EP,
        write=lambda s: True if s.ep > 1 else None,
        reads=False,
    ),
    Key(
        name="expert_parallel.autoep_size",
        field="ep",
        source=EP,
        write=lambda s: _several(s.ep),
        read=whole,
    ),
    Key(
        name="expert_parallel.expert_tensor_parallel_size",
        field="etp",
        source=EP,
        write=lambda s: s.etp,
        read=whole,
    ),
    Key(
        name="pipeline.stages",
        field="pp",
        source=CONFIG,
        write=lambda s: _several(s.pp),
        read=whole,
    ),
    Key(
        name="pipeline.activation_checkpoint_interval",
        field="recompute",
        source="deepspeed/runtime/pipe/engine.py",
        write=lambda s: int(s.recompute is Recipe.FULL) if s.pp > 1 else None,
        read=_interval,
    ),
    Key(
        name="activation_checkpointing.cpu_checkpointing",
        field="offload_activations",
        source="deepspeed/runtime/activation_checkpointing/config.py",
        write=lambda s: True if s.offload_activations else None,
        read=lambda value: -1 if value else 0,
    ),
)
"""What a plan says, by dotted path. `pipeline` sizes the PipelineModule that a script builds."""

INERT = (
    "gradient_clipping",
    "optimizer.params",
    "scheduler",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "prescale_gradients",
    "gradient_predivide_factor",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "flops_profiler",
    "comms_logger",
    "checkpoint",
    "fp16.loss_scale",
    "fp16.initial_scale_power",
    "fp16.loss_scale_window",
    "fp16.hysteresis",
    "fp16.min_loss_scale",
    "fp16.auto_cast",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "pipeline.partition",
    "pipeline.seed_layers",
)

AUTO = "auto"
"""What Hugging Face's Trainer fills in from its own arguments."""


def settings_from(
    found: Mapping[str, Any], source: str, problems: list[Problem]
) -> tuple[Settings, tuple[str, ...]]:
    """Settings that the flattened keys of a ds_config.json say, and the keys among them that are not read."""
    said = {name: value for name, value in found.items() if value != AUTO and value is not False}
    for name in ("zero_optimization.offload_optimizer.device", "pipeline.stages"):
        if said.get(name) in ("none", None):
            said.pop(name, None)
    fields = read_back(KEYS, said, source, problems)
    settings = Settings(**fields)
    if settings.precision is None and AUTO not in (found.get("bf16.enabled"), found.get("fp16.enabled")):
        settings = dataclasses.replace(settings, precision=Precision.FP32)
    if settings.cp > 1:
        settings = dataclasses.replace(settings, cp_exchange=CpExchange.ALL_TO_ALL)
    if settings.pp > 1:
        settings = dataclasses.replace(settings, schedule=Schedule.ONE_F_ONE_B)
    if settings.offload_activations and "recompute" not in fields:
        settings = dataclasses.replace(settings, recompute=Recipe.FULL)
    return settings, unread({**said, **_off(found)}, KEYS, INERT, settings)


def _off(found: Mapping[str, Any]) -> dict[str, Any]:
    """Strict keys that are said to be off."""
    strict = {key.name for key in KEYS if key.strict}
    return {name: value for name, value in found.items() if value is False and name in strict}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths as nested objects."""
    document: dict[str, Any] = {}
    for path, value in flat.items():
        *above, last = path.split(".")
        at = document
        for part in above:
            at = at.setdefault(part, {})
        at[last] = value
    return document


def flattened(document: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested objects as dotted paths; an empty one has none."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        path = f"{above}{name}"
        if isinstance(value, dict):
            flat |= flattened(value, f"{path}.")
        else:
            flat[path] = value
    return flat


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
