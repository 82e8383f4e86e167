"""Loads one exported folder with the engine's own parser: run by the interpreter that has the engine.

    PYTHON bench/export_check.py deepspeed|megatron|torchtitan|accelerate|kubernetes|skypilot FOLDER WORLD...

Prints one JSON line a folder. Nothing of this project is imported here.
"""

# mypy: ignore-errors

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path


def deepspeed(folder: Path, world: int) -> str:
    """DeepSpeedConfig itself, on a fake number of data ranks."""
    from deepspeed import comm
    from deepspeed.runtime.config import DeepSpeedConfig

    document = json.loads((folder / "ds_config.json").read_text())
    split = document.get("pipeline", {}).get("stages", 1)
    split *= document.get("tensor_parallel", {}).get("autotp_size", 1)
    split *= document.get("sequence_parallel_size", 1)
    document.pop("sequence_parallel_size", None)
    comm.get_world_size = lambda group=None: world // split
    comm.get_rank = lambda group=None: 0
    config = DeepSpeedConfig(document)
    assert config.train_batch_size == document["train_batch_size"]
    assert config.zero_config.stage == document["zero_optimization"]["stage"]
    said = document["zero_optimization"]
    offload = config.zero_config.offload_optimizer
    assert (offload is not None and str(offload.device) != "none") == ("offload_optimizer" in said)
    if "expert_parallel" in document:
        assert config.expert_parallel_config.autoep_size == document["expert_parallel"]["autoep_size"]
    if "pipeline" in document:
        assert config.pipeline["stages"] == document["pipeline"]["stages"]
    if "tensor_parallel" in document:
        assert config.tensor_parallel_config.autotp_size == document["tensor_parallel"]["autotp_size"]
    return f"DeepSpeedConfig: ZeRO {config.zero_config.stage}"


def torchtitan(folder: Path, world: int) -> str:
    """ConfigManager, the flavour, ParallelDims, and the split of stages."""
    from torchtitan.config import ConfigManager
    from torchtitan.distributed import ParallelDims
    from torchtitan.protocols.train_spec import get_train_spec

    sys.path.insert(0, str(folder))
    sys.modules.pop("shardwise_flavor", None)
    job = ConfigManager().parse_args([f"--job.config_file={folder / 'job.toml'}"])
    if job.experimental.custom_import:
        importlib.import_module(job.experimental.custom_import)
    p = job.parallelism
    ParallelDims(
        dp_replicate=p.data_parallel_replicate_degree,
        dp_shard=p.data_parallel_shard_degree,
        cp=p.context_parallel_degree,
        tp=p.tensor_parallel_degree,
        pp=p.pipeline_parallel_degree,
        ep=p.expert_parallel_degree,
        etp=p.expert_tensor_parallel_degree,
        world_size=world,
    )
    spec = get_train_spec(job.model.name)
    arguments = spec.model_args[job.model.flavor]
    arguments.update_from_config(job)
    import torch

    with torch.device("meta"):
        model = spec.model_cls(arguments)
    params = sum(each.numel() for each in model.parameters())
    if p.module_fqns_per_model_part:
        parts = [name for part in p.module_fqns_per_model_part for name in part]
        assert len(parts) == arguments.n_layers + 3, parts
        named = dict(model.named_modules())
        assert all(name in named for name in parts)
        from torch.distributed.pipelining.schedules import get_schedule_class

        get_schedule_class(p.pipeline_parallel_schedule)
    sys.path.remove(str(folder))
    batch = job.training.local_batch_size * p.data_parallel_replicate_degree * p.data_parallel_shard_degree
    assert job.training.global_batch_size % batch == 0
    return f"ConfigManager, ParallelDims, {job.model.name} {job.model.flavor}: params={params}"


