"""Adapters of a checkpoint as files that PEFT reads: adapter_model.safetensors and adapter_config.json.

Keys are those of peft's LoRA on a Hugging Face model: base_model.model. + the module's own name +
.lora_A.weight [r, in] or .lora_B.weight [out, r] (peft, utils/save_and_load.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from planner.codec import write_atomic
from planner.errors import InputError, Problem
from planner.model import ModelSpec
from planner.plan import Plan
from planner.workload import Adapters
from runtime.committed import load_index
from runtime.hf_weights.names import Names, names_of
from runtime.lora import A, B, scale_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HALVES = {A: "lora_A", B: "lora_B"}
PREFIX = "executor/model."
"""Of the names of weights in a run's checkpoints (runtime.session)."""


def export_adapters(
    checkpoint: Path, model: ModelSpec, adapters: Adapters, folder: Path, *, alpha: float | None
) -> Path:
    """Writes the adapters of a committed checkpoint to `folder`. One process does it.

    Raises InputError for a family that keeps several projections in one matrix, since adapters of each are no
    adapter of it, and for a checkpoint without adapters.
    """
    names = names_of(model)
    tensors = {peft_key(name, names): value for name, value in read_adapters(checkpoint).items()}
    if not tensors:
        raise InputError(Problem(where=str(checkpoint), fault="holds no adapters.", fix="train with LoRA"))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = _config(model, adapters, alpha, sorted({key.split(".")[-3] for key in tensors}))
    write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


def say_export(checkpoint: Path, plan: Plan, folder: Path, *, alpha: float | None) -> str:
    """Exports the adapters of a run that ends; what to say of it."""
    assert plan.workload.adapters is not None
    try:
        export_adapters(checkpoint, plan.model, plan.workload.adapters, folder, alpha=alpha)
    except InputError as error:
        return f"no adapters for PEFT: {error}"
    return f"adapters for PEFT are in {folder}"


def read_adapters(checkpoint: Path) -> dict[str, Tensor]:
    """The whole halves of all adapters of a checkpoint, by our names, put together from their boxes."""
    index = load_index(checkpoint)
    found = {}
    for name, stored in index.tensors.items():
        if not name.startswith(PREFIX) or name.rsplit(".", 1)[1] not in HALVES:
            continue
        whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        for chunk in stored.chunks:
            with safe_open(checkpoint / chunk.file, framework="pt") as file:
                box = tuple(slice(o, o + s) for o, s in zip(chunk.offset, chunk.shape, strict=True))
                whole[box] = file.get_tensor(f"{name}@{chunk.key}")
        found[name.removeprefix(PREFIX)] = whole
    return found


def peft_key(name: str, names: Names) -> str:
    """PEFT's key for one of our names, `layers.3.attention.wq.lora_a`."""
    _, layer, inner = name.split(".", 2)
    module, half = inner.rsplit(".", 1)
    fused = next((fused for fused in names.fused if module in fused.members), None)
    if fused is not None:
        raise InputError(
            Problem(
                where="--model",
                fault=f"its family keeps {', '.join(fused.members)} in one matrix, {fused.name}: adapters of "
                "each are no adapter of it.",
                fix="merge them instead (runtime.lora.merged)",
            )
        )
    return f"base_model.model.{names.layer.format(layer)}{names.block[module]}.{HALVES[half]}.weight"


def _config(
    model: ModelSpec, adapters: Adapters, alpha: float | None, modules: list[str]
) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": adapters.rank,
        "lora_alpha": scale_of(adapters, alpha) * adapters.rank,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
