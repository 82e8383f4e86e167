"""A plan as a task of SkyPilot: resources, nodes, and how ranks are started on what it rents.

Keys as in sky/utils/schemas.py of SkyPilot 0.14, variables as in sky/skylet/constants.py (SKYPILOT_NODE_IPS,
SKYPILOT_NODE_RANK); names of accelerators are those of profiles/skypilot.toml.
"""

from __future__ import annotations

from typing import Any

from planner.export import artifact as facts
from planner.export.artifact import Export, ExportFile
from planner.export.scheduled import Launched, job_name, nodes
from planner.export.text_files import PORT, yaml_text
from planner.job.engine_settings import Engine
from planner.strategy.plan import Plan

FILE = "task.yaml"
CLOUDS = (
    "aws",
    "azure",
    "gcp",
    "oci",
    "lambda",
    "nebius",
    "runpod",
    "verda",
    "vast",
    "fluidstack",
    "paperspace",
)
"""Providers that SkyPilot has a cloud of the same name for (sky/clouds)."""
PACKAGES = {
    Engine.NATIVE: "pip install 'shardwise[runtime]'",
    Engine.TORCHTITAN: "pip install torchtitan==0.2.2 torchao",
    Engine.DEEPSPEED: "pip install deepspeed==0.19.8 transformers accelerate",
    Engine.MEGATRON: "git clone --depth 1 -b core_v0.15.0 https://github.com/NVIDIA/Megatron-LM\n"
    "pip install './Megatron-LM[mlm]' transformer-engine[pytorch]",
}
"""How each engine is installed where it runs; Megatron-LM's image of NGC has its kernels built."""


def export_skypilot(plan: Plan) -> Export:
    """The task and the engine's files, which lie in its workdir."""
    launched = Launched(plan)
    text = facts.comment(facts.predictions(plan)) + yaml_text(_task(plan, launched))
    return Export(
        target="skypilot",
        release="SkyPilot 0.14",
        files=(ExportFile(name=FILE, text=text), *launched.files),
        start=f"sky jobs launch {FILE} (managed, recovers from preemption), or sky launch {FILE}",
        decides=(
            *launched.decides,
            "region and zone, and prices of the day: what the plan's dollars were taken from is in plan.json",
        ),
        yours=(
            *launched.yours,
            "a bucket for RUN_DIR (file_mounts): on another machine a run goes on only from shared storage",
        ),
    )


def _task(plan: Plan, launched: Launched) -> dict[str, Any]:
    count = nodes(plan)
    run = [
        'export MASTER_ADDR="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"',
        f'export MASTER_PORT={PORT} NODE_RANK="$SKYPILOT_NODE_RANK"',
    ]
    if launched.engine is Engine.MEGATRON:
        run.append('export MEGATRON="$PWD/Megatron-LM"')
    run.append(f"bash {launched.script}")
    task: dict[str, Any] = {
        "name": job_name(plan),
        "workdir": ".",
        "num_nodes": count,
        "resources": _resources(plan),
        "setup": PACKAGES[launched.engine] + "\n",
        "run": "\n".join(run) + "\n",
    }
    if launched.native:
        task["envs"] = {"RUN_DIR": "/checkpoints/run", "DATA": ""}
    elif launched.engine is Engine.DEEPSPEED:
        task["envs"] = {"TRAIN_SCRIPT": "train.py"}
    return task


def _resources(plan: Plan) -> dict[str, Any]:
    """The instance that the cluster names, where SkyPilot knows its cloud; else accelerators."""
    group = plan.cluster.groups[0]
    resources: dict[str, Any] = {}
    provider, _, instance = plan.cluster.name.partition("*")[2].partition("/")
    if instance and provider in CLOUDS:
        resources |= {"infra": provider, "instance_type": instance}
    elif group.device.name != "cpu":
        resources["accelerators"] = f"{accelerator(group.device.name)}:{group.devices_per_node}"
    spot = any("spot" in source.lower() for source in plan.cluster.price_sources)
    if spot:
        resources |= {"use_spot": True, "job_recovery": {"max_restarts_on_errors": 3}}
    return resources


def accelerator(device: str) -> str:
    """SkyPilot's name of a device. Raises InputError where it has none."""
    from planner.foundation.errors import InputError, Problem
    from planner.hardware.catalog import data_folder
    from planner.hardware.skypilot import load_names

    names = load_names(data_folder() / "skypilot.toml").accelerators
    first = [name for name, devices in names.items() if devices[0] == device]
    found = first or [name for name, devices in names.items() if device in devices]
    if not found:
        raise InputError(
            Problem(
                where="--to skypilot",
                fault=f"SkyPilot has no name for {device}.",
                legal="; ".join(f"{name}: {', '.join(devices)}" for name, devices in list(names.items())[:8]),
            )
        )
    return found[0]