def accelerate(folder: Path, world: int) -> str:
    """The config's class, and the environment that `accelerate launch` makes of it."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = folder / "accelerate.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == world
    parser = launch_command_parser()
    args = parser.parse_args(
        ["--config_file", str(path), "--machine_rank", "0", "--main_process_ip", "h", "x.py"]
    )
    args, _, _ = _validate_launch_command(args)
    environment = {}
    if args.use_fsdp:
        environment = prepare_multi_gpu_env(args)
        from accelerate.parallelism_config import ParallelismConfig

        ours = {
            k: v for k, v in environment.items() if k.startswith(("FSDP_", "PARALLELISM_", "ACCELERATE_"))
        }
        os.environ.update(ours)
        sizes = ParallelismConfig()
        assert sizes.total_size == world, sizes
        from accelerate.utils import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        for name in ours:
            os.environ.pop(name)
        return f"FSDP2: reshard={plugin.reshard_after_forward}, recompute={plugin.activation_checkpointing}"
    return f"{config.distributed_type}"


FLAG = re.compile(r"^  (--[a-z0-9-]+)(?: (.*))?$")


def megatron(folder: Path, world: int) -> str:
    """TransformerConfig of Megatron Core, its layout, and its optimizer's and DDP's configuration.

    The wheel has no argument parser: flags are put into the configurations' fields of the same name, as
    core_transformer_config_from_args of megatron/training/arguments.py does.
    """
    import shlex

    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    flags = {}
    script = (folder / "megatron.sh").read_text().partition("exec torchrun")[0]
    for line in script.splitlines():
        if (match := FLAG.match(line)) is not None:
            flags[match[1]] = shlex.split(match[2])[0] if match[2] else True
    cls = MLATransformerConfig if "--multi-latent-attention" in flags else TransformerConfig
    fields, renamed = (
        cls.__dataclass_fields__,
        {
            "--num-experts": "num_moe_experts",
            "--norm-epsilon": "layernorm_epsilon",
            "--swiglu": "gated_linear_unit",
            "--apply-layernorm-1p": "layernorm_zero_centered_gamma",
            "--fp8-format": "fp8",
        },
    )
    values, others = {}, []
    for flag, text in flags.items():
        name = renamed.get(flag, flag[2:].replace("-", "_"))
        if flag == "--disable-bias-linear":
            values["add_bias_linear"] = False
        elif name in fields:
            values[name] = _value(text)
        else:
            others.append(flag)
    values["add_qkv_bias"] = values.get("add_bias_linear", True) or "--add-qkv-bias" in flags
    values["attention_backend"] = fields["attention_backend"].default
    values["pipeline_dtype"] = torch.bfloat16
    if isinstance(freq := values.get("moe_layer_freq"), str):
        zeros, ones = map(int, re.findall(r"\*(\d+)", freq))
        values["moe_layer_freq"] = [0] * zeros + [1] * ones
    if isinstance(window := values.get("window_size"), str):
        values["window_size"] = tuple(map(int, re.findall(r"-?\d+", window)))
    if layout := values.pop("pipeline_model_parallel_layout", None):
        stages = PipelineParallelLayerLayout.get_num_stages_from_str(layout)
        chunks = stages // values["pipeline_model_parallel_size"]
        values["virtual_pipeline_model_parallel_size"] = chunks if chunks > 1 else None
        values["pipeline_model_parallel_layout"] = layout
    if "recompute_modules" in values:
        values["recompute_modules"] = values["recompute_modules"].split()
    config = cls(**values)
    if layout:
        config.pipeline_model_parallel_layout.validate_layer_layout(config.num_layers, config.mtp_num_layers)
    ddp = DistributedDataParallelConfig.__dataclass_fields__
    unknown = [f for f in others if f[2:].replace("-", "_") not in ddp and f not in ARGUMENTS_ONLY]
    assert not unknown, unknown
    return f"{cls.__name__}: {len(values)} fields; {len(others)} flags of arguments.py alone"


ARGUMENTS_ONLY = (
    "--max-position-embeddings",
    "--position-embedding-type",
    "--make-vocab-size-divisible-by",
    "--rotary-base",
    "--rotary-percent",
    "--untie-embeddings-and-output-weights",
    "--group-query-attention",
    "--micro-batch-size",
    "--global-batch-size",
    "--seq-length",
    "--use-distributed-optimizer",
    "--use-megatron-fsdp",
    "--ckpt-format",
    "--optimizer",
    "--optimizer-cpu-offload",
    "--use-precision-aware-optimizer",
    "--sgd-momentum",
    "--no-create-attention-mask-in-dataloader",
    "--distributed-backend",
    "--weight-decay",
    "--clip-grad",
    "--lr-decay-style",
    "--eval-iters",
    "--log-interval",
    "--log-throughput",
    "--exit-signal-handler",
    "--use-rope-scaling",
    "--rope-scaling-factor",
    "--squared-relu",
    "--rotary-seq-len-interpolation-factor",
    "--data-parallel-sharding-strategy",
    "--add-qkv-bias",
    "--num-distributed-optimizer-instances",
)
"""Flags that no configuration of Megatron Core has a field for: pretrain_gpt.py reads them itself."""


def _value(text):
    if text is True or not isinstance(text, str):
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def kubernetes(folder: Path, world: int) -> str:
    """Kubeflow's own models of TrainingRuntime and TrainJob, which refuse wrong types."""
    import yaml
    from kubeflow_trainer_api import models

    documents = list(yaml.safe_load_all((folder / "trainjob.yaml").read_text()))
    config, runtime, job = documents
    made = models.TrainerV1alpha1TrainingRuntime.from_dict(runtime)
    assert _same(made.to_dict(), runtime), "a key of the runtime is unknown"
    asked = models.TrainerV1alpha1TrainJob.from_dict(job)
    assert _same(asked.to_dict(), job), "a key of the job is unknown"
    nodes, each = asked.spec.trainer.num_nodes, asked.spec.trainer.num_proc_per_node
    assert nodes * each == world
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes
    assert all(isinstance(text, str) for text in config["data"].values())
    return f"TrainingRuntime and TrainJob: {nodes} nodes of {each}"


def _same(made, given):
    """Whether everything that was given is in what was made of it."""
    if isinstance(given, dict):
        return isinstance(made, dict) and all(k in made and _same(made[k], v) for k, v in given.items())
    if isinstance(given, list):
        return len(made) == len(given) and all(_same(a, b) for a, b in zip(made, given, strict=True))
    numbers = all(isinstance(each, (int, float)) for each in (made, given))
    return made == given if numbers else str(made) == str(given)


def skypilot(folder: Path, world: int) -> str:
    """SkyPilot's schemas of a task and of its resources."""
    import yaml
    from jsonschema import Draft202012Validator
    from sky.utils import schemas

    task = yaml.safe_load((folder / "task.yaml").read_text())
    for schema, document in (
        (schemas.get_task_schema(), task),
        (schemas.get_resources_schema(), task["resources"]),
    ):
        faults = [error.message for error in Draft202012Validator(schema).iter_errors(document)]
        assert not faults, faults
    return f"schemas of task and resources: {task['resources']}"


def main() -> None:
    """One JSON line for each folder."""
    check = globals()[sys.argv[1]]
    for entry in sys.argv[2:]:
        path, _, world = entry.rpartition("=")
        try:
            answer = {"folder": path, "ok": True, "said": check(Path(path), int(world))}
        except Exception as error:  # the answer is the fault
            fault = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            missing = isinstance(error, ModuleNotFoundError)
            answer = {"folder": path, "ok": False, "said": fault, "missing": missing}
        print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
