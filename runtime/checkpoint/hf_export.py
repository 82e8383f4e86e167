"""A Hugging Face folder as the beginning of a run: its model must be the plan's, and its files are kept.

Weights of a LoRA run with its adapters in them: W + s B A where a projection has an adapter, W elsewhere.

W is taken as the run computed with it, in the compute precision; the sum is in fp32.

Exports a checkpoint of a run as a Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planner.foundation.decode import encode, load_json_object
from planner.foundation.errors import InputError, Problem
from planner.foundation.run_files import CHECKPOINTS, PLAN
from planner.model.huggingface import read_config_file
from planner.model.spec import ModelSpec
from planner.strategy.engines.native import check_executed
from planner.strategy.plan import Plan, load_plan
from runtime.checkpoint.adapter_files import read_adapters
from runtime.checkpoint.checkpoint import load_checkpoint
from runtime.checkpoint.store import CheckpointIndex, committed_folders, find_checkpoint, load_index, verify
from runtime.model.huggingface.files import ReadParameter, WeightFolder, write_weights
from runtime.model.lora import A, B, check_base, scale_of, sums_of
from runtime.model.precision import compute_dtype

KEPT = "huggingface"
"""Where a run keeps config.json and the tokenizer's files of the folder that it began with."""

CONFIG = "config.json"
KEPT_FILES = (CONFIG, "generation_config.json", "special_tokens_map.json", "added_tokens.json")
KEPT_PATTERNS = ("tokenizer*.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


def check_folder(folder: Path, spec: ModelSpec) -> None:
    """Raises InputError where the folder's weights or its config.json are not of this model."""
    if (folder / CONFIG).exists():
        check_config(folder / CONFIG, spec)
    WeightFolder(folder, spec)


def check_config(file: Path, spec: ModelSpec) -> None:
    """Raises InputError with everything in which a config.json describes another model than the plan's."""
    own, theirs = _plain(spec), _plain(read_config_file(file))
    problems = [
        Problem(
            where=f"{file}: {name}",
            fault=f"is {theirs.get(name, 'absent')!r}, the plan's model has {own.get(name, 'absent')!r}.",
            fix="solve with --model and this folder",
        )
        for name in dict.fromkeys((*own, *theirs))
        if own.get(name, "absent") != theirs.get(name, "absent")
    ]
    if problems:
        raise InputError(*problems)


def _plain(spec: ModelSpec) -> dict[str, Any]:
    """Every fact of a model under its path. What training alone reads is left out: a plan may change it."""
    facts = encode(dataclasses.replace(spec, name="", sources=(), initializer_range=0.0, max_positions=1))
    found = dict(_flat(facts, ""))
    return {name: value for name, value in found.items() if ".routing." not in name}


def _flat(value: Any, prefix: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}".strip("."))]
    if isinstance(value, (list, tuple)):
        return [pair for place, item in enumerate(value) for pair in _flat(item, f"{prefix}.{place}")]
    return [(prefix, value)]


def keep_files(folder: Path, run_dir: Path) -> None:
    """Copies config.json and the tokenizer's files into the run, for its weights to be exported with."""
    kept = run_dir / KEPT
    kept.mkdir(exist_ok=True)
    for path in side_files(folder):
        shutil.copyfile(path, kept / path.name)


def side_files(folder: Path) -> list[Path]:
    """The files of a folder beside its weights that belong to the model."""
    named = [folder / name for name in KEPT_FILES]
    found = [path for pattern in KEPT_PATTERNS for path in sorted(folder.glob(pattern))]
    return [path for path in (*named, *found) if path.is_file()]


CORRECTION = ".correction"
"""Ends the names of what corrects a router's choice, which is no weight, and fp32 in any precision."""


class MergedWeights:
    """Reads whole parameters by our names. `base` is the folder that the run began with."""

    def __init__(self, checkpoint: Path, index: CheckpointIndex, plan: Plan, base: Path) -> None:
        """Raises InputError where the run trained no adapters, or beside other weights than `base` has."""
        adapters = plan.workload.adapters
        if adapters is None:
            fault = f"is given, but the run trained all weights (method {plan.workload.method})."
            raise InputError(Problem(where="--merge-adapters", fault=fault, fix="leave it out"))
        self._dtype = compute_dtype(plan.workload.precision)
        alpha = index.run.get("lora_alpha")
        self._scale = scale_of(adapters, None if alpha is None else float(alpha))
        self._base, self._adapters = WeightFolder(base, plan.model), read_adapters(checkpoint)
        self._shapes = {mapped.name: mapped.shape for mapped in self._base.map.parameters}
        frozen = (self._frozen(name) for name in self._shapes if not name.endswith(CORRECTION))
        saved = torch.zeros(3, dtype=torch.float64)
        load_checkpoint(checkpoint, index, {"executor": {"base": saved}})
        check_base(saved, sum((sums_of(weight) for weight in frozen), torch.zeros(3, dtype=torch.float64)))

    def __call__(self, name: str) -> Tensor:
        """One parameter, as it is or with its adapter, in fp32."""
        if name.endswith(CORRECTION):
            return self._read(name)
        weight, path = self._frozen(name).float(), name.removesuffix(".weight")
        if f"{path}.{A}" in self._adapters:
            weight += self._scale * self._adapters[f"{path}.{B}"] @ self._adapters[f"{path}.{A}"]
        return weight

    def _frozen(self, name: str) -> Tensor:
        """A parameter of the base in the compute precision."""
        return self._read(name).to(self._dtype)

    def _read(self, name: str) -> Tensor:
        weight = torch.empty(self._shapes[name])
        self._base.fill(name, weight)
        return weight


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and from which step."""

    folder: Path
    step: int
    dtype: str
    files: tuple[Path, ...]
    remarks: tuple[str, ...]


def export_run(
    run_dir: Path,
    folder: Path,
    *,
    config: Path | None,
    dtype: str | None,
    step: int | None,
    base: Path | None = None,
) -> Exported:
    """Writes the weights of a run's newest whole checkpoint, or that of `step`, to a new folder.

    `config` None is the one that the run began with (`--init-from`); `dtype` None is the config's own, or
    float32. `base` are the weights beside which a run trained adapters, which are merged into them. Raises
    InputError where there is none, or it describes another model.
    """
    plan = load_plan(run_dir / PLAN)
    spec = plan.model
    check_executed(spec, "export")
    path, remarks = _checkpoint(run_dir / CHECKPOINTS, step)
    index = load_index(path)
    source = config or run_dir / KEPT / CONFIG
    if not source.exists():
        fault = "is not there: the run began without a Hugging Face folder."
        raise InputError(Problem(where=str(source), fault=fault, fix="name a config.json with --config"))
    source = source / CONFIG if source.is_dir() else source
    check_config(source, spec)
    document = load_json_object(source)
    chosen = dtype or _own_dtype(document)
    files = write_weights(
        _reader(plan, path, index, base),
        spec,
        folder,
        config=_with_dtype(document, chosen),
        dtype=DTYPES[chosen],
    )
    for side in side_files(source.parent):
        if side.name != CONFIG:
            shutil.copyfile(side, folder / side.name)
    return Exported(folder, index.step, chosen, tuple(files), remarks)


def _reader(plan: Plan, path: Path, index: CheckpointIndex, base: Path | None) -> ReadParameter:
    """What reads one whole parameter of a run."""
    if base is not None:
        return MergedWeights(path, index, plan, base)
    if plan.workload.adapters is not None:
        raise InputError(
            Problem(
                where=str(path),
                fault="holds adapters alone, beside weights that were not trained.",
                fix="name their folder with --merge-adapters, or give the run's adapter folder to PEFT",
            )
        )
    return partial(_read, path, index)


def _checkpoint(folder: Path, step: int | None) -> tuple[Path, tuple[str, ...]]:
    """The checkpoint to export, verified, and why newer ones were passed over."""
    if step is None:
        found = find_checkpoint(folder)
        if found.path is None:
            fault = "holds no whole checkpoint." + "".join(f" {text}" for text in found.refused)
            raise InputError(Problem(where=str(folder), fault=fault))
        return found.path, found.refused
    saved = {load_index(path).step: path for path in committed_folders(folder)}
    if step not in saved:
        legal = ", ".join(map(str, sorted(saved))) or "none is saved"
        raise InputError(Problem(where="--step", fault=f"{step} is not saved in {folder}.", legal=legal))
    problems = verify(saved[step])
    if problems:
        raise InputError(*problems)
    return saved[step], ()


def _read(path: Path, index: CheckpointIndex, name: str) -> Tensor:
    """One whole parameter of a checkpoint."""
    key = f"model.{name}"
    stored = index.tensors.get(f"executor/{key}")
    if stored is None:
        raise InputError(Problem(where=str(path), fault=f"lacks the tensor {name}."))
    whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    load_checkpoint(path, index, {"executor": {key: whole}})
    return whole


def _own_dtype(config: dict[str, Any]) -> str:
    found = config.get("dtype") or config.get("torch_dtype")
    return found if found in DTYPES else "float32"


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}
