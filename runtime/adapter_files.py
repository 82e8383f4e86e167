"""Adapters as PEFT's files, adapter_model.safetensors and adapter_config.json: those of a checkpoint, and of
a folder that a run begins with.

Keys are those of peft's LoRA on a Hugging Face model: base_model.model. + the module's own name +
.lora_A.weight [r, in] or .lora_B.weight [out, r] (peft, utils/save_and_load.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from planner.codec import load_json_object, write_atomic
from planner.errors import InputError, Problem
from planner.model import ModelSpec
from planner.plan import Plan
from planner.workload import Adapters
from runtime.committed import load_index
from runtime.hf_weights.names import Names, names_of
from runtime.hf_weights.read import local_box, open_file
from runtime.lora import A, B, adapted_modules, scale_of
from runtime.transformer.block import Block
from runtime.transformer.model import build_transformer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HALVES = {A: "lora_A", B: "lora_B"}
UNLIKE = ("use_rslora", "use_dora")
"""Settings of PEFT under which adapters compute otherwise."""
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


class AdapterFolder:
    """The files that a run takes its first adapters from; each rank reads its own slices only."""

    def __init__(self, folder: Path, plan: Plan, *, alpha: float | None) -> None:
        """Raises InputError with all in which the folder's adapters are others than the plan's."""
        adapters = plan.workload.adapters
        assert adapters is not None
        self.folder, self._names = folder, names_of(plan.model)
        config = load_json_object(folder / CONFIG)
        rank, count = adapters.rank, config.get("r")
        own = {
            "peft_type": ("LORA", config.get("peft_type")),
            "r": (rank, count),
            "lora_alpha": (scale_of(adapters, alpha) * rank, config.get("lora_alpha")),
            "bias": ("none", config.get("bias", "none")),
        }
        own |= {key: (False, config.get(key, False)) for key in UNLIKE}
        problems = [
            Problem(
                where=f"{folder / CONFIG}: {key}", fault=f"is {found!r}, the run's adapters' is {ours!r}."
            )
            for key, (ours, found) in own.items()
            if ours != found
        ]
        if problems:
            raise InputError(*problems)
        self._file = open_file(folder / WEIGHTS)
        self._check_tensors(_halves(plan.model, adapters))

    def _check_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        expected = {peft_key(name, self._names): list(shape) for name, shape in shapes.items()}
        found = {key: list(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if wrong:
            first, *_ = wrong
            told = f"{first} is {found.get(first, 'missing')}, the model has {expected.get(first, 'none')}"
            fault = f"has other tensors than the run's adapters: {told} ({len(wrong)} differ)."
            raise InputError(Problem(where=str(self.folder / WEIGHTS), fault=fault))

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fills those of a rank's weights, by our names, that are halves of adapters."""
        with torch.no_grad():
            for name, tensor in weights:
                if name.rsplit(".", 1)[1] in HALVES:
                    local, box = local_box(tensor)
                    stored = self._file.get_slice(peft_key(name, self._names))
                    local.copy_(stored[tuple(slice(begin, end) for begin, end in box)])


def _halves(model: ModelSpec, adapters: Adapters) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all adapters' halves."""
    found: dict[str, tuple[int, ...]] = {}
    for name, block in build_transformer(model, 0, model.layers, True, True, seq=1).layers.named_children():
        assert isinstance(block, Block)
        for path in adapted_modules(block, adapters.modules):
            linear = block.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            outputs, inputs = linear.weight.shape
            found[f"layers.{name}.{path}.{A}"] = (adapters.rank, inputs)
            found[f"layers.{name}.{path}.{B}"] = (outputs, adapters.rank)
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
                fix="merge them instead (plan export-weights --merge-adapters)",
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
