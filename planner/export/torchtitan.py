"""Settings as a job of torchtitan, and back: one table of keys of its TOML.

Read in torchtitan 0.2.2 (torchtitan/config/job_config.py and what reads it), the last release whose jobs are
TOML files; 0.3 takes Python modules. Stages are always written down (module_fqns_per_model_part).

A plan for torchtitan: the job's TOML, its model where that is no flavour of its own, and a script.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from planner.export import artifact as facts
from planner.export import text_files as shell
from planner.export.artifact import Export, ExportFile
from planner.export.megatron_files import steps_of
from planner.export.settings import Key, Recipe, Settings, read_back, settings_of, unread, whole, written
from planner.foundation.errors import Problem
from planner.model.attention import CpExchange
from planner.model.workload import Method, Optimizer, Precision
from planner.strategy.engines.torchtitan import RELEASE
from planner.strategy.engines.torchtitan_model import MODULE, Flavor, flavor_of
from planner.strategy.plan import Plan
from planner.strategy.strategy import Schedule, Zero

CONFIG = "torchtitan/config/job_config.py"
PIPELINE = "torchtitan/distributed/pipeline_parallel.py"
RECOMPUTE = "torchtitan/distributed/activation_checkpoint.py"
FLOAT8 = "quantize.linear.float8"

SCHEDULES = {
    Schedule.GPIPE: "GPipe",
    Schedule.ONE_F_ONE_B: "1F1B",
    Schedule.INTERLEAVED: "Interleaved1F1B",
    Schedule.ZBV: "ZBVZeroBubble",
    Schedule.DUALPIPEV: "DualPipeV",
}
"""Names of torch.distributed.pipelining.schedules.get_schedule_class, which ignores their case."""


def _parts(settings: Settings) -> list[list[str]] | None:
    """Modules of each stage: blocks by their number, the embedding first, norm and head last."""
    if settings.pp == 1:
        return None
    parts, first = [], 0
    for size in settings.sizes:
        parts.append([f"layers.{layer}" for layer in range(first, first + size)])
        first += size
    parts[0].insert(0, "tok_embeddings")
    parts[-1] += ["norm", "output"]
    return parts


def _sizes(parts: Any) -> tuple[int, ...]:
    """Blocks of each stage. Raises ValueError where they are not all blocks in order."""
    layers = [[name for name in part if name.startswith("layers.")] for part in parts]
    flat = [name for part in layers for name in part]
    if flat != [f"layers.{layer}" for layer in range(len(flat))]:
        raise ValueError(parts)
    return tuple(len(part) for part in layers)


def local_batch(settings: Settings) -> int | None:
    """Sequences that a data rank takes at once: all of a step's under a pipeline, else a micro-batch."""
    if settings.micro_batch is None:
        return None
    return settings.micro_batch * ((settings.num_micro_batches or 1) if settings.pp > 1 else 1)


def _mode(settings: Settings) -> str | None:
    return {
        Recipe.NONE: "none",
        Recipe.FULL: "full",
        Recipe.SELECTIVE: "selective",
        Recipe.EVERY: "selective",
    }.get(settings.recompute)


def _option(settings: Settings) -> str | None:
    number = str(settings.recompute_number)
    return {Recipe.SELECTIVE: "op", Recipe.EVERY: number}.get(settings.recompute)


def _converters(settings: Settings) -> list[str]:
    return [FLOAT8] if settings.precision is Precision.FP8 else []


def _precision(value: Any) -> Precision:
    return {"bfloat16": Precision.BF16, "float32": Precision.FP32}[value]


CAST = {Precision.BF16: "bfloat16", Precision.FP8: "bfloat16", Precision.FP32: "float32"}
RESHARD = {Zero.PARAMETERS: "always", Zero.GRADIENTS: "never"}

