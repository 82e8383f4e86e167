"""Arguments of Hugging Face's Trainer, and of PEFT, that go with a plan for DeepSpeed or Accelerate.

Names of transformers.TrainingArguments (5.24) and peft.LoraConfig (0.18).
"""

from __future__ import annotations

import json
from typing import Any

from planner.export.artifact import ExportFile
from planner.export.settings import Recipe, settings_of
from planner.model.lora import adapts, module_names
from planner.model.spec import ModelSpec
from planner.model.workload import AdapterModules, Optimizer, Precision
from planner.strategy.plan import Plan
from planner.strategy.strategy import Zero

ARGUMENTS_FILE = "training_args.json"
ADAPTERS_FILE = "lora_config.json"

OPTIMIZERS = {
    Optimizer.ADAMW: "adamw_torch_fused",
    Optimizer.SGD: "sgd",
    Optimizer.ADAFACTOR: "adafactor",
}
"""Values of `optim` (OptimizerNames of transformers/training_args.py)."""


def trainer_files(plan: Plan, deepspeed: str | None = None, full_by_fsdp: bool = False) -> list[ExportFile]:
    """training_args.json, and for adapters lora_config.json."""
    files = [ExportFile(name=ARGUMENTS_FILE, text=_json(_arguments(plan, deepspeed, full_by_fsdp)))]
    adapters = plan.workload.adapters
    if adapters is not None:
        document = {
            "r": adapters.rank,
            "lora_alpha": 2 * adapters.rank,
            "target_modules": _targets(plan.model, adapters.modules),
            "task_type": "CAUSAL_LM",
        }
        files.append(ExportFile(name=ADAPTERS_FILE, text=_json(document)))
    return files


def _targets(model: ModelSpec, modules: str) -> list[str] | str:
    """target_modules of LoraConfig, by the names that llama and most families after it have.

    All linear layers have a word of their own, whatever they are called; of a model with experts, routers
    would be among them.
    """
    if modules == AdapterModules.ALL and not model.experts:
        return "all-linear"
    return [name for name in module_names(model) if adapts(modules, name)]


def _arguments(plan: Plan, deepspeed: str | None, full_by_fsdp: bool) -> dict[str, Any]:
    settings = settings_of(plan.strategy, plan.workload)
    precision = plan.workload.precision
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.num_micro_batches,
        "bf16": precision is Precision.BF16,
        "fp16": precision is Precision.FP16,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": settings.recompute is Recipe.FULL and not full_by_fsdp,
    }
    if deepspeed is not None:
        return arguments | {"deepspeed": deepspeed}
    arguments["optim"] = OPTIMIZERS[plan.workload.optimizer]
    if settings.zero >= Zero.GRADIENTS and (settings.num_micro_batches or 1) > 1:
        # Gradients stay sharded between micro-batches, as the plan's memory has them.
        arguments["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return arguments


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"
