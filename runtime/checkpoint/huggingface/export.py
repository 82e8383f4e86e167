"""Exports a checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planner.foundation.decode import load_json_object
from planner.foundation.errors import InputError, Problem
from planner.foundation.run_files import CHECKPOINTS, PLAN
from planner.strategy.engines.runtime_support import check_executed
from planner.strategy.plan import Plan, load_plan
from runtime.checkpoint.checkpoint import load_checkpoint
from runtime.checkpoint.huggingface.folder import CONFIG, KEPT, check_config, side_files
from runtime.checkpoint.huggingface.merged import MergedWeights
from runtime.checkpoint.store import CheckpointIndex, committed_folders, find_checkpoint, load_index, verify
from runtime.model.huggingface.write import ReadParameter, write_weights

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