KEYS = (
    Key(
        name="parallelism.data_parallel_replicate_degree",
        field="dp_replicate",
        source=CONFIG,
    ),
    Key(
        name="parallelism.data_parallel_shard_degree",
        field="dp_shard",
        source=CONFIG,
        read=lambda value: None if value == -1 else whole(value),
    ),
    Key(
        name="parallelism.fsdp_reshard_after_forward",
        field="zero",
        source="torchtitan/models/llama3/infra/parallelize.py",
        words=RESHARD,
        reads=False,
    ),
    Key(name="parallelism.tensor_parallel_degree", field="tp", source=CONFIG),
    Key(name="parallelism.context_parallel_degree", field="cp", source=CONFIG),
    Key(
        name="parallelism.context_parallel_rotate_method",
        field="cp_exchange",
        source=CONFIG,
        words={CpExchange.GATHER: "allgather", CpExchange.RING: "alltoall"},
    ),
    Key(name="parallelism.expert_parallel_degree", field="ep", source=CONFIG),
    Key(
        name="parallelism.expert_tensor_parallel_degree",
        field="etp",
        source=CONFIG,
        write=lambda s: (s.etp or s.tp) if s.ep > 1 else None,
        read=whole,
    ),
    Key(name="parallelism.pipeline_parallel_degree", field="pp", source=CONFIG),
    Key(
        name="parallelism.pipeline_parallel_schedule",
        field="schedule",
        source=PIPELINE,
        words=SCHEDULES,
    ),
    Key(
        name="parallelism.pipeline_parallel_microbatch_size",
        field="micro_batch",
        source=PIPELINE,
        write=lambda s: s.micro_batch if s.pp > 1 else None,
        reads=False,
    ),
    Key(
        name="parallelism.module_fqns_per_model_part",
        field="sizes",
        source=PIPELINE,
        write=_parts,
        read=_sizes,
    ),
    Key(
        name="parallelism.pipeline_parallel_expert_parallel_overlap",
        field="schedule",
        source="torchtitan/distributed/dual_pipe_v.py",
        words={Schedule.DUALPIPEV: False},
        reads=False,
    ),
    Key(
        name="training.local_batch_size",
        field="micro_batch",
        source="torchtitan/train.py",
        write=local_batch,
        reads=False,
    ),
    Key(name="training.global_batch_size", field="batch", source="torchtitan/train.py", reads=False),
    Key(name="training.seq_len", field="seq", source=CONFIG),
    Key(
        name="training.mixed_precision_param",
        field="precision",
        source=CONFIG,
        words=CAST,
        read=_precision,
    ),
    Key(
        name="model.converters",
        field="precision",
        source="torchtitan/components/quantization/float8.py",
        write=_converters,
        reads=False,
    ),
    Key(
        name="optimizer.name",
        field="optimizer",
        source="torchtitan/components/optimizer.py",
        words={Optimizer.ADAMW: "AdamW"},
    ),
    Key(
        name="activation_checkpoint.mode",
        field="recompute",
        source=RECOMPUTE,
        write=_mode,
        reads=False,
    ),
    Key(
        name="activation_checkpoint.selective_ac_option",
        field="recompute",
        source=RECOMPUTE,
        write=_option,
        reads=False,
    ),
)
"""What a plan says, by dotted path."""

INERT = (
    "job",
    "profiling",
    "metrics",
    "checkpoint",
    "comm",
    "validation",
    "debug",
    "experimental.custom_import",
    "lr_scheduler",
    "optimizer.lr",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.implementation",
    "training.steps",
    "training.max_norm",
    "training.dataset",
    "training.dataset_path",
    "training.dataloader",
    "training.gc_freq",
    "training.mixed_precision_reduce",
    "model.name",
    "model.flavor",
    "model.hf_assets_path",
    "model.tokenizer_path",
    "model.print_after_conversion",
    "activation_checkpoint.preserve_rng_state",
    "activation_checkpoint.determinism_check",
    "activation_checkpoint.debug",
    "activation_checkpoint.early_stop",
)
FIXED: Mapping[str, Any] = {
    "training.dtype": "float32",
    "compile.enable": False,
    "quantize.linear.float8.recipe_name": "tensorwise",
    "quantize.linear.float8.filter_fqns": ["output"],
}
"""Written with every job (float8 with fp8 alone): what is priced. Other values change time or memory."""
OLDER_SPLITS = (
    "parallelism.pipeline_parallel_layers_per_stage",
    "parallelism.pipeline_parallel_first_stage_less_layers",
    "parallelism.pipeline_parallel_last_stage_less_layers",
)
DEFAULTS: Mapping[str, Any] = {
    "training.local_batch_size": 8,
    "training.global_batch_size": -1,
    "training.seq_len": 2048,
    "training.mixed_precision_param": "bfloat16",
    "optimizer.name": "AdamW",
    "activation_checkpoint.mode": "selective",
    "activation_checkpoint.selective_ac_option": "2",
    "parallelism.pipeline_parallel_schedule": "1F1B",
    "parallelism.pipeline_parallel_microbatch_size": 1,
    "parallelism.fsdp_reshard_after_forward": "default",
    "parallelism.expert_tensor_parallel_degree": 1,
}
"""What a job has where its file says nothing (job_config.py)."""


def settings_from(
    found: Mapping[str, Any], layers: int, devices: int, source: str, problems: list[Problem]
) -> tuple[Settings, tuple[str, ...]]:
    """Settings that the flattened keys of a job say, and the keys among them that are not read."""
    said = {**DEFAULTS, **found}
    fields = read_back(KEYS, said, source, problems)
    try:
        fields |= _recipe(said)
        settings = Settings(**fields, method=Method.PRETRAIN)
        settings = dataclasses.replace(settings, **_data(said, settings, devices))
        settings = dataclasses.replace(settings, **_split(said, settings, layers))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = str(error).strip("'\"")
        problems.append(Problem(where=source, fault=f"{text} is nothing that a plan has a word for."))
        return Settings(), ()
    if FLOAT8 in said.get("model.converters", []):
        settings = dataclasses.replace(settings, precision=Precision.FP8)
    usual = tuple(name for name, value in FIXED.items() if found.get(name) == value)
    return settings, unread(found, KEYS, (*INERT, *OLDER_SPLITS, *usual), settings)


def _recipe(said: Mapping[str, Any]) -> dict[str, Any]:
    mode, option = said["activation_checkpoint.mode"], str(said["activation_checkpoint.selective_ac_option"])
    if mode == "selective" and option.isdigit():
        number = int(option)
        return (
            {"recompute": Recipe.FULL}
            if number < 2
            else {"recompute": Recipe.EVERY, "recompute_number": number}
        )
    if mode == "selective" and option != "op":
        raise ValueError(f"activation_checkpoint.selective_ac_option {option}")
    recipes = {"none": Recipe.NONE, "full": Recipe.FULL, "selective": Recipe.SELECTIVE}
    if mode not in recipes:
        raise ValueError(f"activation_checkpoint.mode {mode}")
    return {"recompute": recipes[mode]}


def _data(said: Mapping[str, Any], settings: Settings, devices: int) -> dict[str, Any]:
    """Data ranks, what they share, and their batch."""
    replicate = settings.dp_replicate or 1
    shard = settings.dp_shard or max(1, devices // (replicate * settings.tp * settings.pp * settings.cp))
    reshard = said["parallelism.fsdp_reshard_after_forward"]
    if shard * settings.cp == 1:
        zero = Zero.NONE
    elif reshard == "default":
        zero = Zero.PARAMETERS if settings.pp == 1 else Zero.GRADIENTS
    else:
        zero = {word: ours for ours, word in RESHARD.items()}[reshard]
    local, batch = whole(said["training.local_batch_size"]), int(said["training.global_batch_size"])
    micro = whole(said["parallelism.pipeline_parallel_microbatch_size"]) if settings.pp > 1 else local
    batch = local * replicate * shard if batch < 0 else batch
    changes: dict[str, Any] = {
        "dp_replicate": replicate,
        "dp_shard": shard,
        "zero": zero,
        "micro_batch": micro,
        "batch": batch,
    }
    changes["sequence_parallel"] = settings.tp > 1
    if settings.cp > 1 and settings.cp_exchange is None:
        changes["cp_exchange"] = CpExchange.GATHER
    if settings.ep == 1:
        changes["etp"] = None
    return changes


def _split(said: Mapping[str, Any], settings: Settings, layers: int) -> dict[str, Any]:
    """Chunks and sizes of stages, as generate_llm_fqn_per_model_part makes them where none are named."""
    if settings.pp == 1:
        return {"sizes": (), "schedule": None}
    schedule = settings.schedule or Schedule.ONE_F_ONE_B
    if settings.sizes:
        return {"chunks": max(1, len(settings.sizes) // settings.pp)}
    first, last = (
        int(said.get(f"parallelism.pipeline_parallel_{end}_stage_less_layers", 1))
        for end in ("first", "last")
    )
    per_stage = said.get("parallelism.pipeline_parallel_layers_per_stage")
    several = schedule.least_chunks > 1
    stages = (
        -(-(layers + first + last) // whole(per_stage)) if per_stage else settings.pp * (2 if several else 1)
    )
    return {"chunks": max(1, stages // settings.pp), "sizes": _weighted(layers, stages, first, last)}


def _weighted(layers: int, stages: int, first: int, last: int) -> tuple[int, ...]:
    """Blocks by stage where embedding and head weigh as `first` and `last` blocks do."""
    least, more = divmod(layers + first + last, stages)
    sizes = [least + (stage < more) for stage in range(stages)]
    sizes[0] -= first
    sizes[-1] -= last
    return tuple(sizes)


def toml_text(flat: Mapping[str, Any]) -> str:
    """Dotted paths as TOML tables, in order."""
    tables: dict[str, list[str]] = {}
    for path, value in flat.items():
        table, _, name = path.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {_toml_value(value)}")
    return "\n".join("\n".join([f"[{table}]", *lines, ""]) for table, lines in tables.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    if isinstance(value, Sequence):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)


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
